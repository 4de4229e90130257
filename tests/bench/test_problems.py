import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import kafops
from bench import problems, table
from bench.problems import BOUNDARY, Problem

ROOT = Path(__file__).parents[2]


def small(dictionary_size=20, free=False):
    generator = torch.Generator().manual_seed(1)
    x = (3 * torch.randn(6, 3, 4, 5, generator=generator)).requires_grad_()
    grad = torch.randn(x.shape, generator=generator)
    alpha = torch.randn(3, dictionary_size, generator=generator).requires_grad_()
    gamma = torch.full((3,), (dictionary_size - 1) ** 2 / (24 * BOUNDARY**2))  # 1 / (6 Δ²)
    if not free:
        return Problem(x, grad, (alpha, gamma))
    dictionary = torch.linspace(-BOUNDARY, BOUNDARY, dictionary_size).repeat(3, 1).requires_grad_()
    return Problem(x, grad, (alpha, gamma.requires_grad_(), dictionary))


@pytest.mark.parametrize("dictionary_size", [2, 5, 20])
def test_two_exponential_formula_is_the_kaf(dictionary_size):
    p = small(dictionary_size)
    p = Problem(p.x.detach().double(), p.grad, tuple(t.detach().double() for t in p.parameters))
    # The clamp and the truncated tails cost 1e-8 of |alpha| per node.
    torch.testing.assert_close(
        problems.two_exponentials(*p.arguments()), kafops.reference.kaf(*p.arguments()), rtol=0, atol=1e-6
    )


def test_two_exponential_formula_is_finite_far_away():
    _, *parameters = small().arguments()
    far = torch.tensor([-1e30, -50.0, 50.0, 1e30]).view(4, 1, 1, 1).expand(4, 3, 1, 1)
    assert problems.two_exponentials(far, *parameters).abs().max() < 1e-5


@pytest.mark.parametrize("mode", [table.FORWARD, table.BOTH, table.PENALTY], ids=lambda mode: mode.name)
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("chunk", [4, 100])
def test_exact_joins_the_parts_of_the_batch(mode, free, chunk):
    p = small(free=free)
    curve = kafops.reference.kaf_free if free else kafops.reference.kaf
    outputs = mode.call(curve, p)()
    exact = problems.exact(mode.call, p, chunk)
    assert [t.dtype for t in exact] == [torch.float64] * len(outputs)
    assert problems.error(outputs, exact) < 1e-5


def test_error_is_relative_to_the_largest_value_and_the_worst_of_all_outputs():
    exact = (torch.tensor([1.0, -4.0], dtype=torch.float64), torch.tensor([10.0], dtype=torch.float64))
    outputs = (torch.tensor([1.5, -4.0]), torch.tensor([10.5]))
    assert problems.error(outputs, exact) == pytest.approx(0.125)


def test_kept_bytes_counts_each_storage_once():
    x = torch.randn(10, requires_grad=True)
    assert problems.kept_bytes(lambda: x * x) == 40
    assert problems.kept_bytes(lambda: F.silu(x) * torch.ones(10)) == 80
    assert problems.kept_bytes(lambda: x + 1) == 0


def test_kaf_keeps_x_and_its_parameters():
    kept, allowed = table.kept_bytes()
    assert allowed == 4 * (128 * 32 * 32 * 32 + 32 * 20 + 32)
    if kafops.backends.choose(torch.empty(1)) != "reference":
        assert kept <= allowed


def test_bytes_moved_are_passes_over_x():
    assert small().passes(problems.FORWARD_BACKWARD) == 5 * 4 * 6 * 3 * 4 * 5


def test_threads_come_back():
    before = torch.get_num_threads()
    with problems.threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_kernels_are_timed_without_the_application():
    program = "import sys, bench.table\nprint([m for m in sys.modules if m.startswith(('models.', 'bench.trainings'))])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
