"""What operators compute on GPU backends beside the Gaussian of 0.1: bases, other kernels, derivatives of any order.

Run by test_gpu_kernels.py on the GPU kernels, executed on the CPU.
"""

import functools
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from cases import BF16, DEVICE, F16, F32, F64, GPU_KERNELS, Case
from torch import Tensor

from kafops import bases, kernels, plain, reference
from kafops.accuracy import Problem, bounds, values

BASES = {b.code: name for name, b in bases.BASES.items()}
KERNELS = {k.code: name for name, k in kernels.KERNELS.items()}
OPERATORS = torch.ops.kafops
EVERYTHING = 31
UNIT = 2**-24  # roundoff of float32, which arithmetic is done in

pytestmark = pytest.mark.skipif(not GPU_KERNELS, reason="is run by test_gpu_kernels")


def curve(p: Problem) -> tuple:
    return p.alpha, p.gamma, p.dictionary, p.boundary


def assert_near(name: str, got: Tensor, exact: Tensor, allowed: Tensor | float) -> None:
    """Check got up to `allowed` and one rounding of its own."""
    dtype = torch.finfo(got.dtype)
    allowed = allowed + dtype.eps / 2 * (exact.abs() + dtype.smallest_normal)
    assert got.shape == exact.shape, name
    error = (got.double() - exact).abs()
    assert (error <= allowed).all(), f"{name}: {(error / allowed).max().item():.3g} times the error allowed"


# -------------------------------------------------------------------------------------------------------- bases


@pytest.mark.parametrize("base", BASES, ids=BASES.get)
@pytest.mark.parametrize(
    "case",
    [
        Case((37, 3)),
        Case((37, 3), dtype=F64, parameter_dtype=F64, size=5),
        Case((3, 5, 7, 6), layout="channels_last", grad_layout="cropped", dtype=BF16),
        Case((3, 3, 40), layout="swapped", dtype=F16, size=5, free=True),
        Case((40,), shared=frozenset({"alpha", "gamma"}), dtype=BF16, size=33),
    ],
    ids=str,
)
def test_values_with_a_base(case, base):
    """The sum of a curve and its base, and of their derivatives, rounded once."""
    p = case.problem()
    v = (*p.v, None)[:4]
    x, g, v_x = p.x.double(), p.grad.double(), v[0].double()
    unit = UNIT if case.dtype != F64 else 2**-53
    allowed, exact = bounds(p), values(p, reference, F64)

    def add(name: str, weight: Tensor | float, order: int, size: Tensor | float) -> None:
        exact[name] = exact[name] + weight * bases.value(BASES[base], x, order)
        # Some roundings of a few terms, none more than `size`.
        allowed[name] = allowed[name] + 16 * unit * abs(weight) * size

    add("y", 1, 0, x.abs())
    add("backward x", g, 1, 1)
    add("double backward grad", v_x, 1, 1)
    add("double backward x", v_x * g, 2, 1)
    got = {"y": OPERATORS.kaf(p.x, *curve(p), base=base)}
    first = OPERATORS.kaf_backward(p.grad, p.x, *curve(p), EVERYTHING, base=base)
    second = OPERATORS.kaf_double_backward(*v, p.grad, p.x, *curve(p), EVERYTHING, base=base)
    names = [*p.arguments]
    got |= {f"backward {name}": t for name, t in zip(names, first, strict=False)}
    got |= {f"double backward {name}": t for name, t in zip(["grad", *names], second, strict=False)}
    assert got.keys() == exact.keys()
    for name, t in got.items():
        assert_near(name, t, exact[name], allowed[name])
        if t.shape == p.x.shape:
            assert t.dtype == p.x.dtype, name
            assert t.stride() == torch.empty_like(p.x).stride(), name


@pytest.mark.parametrize("base", BASES, ids=BASES.get)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_infinite_inputs_give_the_limit_of_the_base(dtype, base):
    x = torch.tensor([[math.inf, -math.inf, math.nan, 0.0]], dtype=dtype, device=DEVICE).T
    p = Case((4, 1), dtype=dtype, size=5).problem()
    y = OPERATORS.kaf(x, *curve(p), base=base).flatten()
    at_zero = OPERATORS.kaf(x, *curve(p)).flatten()[3]
    assert y[0] == math.inf
    assert y[1] == (-math.inf if BASES[base] == "identity" else 0)
    assert y[2].isnan()
    assert y[3] == at_zero


@pytest.mark.parametrize("kernel", [0, 1])
def test_needs_with_a_base(kernel):
    """Gradients not asked for are empty; those asked for are the same, whatever else is."""
    p = Case((30, 3), size=5, free=True).problem()

    def check(outputs: tuple[Tensor, ...], whole: tuple[Tensor, ...], flags: tuple[int, ...], needs: int) -> None:
        for flag, t, of_all in zip(flags, outputs, whole, strict=True):
            assert torch.equal(t, of_all) if needs & flag else t.shape == (0,), (needs, flag)

    first = functools.partial(OPERATORS.kaf_backward, p.grad, p.x, *curve(p), kappa=kernel, base=3)
    for needs in range(16):
        check(first(15), first(15), (1, 2, 4, 8), 15)
        check(first(needs), first(15), (1, 2, 4, 8), needs)
    second = functools.partial(OPERATORS.kaf_double_backward, *p.v, p.grad, p.x, *curve(p), base=3)
    for needs in (0, 1, 2, 16, 17, 30):
        check(second(needs), second(31), (16, 1, 2, 4, 8), needs)


def test_values_without_v_x_have_nothing_of_the_base():
    p = Case((30, 3), size=5).problem()
    arguments = (None, p.v[1], None, None, p.grad, p.x, *curve(p), EVERYTHING)
    with_base, without = (OPERATORS.kaf_double_backward(*arguments, base=base) for base in (4, 0))
    assert all(map(torch.equal, with_base, without))


# ---------------------------------------------------------------------------------------------- kernels and orders


@functools.cache
def peaks(kernel: int, n: int, m: int) -> tuple[float, float, float]:
    """Return the largest |ψ[n, m]|, |u ∂ψ/∂u| and |∂ψ/∂u| for γ = 1, by differences of neighbours."""
    u = torch.linspace(-30, 30, 60_001, dtype=F64)
    one, zero = torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64)
    psi = plain.kaf(u, one, one[0], zero, 0.0, kernel, 0, n, m)
    slope = psi.diff() / u.diff()
    return psi.abs().max().item(), (u[1:] * slope).abs().max().item(), slope.abs().max().item()


def term(p: Problem, kernel: int, n: int, m: int) -> float:
    """Return how far a ψ[n, m](x − δ) may be from the truth: roundings of its peak, of u, and of x and δ."""
    peak, along, slope = peaks(kernel, n, m)
    gamma = p.gamma.double().max().item()
    inside = 2 * p.boundary * gamma**0.5  # of u, where the curve is not flat
    return UNIT * gamma ** (n / 2 - m) * (32 * peak + 8 * along + 2 * slope * inside)


ORDERS = [
    *itertools.product([0, 1], [(0, 0), (1, 0), (0, 1), (3, 0), (2, 1), (0, 2)]),
    *itertools.product([2, 3], [(0, 0), (1, 0), (0, 1)]),
]


@pytest.mark.parametrize("base", [0, 3], ids=["no base", "silu"])
@pytest.mark.parametrize("case", [Case((60, 3), size=5), Case((2, 3, 5, 4), dtype=BF16, size=5, free=True)], ids=str)
@pytest.mark.parametrize(("kernel", "order"), [o for o in ORDERS if o != (0, (0, 0))], ids=str)
def test_values_of_other_kernels_and_orders(kernel, order, case, base):
    n, m = order
    p = case.problem()
    exact = Problem(*(None if t is None else t.double() for t in (p.x, *curve(p)[:3])), p.boundary, p.grad.double(), ())
    code = {"kappa": kernel, "base": base, "n": n, "m": m}
    alpha, g = exact.alpha.abs(), exact.grad.abs().movedim(1, -1).reshape(-1, 3).sum(0)  # [C, D], [C]

    def of_base(order: int) -> Tensor | float:  # its error, of terms no larger than |x|, or 1 for derivatives
        return 16 * UNIT * (exact.x.abs() if order == 0 else 1) if base and m == 0 else 0

    def rows(t: Tensor) -> Tensor:  # [C, ...]
        return t.reshape(1, 3, *(1,) * (p.x.dim() - 2))

    got, wanted = (operators.kaf(q.x, *curve(q), **code) for q, operators in ((p, OPERATORS), (exact, plain)))
    assert_near("y", got, wanted, rows(alpha.sum(1)) * term(p, kernel, n, m) + of_base(n))

    smooth = kernels.KERNELS[KERNELS[kernel]].smoothness
    needs = 7 if n + m < smooth else 2
    needs += 8 if needs == 7 and p.dictionary is not None else 0
    got = OPERATORS.kaf_backward(p.grad, p.x, *curve(p), needs, **code)
    wanted = plain.kaf_backward(exact.grad, exact.x, *curve(exact), needs, **code)
    allowed = {
        "x": exact.grad.abs() * (rows(alpha.sum(1)) * term(p, kernel, n + 1, m) + of_base(n + 1)) if needs & 1 else 0,
        "alpha": g[:, None] * term(p, kernel, n, m),
        "gamma": g * alpha.sum(1) * term(p, kernel, n, m + 1) if needs & 4 else 0,
        "dictionary": g[:, None] * alpha * term(p, kernel, n + 1, m) if needs & 8 else 0,
    }
    for (name, most), t, w in zip(allowed.items(), got, wanted, strict=True):
        assert_near(name, t, w, most)


# ------------------------------------------------------------------------------------------------------- memory


def allocated(function: Callable[[], object]) -> int:
    """Count the bytes that a call takes at its peak, or on the CPU in all."""
    if DEVICE != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return sum(e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0)


@pytest.mark.parametrize("shape", [(8, 2048, 5, 5), (24, 2048, 7, 7), (8, 250, 64), (8, 8000, 4)], ids=str)
@pytest.mark.parametrize("ensemble", [False, True], ids=["one", "vmap"])
def test_workspace_is_at_most_a_quarter_of_x(shape, ensemble, monkeypatch):
    """With many channels, and where each of 8 members of an ensemble has curves of its own."""
    monkeypatch.delenv("KAFOPS_EMULATOR_TABLES", raising=False)  # which makes tables whatever they take
    x = torch.randn(shape, device=DEVICE)
    alpha = torch.randn(*((8,) if ensemble else ()), shape[1], 20, device=DEVICE)
    gamma = torch.rand(shape[1], device=DEVICE) + 1
    if ensemble:
        x = x.unflatten(0, (-1, 8)).transpose(0, 1).contiguous()  # [8, N/8, C, *]

    def call(alpha: Tensor, x: Tensor) -> Tensor:
        return OPERATORS.kaf(x, alpha, gamma, None, 3.0)

    run = functools.partial(torch.vmap(call) if ensemble else call, alpha, x)
    run()
    copies = 2 if ensemble else 1  # y; members' channels brought together
    assert allocated(run) <= (copies + 1 / 4) * x.nbytes + 64 * alpha.shape.numel() + 2**12
