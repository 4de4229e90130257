"""The operators in C++ of the CUDA kernels, run by the emulator: what they refuse, and what they leave to Python."""

import json
import subprocess
import sys

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
        ({"alpha": torch.ones(7, 5)}, r"a parameter has 7 rows, but x, \[4, 3\], has another number of channels"),
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


PROGRAM = """
import sys
import torch
torch.ops.load_library(sys.argv[1])
x, alpha, gamma = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]]), torch.tensor([1.0])
print(torch.ops.kafops_emulated.kaf(x, alpha, gamma, None, 1.0).tolist())
for more in ({"kappa": 1}, {"base": 1}, {"n": 1}, {"m": 1}):
    try:
        torch.ops.kafops_emulated.kaf(x, alpha, gamma, None, 1.0, **more)
    except RuntimeError as error:
        print(error)
assert "kafops" not in sys.modules
"""


def test_without_the_python_package(library):
    """The Gaussian is computed; what is left to Python is refused, with the reason."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values, *refusals = done.stdout.splitlines()
    (first,), (second,) = json.loads(values)
    assert first == 3
    assert second == pytest.approx(3 / 2.718281828, rel=1e-6)
    reason = "left to the operator kafops::plain_kaf of the Python package kafops, which is not imported here"
    assert [reason in line for line in refusals if "CUDA kernels" in line] == [True] * 4
