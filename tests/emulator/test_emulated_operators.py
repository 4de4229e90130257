"""The operators in C++ of the CUDA kernels, run by the emulator: what they refuse, and what they leave to Python."""

import ctypes
import json
import math
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from emulator_build import compiler, kafops_cuda

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="session")
def library():
    path = kafops_cuda()
    torch.ops.load_library(str(path))
    return path


def arguments(**changed):
    right = {"x": torch.ones(4, 3), "alpha": torch.ones(3, 5), "gamma": torch.ones(3), "dictionary": torch.ones(3, 5)}
    return (*(right | changed).values(), 3.0)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"alpha": torch.ones(7, 5)}, r"alpha must have one row per channel .*, got alpha \[7, 5\] for x \[4, 3\]"),
        ({"gamma": torch.ones(2)}, r"gamma must have one row per channel .*, got gamma \[2\] for x \[4, 3\]"),
        ({"alpha": torch.ones(5)}, r"alpha must be \[C or 1, D\] with D > 0, got \[5\]"),
        ({"gamma": torch.ones(3, 1)}, r"gamma must be \[C or 1\], got \[3, 1\]"),
        ({"dictionary": torch.ones(3, 4)}, r"dictionary must be \[3, 5\], got \[3, 4\]"),
        ({"gamma": torch.ones(3, dtype=torch.float16)}, "gamma must be float32 or float64, got Half"),
        ({"x": torch.ones(4, 3, dtype=torch.int32)}, "x must be float32, float64, bfloat16 or float16, got Int"),
    ],
)
def test_says_what_came(library, wrong, says):
    with pytest.raises(RuntimeError, match=says):
        torch.ops.kafops_emulated.kaf(*arguments(**wrong))


def test_says_what_came_as_grad(library):
    says = r"grad must have the shape and dtype of x, \[4, 3\] Float, got \[4, 2\] Half"
    with pytest.raises(RuntimeError, match=says):
        torch.ops.kafops_emulated.kaf_backward(torch.ones(4, 2, dtype=torch.float16), *arguments(), 15)


@dataclass(frozen=True)
class Cost:
    """What the host does for a call: launches, and allocations."""

    launches: int
    allocations: int


def cost(library, call) -> Cost:
    launches = ctypes.CDLL(str(library)).kafops_emulator_launches
    before = launches()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    memory = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return Cost(launches() - before, sum(e.nbytes() > 0 for e in memory))


X, ALPHA, GAMMA = 1, 2, 4  # of needs
F64 = torch.float64
LAST = torch.channels_last


@pytest.mark.parametrize(
    ("shape", "layout", "tables", "needs", "expected"),
    [
        # One launch and no workspace, or one where a block has all of a channel: y; dx, dalpha and the sums; dalpha.
        ((8, 3, 8, 8), None, False, None, Cost(1, 1)),
        ((8, 3, 8, 8), None, False, X | ALPHA, Cost(1, 3)),
        ((8, 3, 8, 8), LAST, False, X, Cost(1, 1)),
        ((8, 3, 8, 8), LAST, False, ALPHA, Cost(2, 2)),
        # Tables take another launch, and the workspace is one.
        ((8, 3, 16, 16), None, True, None, Cost(2, 2)),
        ((8, 3, 16, 16), None, True, X | ALPHA | GAMMA, Cost(2, 4)),
        ((8, 3, 16, 16), LAST, True, X | ALPHA, Cost(2, 3)),
        # Many sums take a third.
        ((20_000, 3), None, True, X | ALPHA, Cost(3, 3)),
    ],
)
def test_what_the_host_does_for_a_call(shape, layout, tables, needs, expected, library, monkeypatch):
    monkeypatch.delenv("KAFOPS_EMULATOR_TABLES", raising=False)
    if tables:
        monkeypatch.setenv("KAFOPS_EMULATOR_TABLES", "1")
    x = torch.randn(shape)
    x = x.contiguous(memory_format=layout) if layout else x
    grad, curve = torch.ones_like(x), (x, torch.randn(3, 20), torch.rand(3) + 1, None, 3.0)
    operators = torch.ops.kafops_emulated
    if needs is None:
        assert cost(library, lambda: operators.kaf(*curve)) == expected
    else:
        assert cost(library, lambda: operators.kaf_backward(grad, *curve, needs)) == expected


PROGRAM = """
import sys
import torch
torch.ops.load_library(sys.argv[1])
x, alpha, gamma = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]]), torch.tensor([1.0])
for more in ({}, {"kappa": 1}, {"base": 1}, {"n": 1}, {"m": 1}):
    print(torch.ops.kafops_emulated.kaf(x, alpha, gamma, None, 1.0, **more).flatten().tolist())
assert "kafops" not in sys.modules
"""


def test_without_the_python_package(library):
    """The Gaussian, a rational quadratic, with the identity beneath, its slope, and its derivative in gamma."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    at_one = 3 / math.e
    want = [[3, at_one], [3, 1.5], [3, 1 + at_one], [0, -2 * at_one], [0, -at_one]]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [pytest.approx(w, rel=1e-6) for w in want]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"kappa": 4}, "kappa must be a code from 0 to 3, got 4"),
        ({"base": -1}, "base must be a code from 0 to 4, got -1"),
        ({"n": 13}, "derivatives up to n \\+ 2m = 12.*got n = 13 and m = 0 of kernel 0"),
        ({"kappa": 2, "n": 2}, "got n = 3 and m = 0 of kernel 2, gradients included"),
        ({"n": -1}, "got n = -1"),
    ],
    ids=str,
)
def test_what_is_refused(more, message, library):
    x, alpha, gamma = torch.zeros(2, 1), torch.ones(1, 1), torch.ones(1)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kafops_emulated.kaf_backward(x, x, alpha, gamma, None, 1.0, X, **more)


def test_more_windows_of_points_than_a_grid_has_rows(library):
    """A dictionary of 655,370 points is summed in more than 65,535 windows, the most that gridDim.y could count."""
    size, boundary = 655_370, 3.0
    x, grad, gamma = torch.tensor([[0.7]], dtype=F64), torch.tensor([[2.0]], dtype=F64), torch.tensor([1.5], dtype=F64)
    alpha = torch.zeros(1, size, dtype=F64)
    _, got, *_ = torch.ops.kafops_emulated.kaf_backward(grad, x, alpha, gamma, None, boundary, ALPHA)
    points = boundary * (2 * torch.arange(size, dtype=F64) / (size - 1) - 1)
    torch.testing.assert_close(got, 2 * torch.exp(-1.5 * (0.7 - points) ** 2)[None], rtol=1e-14, atol=0)
