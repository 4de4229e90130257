"""Bases beneath curves, as the operators compute them, against the float64 reference plus `kafops.bases.value`.

The variables of test_kernels.py choose the device, the backend and the instruction set.
"""

import functools
import math
from dataclasses import replace

import pytest
import torch
from cases import BF16, DEVICE, DTYPES, F16, F32, F64, Case
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kafops import bases, kernels, ops, reference
from kafops.accuracy import Problem, bounds, values
from kafops.backends import cpu
from kafops.ops import Needs

pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and cpu.load_error is not None, reason=f"no compiled kernels: {cpu.load_error}"),
    pytest.mark.usefixtures("one_thread"),  # what threads change is tested where it is named
]

NAMES = tuple(bases.BASES)
SMOOTH = ("silu", "gelu")
BASE = pytest.mark.parametrize("base", NAMES)
# So few elements in a channel that the Gaussians are summed one by one, and so many that curves are tabulated.
COUNTS = pytest.mark.parametrize("count", [3, 600], ids=["few", "many"])
ALONE = frozenset({"alpha", "gamma", "dictionary"})
PEAKS = {"identity": (1, 0), "relu": (1, 0), "silu": (1.1, 0.5), "gelu": (1.13, 0.8)}  # of |base′| and |base″|
LIMITS = {"identity": (-math.inf, 1), "relu": (0, 0), "silu": (0, 0), "gelu": (0, 0)}  # of base and base′ at −inf
IMAGES = Case(shape=(2, 18, 11, 10), size=5)
CASES = (
    Case(),
    Case(shape=(4, 3)),
    *(Case(shape=s, shared=ALONE) for s in ((), (1,), (7,), (600,), (0,))),
    *(
        Case(shape=s)
        for s in ((2, 3, 5), (2, 3, 300), (3, 17, 4, 4), (1, 130, 5, 7), (0, 3, 4, 4), (2, 0, 4), (2, 3, 70, 70))
    ),
    Case(shape=(600, 3), free=True, varied=True),
    Case(shape=(2, 18, 9, 9), layout="channels_last", varied=True),
    Case(shape=(2, 48, 17, 9), layout="channels_last"),
    Case(shape=(2, 16, 30, 30), layout="channels_last", dtype=F16),
    Case(shape=(2, 70, 4, 5), layout="channels_last", grad_layout="contiguous", dtype=BF16, free=True),
    *(replace(IMAGES, layout=name) for name in ("transposed", "every_third", "cropped", "expanded_channel", "offset")),
    replace(IMAGES, layout="channels_last", grad_layout="transposed"),
    *(Case(dtype=d, parameter_dtype=F64 if d == F64 else F32) for d in DTYPES if d != F32),
    *(Case(shape=(600, 2), dtype=F64, parameter_dtype=F64, size=size) for size in (2, 40)),
    *(Case(shape=(600, 2), size=size, spacing=t) for size in (1, 2, 64) for t in (1 / 8, 8.0)),
    *(Case(boundary=b, dtype=dtype) for b in (1e-3, 0.5, 30.0, 1e3) for dtype in (F32, F64, BF16)),
    Case(spacing=1e-4),
    Case(spacing=1e4),
)  # fmt: skip

tensor = functools.partial(torch.tensor, device=DEVICE)


def compute(p: Problem, base: str | None) -> dict[str, Tensor]:
    """`accuracy.values` by the operators."""
    arguments = (p.x, p.alpha, p.gamma, p.dictionary, p.boundary)
    v = (*p.v, *(None,) * (4 - len(p.v)))
    code = bases.code(base)
    named = {"y": ops.kaf(*arguments, base=code)}
    first = ops.kaf_backward(p.grad, *arguments, 15, base=code)
    second = ops.kaf_double_backward(*v, p.grad, *arguments, 31, base=code)
    names = tuple(p.arguments)
    named |= {f"backward {name}": t for name, t in zip(names, first, strict=False)}
    return named | {f"double backward {name}": t for name, t in zip(("grad", *names), second, strict=False)}


def assert_exact(p: Problem, base: str, got: dict[str, Tensor] | None = None) -> None:
    """y may be off by 2u (|x| + Σ|α|), u the unit roundoff; derivatives by what the curve may, some u of the base's.

    A cell's polynomial has coefficients that decay fast, so that its roundings are those of the first two terms: in
    storing, multiplying and adding them, 4 in float32, 8 of a series of Chebyshev polynomials. The truth, in float64,
    has two of its own.
    """
    got = compute(p, base) if got is None else got
    dtype = torch.promote_types(p.x.dtype, F32)
    u, roundings = torch.finfo(dtype).eps / 2, 8 if dtype == F64 else 4
    x, g = p.x.double(), p.grad.double()
    v = torch.zeros_like(g) if p.v[0] is None else p.v[0].double()
    heights = p.alpha.double().abs().sum(1)
    heights = heights.reshape(-1, *(1,) * (x.dim() - 2)) if x.dim() > 1 else heights[0]
    truth, allowed = values(p, reference, F64), bounds(p)
    allowed["y"] = (2 + 2 * (dtype == F64)) * u * (x.abs() + heights)
    parts = (("y", 1, 0), ("backward x", g, 1), ("double backward grad", v, 1), ("double backward x", v * g, 2))
    for name, weight, order in parts:
        truth[name] = truth[name] + weight * bases.value(base, x, order)
        if order:
            allowed[name] = allowed[name] + roundings * u * PEAKS[base][order - 1] * weight.abs()
    for name, value in got.items():
        exact, limits = truth[name], torch.finfo(value.dtype)
        assert value.shape == exact.shape
        error = (value.double() - exact).abs()
        error[value == exact.to(value.dtype)] = 0  # also where both are infinite
        excess = error / (allowed[name] + limits.eps / 2 * (exact.abs() + limits.smallest_normal))
        assert not excess.numel() or excess.nan_to_num(math.inf).max() <= 1, name


# ----------------------------------------------------------------------------------------------------- values


@BASE
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, base):
    p = case.problem()
    got = compute(p, base)
    assert_exact(p, base, got)
    for name in ("y", "backward x", "double backward grad", "double backward x"):
        assert got[name].dtype == p.x.dtype
        assert got[name].stride() == torch.empty_like(p.x).stride(), name


@BASE
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("boundary", [0.02, 0.3, 1.0, 3.0, 12.0, 200.0, 2e4])
@pytest.mark.parametrize("size", [2, 20])
def test_beyond_the_dictionary(size, boundary, dtype, base):
    """Wherever the curve's cells end, and however wide they are: over all of what is not straight in a base."""
    p = Case(shape=(4000, 2), size=size, boundary=boundary, dtype=dtype, parameter_dtype=dtype).problem()
    x = torch.cat([torch.linspace(-45, 45, 3000, dtype=F64), torch.logspace(-12, 6, 500, dtype=F64)])
    x = torch.cat([x, -torch.logspace(-12, 6, 500, dtype=F64)])
    x = x[torch.randperm(4000, generator=torch.Generator().manual_seed(0))].to(DEVICE, dtype)
    assert_exact(replace(p, x=torch.stack([x, x.flip(0)], 1)), base)


@BASE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("boundary", [0.3, 3.0, 12.0])
@pytest.mark.parametrize("count", [2, 7000], ids=["few", "many"])
def test_without_a_curve(count, boundary, dtype, base):
    """α = 0: the base, to its own rounding and those of what tables hold, small beside x."""
    p = Case(
        shape=(2 * count, 2), boundary=boundary, dtype=dtype, parameter_dtype=F64 if dtype == F64 else F32
    ).problem()
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2 * count - 2, generator=draw, dtype=F64) * 4
    x[::2] = 2.0 ** torch.randint(-20, 5, (count - 1,), generator=draw) * (1 + x[::2].frac().abs() / 100)
    x = torch.cat([x, x.new_tensor([0.0, 1e-40])]).to(DEVICE, dtype)
    x = torch.stack([x, -x], 1)
    y = ops.kaf(x, torch.zeros_like(p.alpha), p.gamma, None, boundary, base=bases.code(base))
    exact = bases.value(base, x.double())
    if base not in SMOOTH:
        assert torch.equal(y, exact.to(dtype))
        return
    u, own = (torch.finfo(t).eps / 2 for t in (torch.promote_types(dtype, F32), dtype))
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    truth = 2 * u * exact.abs() if dtype == F64 else 0  # F.silu and F.gelu in float64 have roundings too
    limit = own * exact.abs() + 0.7 * u * x.double().abs() + truth + 2 * subnormal
    assert ((y.double() - exact).abs() <= limit).all()


@BASE
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("boundary", [0.5, 3.0, 12.0])
@pytest.mark.parametrize("count", [2, 3000], ids=["few", "many"])
def test_derivatives_of_every_order(count, boundary, dtype, base):
    """α = 0: the n-th derivative of the base, to a few roundings of its peak, as kaf[n] and as a gradient's part."""
    p = Case(shape=(count, 2), boundary=boundary, dtype=dtype, parameter_dtype=dtype).problem()
    x = torch.linspace(-30, 30, 2 * count, dtype=dtype, device=DEVICE).reshape(2, count).t().contiguous()
    p = replace(p, x=x, alpha=torch.zeros_like(p.alpha))
    arguments, code = (p.x, p.alpha, p.gamma, None, boundary), bases.code(base)
    close = torch.linspace(-3, 3, 2001, dtype=F64)
    u = torch.finfo(dtype).eps / 2
    for n in range(kernels.HIGHEST + 1):
        exact = bases.value(base, x.double(), n)
        peak = bases.value(base, close, n).abs().max() if n else x.double().abs()
        # Eulerian numbers, of which Σ is n!, cancel to σ's peak of about 4 n! / π^(n + 1), at terms of n! / 2^(n + 1).
        limit = (8 + ((math.pi / 2) ** (n + 1) if dtype == F64 else 0)) * u * peak
        y = ops.kaf(*arguments, base=code, n=n)
        assert ((y.double() - exact).abs() <= limit).all(), n
        if n:
            dx, *_ = ops.kaf_backward(torch.full_like(x, 2.0), *arguments, int(Needs.X), base=code, n=n - 1)
            assert torch.equal(dx, 2 * y), n


@BASE
@COUNTS
def test_derivatives_by_gamma_do_not_know_the_base(count, base):
    p = Case((count, 3), size=5).problem()
    for n in (0, 1, 3):
        got, plain = (
            ops.kaf(p.x, p.alpha, p.gamma, None, p.boundary, base=code, n=n, m=1) for code in (bases.code(base), 0)
        )
        assert torch.equal(got, plain)
        needs = int(Needs.X | Needs.ALPHA | Needs.GAMMA)
        got, plain = (
            ops.kaf_backward(p.grad, p.x, p.alpha, p.gamma, None, p.boundary, needs, base=code, n=n, m=1)
            for code in (bases.code(base), 0)
        )
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize("count", [2, 600], ids=["few", "many"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slope_of_relu_at_its_kink(dtype, count):
    x = tensor([[0.0], [-0.0], [1e-7], [-1e-7]], dtype=dtype).repeat(count, 1)
    alpha, gamma, one = tensor([[0.0, 0.0]]), tensor([1.0]), torch.ones_like(x)
    dx, *_ = ops.kaf_backward(one, x, alpha, gamma, None, 3.0, int(Needs.X), base=bases.code("relu"))
    assert torch.equal(dx, (x > 0).to(dtype))
    dgrad, dx, *_ = ops.kaf_double_backward(
        one, None, None, None, one, x, alpha, gamma, None, 3.0, int(Needs.X | Needs.GRAD), base=bases.code("relu")
    )
    assert torch.equal(dgrad, (x > 0).to(dtype))
    assert not dx.any()


@pytest.mark.parametrize("order", range(9))
@BASE
def test_values_of_bases_may_be_differentiated(base, order):
    """By PyTorch, where x is 0 too; there ReLU's and its derivatives' slope is 0."""
    x = torch.tensor([-1.5, 0.0, 1e-9, 0.7, 30.0], dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(bases.value(base, x, order).sum(), x, allow_unused=True, materialize_grads=True)
    exact = bases.value(base, x.detach(), order + 1)
    torch.testing.assert_close(slope, exact, rtol=1e-12, atol=1e-12 * exact.abs().max().item())


# ---------------------------------------------------------------------------------- what the base does not enter


@BASE
@COUNTS
def test_gradients_of_parameters_do_not_know_the_base(count, base):
    for free in (False, True):
        p = Case((count, 3), size=5, free=free).problem()
        plain, got = compute(p, None), compute(p, base)
        named = {n for n in got if n.split()[-1] in ("alpha", "gamma", "dictionary")}
        assert len(named) == 2 * (2 + free)
        assert_exact(p, base, {name: got[name] for name in named})
        if base not in SMOOTH:  # whose cells may be narrower
            assert all(torch.equal(got[name], plain[name]) for name in named)


@BASE
@COUNTS
def test_directions_of_parameters_do_not_know_the_base(count, base):
    """Second derivatives along v_alpha, v_gamma and v_dictionary alone: the base does not depend on these."""
    p = Case((count, 3), size=5, free=True).problem()
    along = replace(p, v=(None, *p.v[1:]))
    got, plain = compute(along, base), compute(along, None)
    assert_exact(along, base, got)
    if base not in SMOOTH:
        for name in ("double backward grad", "double backward x"):
            assert torch.equal(got[name], plain[name])


# -------------------------------------------------------------------------------------- not a number, infinity


@BASE
@COUNTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits(dtype, count, base):
    """At ±inf, and beside it where dtypes hardly reach, y is the base's limit, and so are its derivatives."""
    p = Case((count, 3), size=5, dtype=dtype).problem()
    low, slope = LIMITS[base]
    for far in (math.inf, 6e4, 1e30):
        if far > torch.finfo(dtype).max and math.isfinite(far):
            continue
        p.x[:2] = tensor([[far], [-far]])
        got = compute(replace(p, v=(p.v[0], *(None,) * (len(p.v) - 1))), base)
        ends = p.x[:2] * tensor([[1], [1 if low else 0]], dtype=dtype)
        ends[1] = ends[1] if low else 0
        slopes = tensor([[1.0], [slope]], dtype=dtype)
        assert torch.equal(got["y"][:2], ends)
        assert torch.equal(got["backward x"][:2], p.grad[:2] * slopes)
        assert torch.equal(got["double backward grad"][:2], p.v[0][:2] * slopes)
        assert not got["double backward x"][:2].any()
        assert all(t.isfinite().all() for t in got.values() if t.shape != p.x.shape or math.isfinite(far))


@BASE
@COUNTS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_third"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_element(dtype, layout, count, base):
    p = Case((2, 17, count), layout=layout, size=5, dtype=dtype).problem()
    clean = compute(p, base)
    at = (1, 4, count - 1)
    p.x[at] = math.nan
    got = compute(p, base)
    for name in ("y", "backward x", "double backward grad", "double backward x"):
        where = torch.zeros_like(p.x, dtype=torch.bool)
        where[at] = True
        assert torch.equal(got[name].isnan(), where), name
        assert torch.equal(got[name][~where], clean[name][~where]), name


@BASE
@pytest.mark.parametrize("shape", [(2000, 16), (1, 16, 2000)], ids=["channels innermost", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elements_do_not_know_their_neighbours(dtype, shape, base):
    """Near and far elements mixed: the same bits in any order, so whatever else is in their vector."""
    p, dim = Case(shape, dtype=dtype, boundary=1.0).problem(), shape.index(2000)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    scales = torch.logspace(-1, 1.5, 2000, dtype=F64, device=DEVICE).to(dtype)
    p = replace(p, x=p.x * (scales if dim else scales[:, None]))

    def moved(t: Tensor) -> Tensor:
        return t.index_select(dim, order)

    got = compute(p, base)
    again = compute(replace(p, x=moved(p.x), grad=moved(p.grad), v=(moved(p.v[0]), *p.v[1:])), base)
    for name in ("y", "backward x", "double backward grad", "double backward x"):
        assert torch.equal(moved(got[name]), again[name]), name


@BASE
@COUNTS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_alpha_that_is_not_finite(layout, count, base):
    """It spoils all of its own channel, beyond the dictionary too."""
    p = Case((count, 16), size=5, layout=layout).problem()
    p.x[0] = 20.0
    clean = compute(p, base)
    p.alpha[1, 2] = math.nan
    got = compute(p, base)
    others = [c for c in range(16) if c != 1]
    for name in ("y", "backward x"):
        assert got[name][:, 1].isnan().all(), name
        assert torch.equal(got[name][:, others], clean[name][:, others]), name


# ------------------------------------------------------------------------------------- threads, memory, errors


@BASE
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_for_any_number_of_threads(layout, base):
    p = Case((8, 33, 50, 50), size=5, layout=layout).problem()
    first = compute(p, base)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        for name, t in compute(p, base).items():
            assert torch.equal(t, first[name]), f"{name} with {threads} threads"


@pytest.mark.skipif(DEVICE != "cpu", reason="other devices may add a base as they like")
@pytest.mark.parametrize("base", [None, *NAMES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_memory_with_and_without_a_base(dtype, base):
    """A pass reads x once and writes y once: nothing of their size is allocated but y, and in backward the gradient."""
    p = Case((64, 16, 32, 32), dtype=dtype).problem()
    arguments, code = (p.x, p.alpha, p.gamma, p.dictionary, p.boundary), bases.code(base)

    def sizes(call):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        allocated = [e.self_cpu_memory_usage / p.x.nbytes for e in profiler.events()]
        return [round(n, 1) for n in allocated if n > 0.1]

    assert sizes(lambda: ops.kaf(*arguments, base=code)) == [1]
    needs = int(Needs.X | Needs.ALPHA | Needs.GAMMA)
    assert sizes(lambda: ops.kaf_backward(p.grad, *arguments, needs, base=code)) == [1]


@pytest.mark.parametrize("code", [-1, 5])
def test_unknown_code(code):
    p = Case((3, 3)).problem()
    with pytest.raises(RuntimeError, match=f"base must be a code from 0 to 4, got {code}"):
        ops.kaf(p.x, p.alpha, p.gamma, None, 3.0, base=code)
