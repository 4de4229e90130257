"""The operators kaf[n, m] and kaf_backward[n, m] on the CPU, of every order, against closed forms of their derivatives.

Errors are measured by the peak of ψ[n, m] = ∂ⁿ/∂xⁿ ∂ᵐ/∂γᵐ κ(√γ d), as the derivatives of order 12 are a million times
higher than the curve.
"""

import functools
import math

import pytest
import torch
from cases import BF16, F16, F32, F64, LAYOUTS
from other_kernels import KERNELS as OTHERS
from torch import Tensor

from kafops import kernels, plain
from kafops.backends import cpu

pytestmark = pytest.mark.skipif(cpu.load_error is not None, reason=f"no compiled kernels: {cpu.load_error}")

kaf, kaf_backward = torch.ops.kafops.kaf, torch.ops.kafops.kaf_backward
CODES = {name: k.code for name, k in kernels.KERNELS.items()}
ALL = 1 + 2 + 4 + 8  # needs: the gradients of x, alpha, gamma and dictionary
PARTS = ((1, 0), (0, 0), (0, 1), (1, 0))  # orders that they take beyond n and m
ORDERS = [(n, m) for m in range(7) for n in range(13 - 2 * m)]
SOME = [(0, 0), (1, 1), (5, 0), (2, 3), (12, 0), (0, 6), (6, 3)]
# Two roundings for each of the up to 16 terms of a polynomial or a series, as in kafops.accuracy. In float64 the terms
# of the oracle cancel to a thirtieth.
ROUNDINGS = {F32: 32 * 2.0**-24, F64: 1e-13}

few_and_many = pytest.mark.parametrize("count", [3, 600], ids=["few", "many"])  # summed directly, and tabulated
dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=str)
of_orders = pytest.mark.parametrize(("n", "m"), ORDERS, ids=str)


@functools.cache
def polynomial(kernel: str, n: int, m: int) -> tuple[int, ...]:
    """P with ψ[n, m](d) = P(d) exp(−d²), or P(d) / (1 + d²)^(n + m + 1), for γ = 1: coefficients of d^0, d^1, ..."""
    gaussian = kernel == "gaussian"
    p = [0] * (2 * m) + [(-1) ** m * (1 if gaussian else math.factorial(m))]
    for j in range(n):
        slope, outer = [i * c for i, c in enumerate(p)][1:], [0, *(2 * (1 if gaussian else m + 1 + j) * c for c in p)]
        if not gaussian:
            slope = [a + b for a, b in zip([*slope, 0, 0], [0, 0, *slope], strict=True)]  # times 1 + d²
        size = max(len(slope), len(outer))
        slope, outer = (t + [0] * (size - len(t)) for t in (slope, outer))
        p = [a - b for a, b in zip(slope, outer, strict=True)]
    return tuple(p)


def psi(kernel: str, n: int, m: int, d: Tensor, gamma: Tensor) -> Tensor:
    """ψ[n, m](d), from u = √γ d."""
    gamma = gamma.double()
    u = d.double() * gamma.sqrt()
    value = torch.zeros_like(u)
    for c in reversed(polynomial(kernel, n, m)):
        value = value * u + c
    q = u * u
    return value * (torch.exp(-q) if kernel == "gaussian" else (1 + q) ** -(n + m + 1)) * gamma ** (n / 2 - m)


@functools.cache
def peak(kernel: str, n: int, m: int) -> float:
    """The largest |ψ[n, m]| where γ = 1."""
    d = torch.linspace(0, 6, 3000, dtype=F64)
    if kernel in ("gaussian", "rational_quadratic"):
        return psi(kernel, n, m, d, torch.ones((), dtype=F64)).abs().max().item()
    one = torch.ones(1, 1, dtype=F64)
    return plain.kaf(d, one, one[0], 0 * one, 1.0, CODES[kernel], 0, n, m).abs().max().item()


class Problem:
    """x [count, C], grad as x, alpha [C, D], gamma [C] and a dictionary [C, D] of one call, and the truth about it."""

    def __init__(self, kernel: str, count: int, dtype: torch.dtype, shared: bool = False, size: int = 9) -> None:
        draw = torch.Generator().manual_seed(0)
        channels, rows = 3, 1 if shared else 3
        self.kernel = kernel
        self.x = (2 * torch.randn(count, channels, dtype=F64, generator=draw)).to(dtype)
        self.grad = torch.randn(count, channels, dtype=F64, generator=draw).to(dtype)
        self.alpha = torch.randn(rows, size, dtype=F64, generator=draw).to(dtype)
        self.gamma = torch.linspace(1.0, 2.0, rows, dtype=F64).to(dtype)
        even = torch.linspace(-2, 2, size, dtype=F64)
        self.dictionary = (even + 0.2 * torch.randn(rows, size, dtype=F64, generator=draw)).to(dtype)

    def call(self, operator, *first, n: int, m: int, **named):
        tensors = (self.x, self.alpha, self.gamma, self.dictionary)
        return operator(*first, *tensors, 0.0, **named, kappa=CODES[self.kernel], n=n, m=m)

    def rows(self, p: Tensor) -> Tensor:  # [C, ...]
        return p.double().expand(self.x.shape[1], *p.shape[1:])

    def terms(self, n: int, m: int) -> Tensor:  # [count, C, D]
        alpha, gamma, dictionary = (self.rows(p) for p in (self.alpha, self.gamma, self.dictionary))
        d = self.x.double().unsqueeze(-1) - dictionary
        each = [psi(self.kernel, n, m, d[:, c], gamma[c]) for c in range(len(alpha))]
        return torch.stack(each, 1)

    def scale(self, n: int, m: int) -> Tensor:  # [C, 1]
        return (peak(self.kernel, n, m) * self.rows(self.gamma) ** (n / 2 - m)).unsqueeze(1)

    def like(self, t: Tensor, p: Tensor) -> Tensor:  # adds over channels where they share a row
        return t.sum(0, keepdim=True) if len(p) == 1 else t

    def curve(self, n: int, m: int) -> tuple[Tensor, Tensor]:
        """kaf[n, m] and the size of its terms, [count, C]."""
        alpha = self.rows(self.alpha)
        return (alpha * self.terms(n, m)).sum(-1), (alpha.abs() * self.scale(n, m)).sum(-1).expand_as(self.x)

    def gradients(self, n: int, m: int) -> list[tuple[Tensor, Tensor] | None]:
        """The four parts of kaf_backward[n, m] and the sizes of their terms; None of those beyond order 12."""
        alpha, weight = self.rows(self.alpha), self.grad.double()
        total = weight.abs().sum(0).unsqueeze(1)  # [C, 1]

        def moments(n: int, m: int) -> tuple[Tensor, Tensor]:  # [C, D]
            return (weight.unsqueeze(-1) * self.terms(n, m)).sum(0), total * self.scale(n, m)

        def parts(n: int, m: int, of: int) -> tuple[Tensor, Tensor]:
            if of == 0:
                y, size = self.curve(n, m)
                return weight * y, weight.abs() * size
            value, size = moments(n, m)
            if of == 1:
                return tuple(self.like(t, self.alpha) for t in (value, size.expand_as(value)))
            value, size = alpha * value, alpha.abs() * size
            if of == 2:
                return tuple(self.like(t.sum(1), self.gamma) for t in (value, size))
            return self.like(-value, self.dictionary), self.like(size, self.dictionary)

        orders = [(n + i, m + j) for i, j in PARTS]
        return [parts(*o, i) if o[0] + 2 * o[1] <= 12 else None for i, o in enumerate(orders)]


def assert_within(got: Tensor, want: tuple[Tensor, Tensor], name: str = "") -> None:
    exact, size = want
    error = (got.double() - exact).abs() / size
    assert error.max() <= ROUNDINGS[got.dtype], (
        f"{name}: {error.max() / ROUNDINGS[got.dtype]:.2g} times what is allowed"
    )


def needs_of(wanted: list[object]) -> int:
    return sum(1 << i for i, w in enumerate(wanted) if w is not None)


# ---------------------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("kernel", ["gaussian", "rational_quadratic"])
@of_orders
def test_the_oracle_is_the_derivative_by_contour_integrals(kernel, n, m):
    """By Cauchy's formula around d and γ: sums over circles within the poles of 1/(1 + γd²), exact to roundings."""
    d, gamma = torch.linspace(0, 4, 21, dtype=F64), torch.tensor(1.3, dtype=F64)
    turn = torch.exp(2j * math.pi * torch.arange(96, dtype=F64) / 96)
    radii = (max(1.0, math.sqrt(n / 2)) if kernel == "gaussian" else 0.55, 0.35)
    (z, of_z), (w, of_w) = (
        (r * turn, turn**-order / 96 * math.factorial(order) / r**order) for order, r in zip((n, m), radii, strict=True)
    )
    q = (1 + w)[:, None] * (gamma.sqrt() * d[:, None, None] + z) ** 2
    values = torch.exp(-q) if kernel == "gaussian" else 1 / (1 + q)
    want = ((values @ of_z) @ of_w).real * gamma ** (n / 2 - m)
    scale = peak(kernel, n, m) * gamma ** (n / 2 - m)
    assert ((psi(kernel, n, m, d, gamma) - want).abs() <= 1e-11 * scale).all()


def test_peaks_are_as_documented():
    """About half of sqrt(2ⁿ n!) to all of it."""
    for n in range(13):
        assert 0.45 <= peak("gaussian", n, 0) / math.sqrt(2**n * math.factorial(n)) <= 1 + 1e-12


# ---------------------------------------------------------------------------------------------------------- every order


@pytest.mark.parametrize("kernel", ["gaussian", "rational_quadratic"])
@few_and_many
@dtypes
@of_orders
def test_curve(n, m, dtype, count, kernel):
    p = Problem(kernel, count, dtype)
    assert_within(p.call(kaf, n=n, m=m), p.curve(n, m))


@pytest.mark.parametrize("kernel", ["gaussian", "rational_quadratic"])
@few_and_many
@dtypes
@of_orders
def test_gradients(n, m, dtype, count, kernel):
    p = Problem(kernel, count, dtype)
    wanted = p.gradients(n, m)
    got = p.call(kaf_backward, p.grad, n=n, m=m, needs=needs_of(wanted))
    for name, g, w in zip(("x", "alpha", "gamma", "dictionary"), got, wanted, strict=True):
        if w is None:
            assert g.shape == (0,)
        else:
            assert_within(g, w, name)


@pytest.mark.parametrize("kernel", OTHERS)
@few_and_many
@dtypes
def test_kernels_up_to_their_smoothness(kernel, dtype, count):
    """Against the plain operators in float64, themselves tested against autograd."""
    p = Problem(kernel, count, dtype)
    doubled = Problem(kernel, count, F64)
    for name in ("x", "grad", "alpha", "gamma", "dictionary"):
        setattr(doubled, name, getattr(p, name).double())
    for n, m in [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]:
        size = p.rows(p.alpha).abs().sum(1) * p.scale(n, m)[:, 0]
        assert_within(p.call(kaf, n=n, m=m), (doubled.call(plain.kaf, n=n, m=m), size.expand_as(p.x)))
        needs = 2 if n + m == 2 and kernel != "rational_quadratic" else ALL
        got, want = (
            q.call(f, q.grad, n=n, m=m, needs=needs) for q, f in ((p, kaf_backward), (doubled, plain.kaf_backward))
        )
        total, alpha = p.grad.double().abs().sum(0).unsqueeze(1), p.rows(p.alpha).abs()
        sizes = [
            p.grad.double().abs() * (alpha * p.scale(n + 1, m)).sum(1) if needs & 1 else None,
            (total * p.scale(n, m)).expand_as(alpha),
            (total * alpha * p.scale(n, m + 1)).sum(1) if needs & 4 else None,
            total * alpha * p.scale(n + 1, m) if needs & 8 else None,
        ]
        for g, w, size in zip(got, want, sizes, strict=True):
            if size is not None:
                assert_within(g, (w, size))


@pytest.mark.parametrize("kernel", CODES)
def test_any_needs_give_the_same(kernel):
    """Whatever parts are asked for together, though other loops may compute them."""
    for count in (3, 300):
        p = Problem(kernel, count, F64)
        whole = p.call(kaf_backward, p.grad, n=0, m=1, needs=ALL)
        for needs in range(16):
            got = p.call(kaf_backward, p.grad, n=0, m=1, needs=needs)
            for i, (g, w) in enumerate(zip(got, whole, strict=True)):
                if needs & 1 << i:
                    torch.testing.assert_close(g, w, rtol=1e-13, atol=1e-13)
                else:
                    assert g.shape == (0,)


@few_and_many
@pytest.mark.parametrize("gamma", [1e-6, 1e6])
@pytest.mark.parametrize(("n", "m"), SOME, ids=str)
def test_any_scale(n, m, gamma, count):
    """Derivatives by x scale with γ^(n/2), those by γ with γ^−m."""
    p = Problem("gaussian", count, F64)
    want, size = p.curve(n, m)
    p.x, p.dictionary, p.gamma = p.x / gamma**0.5, p.dictionary / gamma**0.5, p.gamma * gamma
    factor = gamma ** (n / 2 - m)
    got = p.call(kaf, n=n, m=m)
    assert ((got - factor * want).abs() <= 1e-11 * factor * size).all()  # x itself is rounded, 5 to 12 times as steep


@few_and_many
@pytest.mark.parametrize(("n", "m"), SOME, ids=str)
def test_uniform_dictionary(n, m, count):
    p = Problem("gaussian", count, F64)
    points = torch.linspace(-2, 2, 9, dtype=F64).expand(3, 9)
    free = kaf(p.x, p.alpha, p.gamma, points, 0.0, n=n, m=m)
    even = kaf(p.x, p.alpha, p.gamma, None, 2.0, n=n, m=m)
    _, size = p.curve(n, m)
    assert ((even - free).abs() <= 1e-13 * size).all()


# -------------------------------------------------------------------------------------------- layouts, dtypes, threads


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "m"), [(1, 0), (0, 1), (7, 1)], ids=str)
def test_layouts(n, m, layout):
    """The layout of x and grad does not change a value by more than roundings of the peak; the result has that of x."""
    draw = torch.Generator().manual_seed(0)
    x, grad = (LAYOUTS[layout](2 * torch.randn(5, 18, 11, 10, generator=draw)) for _ in range(2))
    alpha, gamma = torch.randn(18, 20, generator=draw), torch.full((18,), 1.67)
    arguments = (alpha, gamma, None, 3.0)
    for kernel in ("gaussian", "rational_quadratic"):
        rest = {"kappa": CODES[kernel], "n": n, "m": m}
        got = kaf(x, *arguments, **rest)
        want = kaf(x.contiguous(), *arguments, **rest)
        size = (alpha.abs().sum(1) * peak(kernel, n, m) * 1.67 ** (n / 2 - m)).reshape(18, 1, 1)
        assert ((got - want).abs() <= 8 * 2**-24 * size).all()
        assert got.stride() == torch.empty_like(x).stride()
        got = kaf_backward(grad, x, *arguments, needs=7, **rest)
        want = kaf_backward(grad.contiguous(), x.contiguous(), *arguments, needs=7, **rest)
        assert got[0].stride() == torch.empty_like(x).stride()
        for g, w in zip(got[1:3], want[1:3], strict=True):
            assert ((g - w).abs() <= 1e-5 * w.abs().max()).all()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("kernel", CODES)
def test_half_precision_is_rounded_once(kernel, dtype):
    p = Problem(kernel, 300, F32)
    p.x, p.grad = p.x.to(dtype), p.grad.to(dtype)
    for n, m in [(0, 0), (2, 0), (0, 1)]:
        got = p.call(kaf, n=n, m=m)
        p.x = p.x.float()
        want = p.call(kaf, n=n, m=m)
        p.x = p.x.to(dtype)
        assert got.dtype == dtype
        assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("kernel", CODES)
@few_and_many
def test_shared_rows_gather_the_gradients_of_all_channels(kernel, count):
    p, q = Problem(kernel, count, F64, shared=True), Problem(kernel, count, F64)
    for name in ("alpha", "gamma", "dictionary"):
        setattr(q, name, p.rows(getattr(p, name)).contiguous())
    q.x, q.grad = p.x, p.grad
    assert torch.equal(p.call(kaf, n=1, m=0), q.call(kaf, n=1, m=0))
    got, want = (t.call(kaf_backward, t.grad, n=0, m=1 if CODES[kernel] < 2 else 0, needs=ALL) for t in (p, q))
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-13)
    for g, w in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(g, w.sum(0, keepdim=True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", CODES)
def test_same_bits_for_any_number_of_threads(kernel):
    draw = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(5, 7, 90, 100, generator=draw) for _ in range(2))
    alpha, gamma, dictionary = torch.randn(7, 12, generator=draw), torch.ones(1), torch.randn(1, 12, generator=draw)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            rest = {"needs": ALL, "kappa": CODES[kernel], "n": 1, "m": 0}
            results.append(
                kaf_backward(grad, x, alpha, gamma, dictionary, 0.0, **rest)[: 4 if CODES[kernel] < 2 else 2]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 4), (0,)], ids=str)
def test_no_elements(shape):
    rows = shape[1] if len(shape) > 1 else 1
    alpha, gamma = torch.randn(rows, 4), torch.ones(rows)
    x = torch.empty(shape)
    for kernel in CODES.values():
        assert kaf(x, alpha, gamma, alpha, 0.0, kappa=kernel, n=1).shape == x.shape
        got = kaf_backward(x, x, alpha, gamma, alpha, 0.0, ALL, kappa=kernel)
        assert got[0].shape == x.shape
        for g, p in zip(got[1:], (alpha, gamma, alpha), strict=True):
            assert g.shape == p.shape
            assert not g.any()


# --------------------------------------------------------------------------------------------- not a number, infinity


@pytest.mark.parametrize("kernel", CODES)
@few_and_many
@dtypes
@pytest.mark.parametrize(("n", "m"), [(0, 0), (2, 0), (0, 1), (1, 1), (6, 3)], ids=str)
def test_nan_and_infinity(n, m, dtype, count, kernel):
    if CODES[kernel] > 1 and n + m > 2:
        pytest.skip("not so smooth")
    p = Problem(kernel, count, dtype)
    clean = p.call(kaf, n=n, m=m)
    bad = ((0, 1), (1, 0), (2, 0))
    for at, value in zip(bad, (math.nan, math.inf, -math.inf), strict=True):
        p.x[at] = value
    y = p.call(kaf, n=n, m=m)
    assert y.isnan().nonzero().tolist() == [[0, 1]]
    assert not y[1:3, 0].any()
    untouched = torch.ones_like(y, dtype=torch.bool)
    untouched[0, 1] = untouched[1:3, 0] = False
    assert torch.equal(y[untouched], clean[untouched])
    sums = p.call(kaf_backward, p.grad, n=n, m=m, needs=2)[1]
    assert sums.isnan().all(1).tolist() == sums.isnan().any(1).tolist() == [False, True, False]
    for at in bad:
        p.x[at] = p.grad[at] = 0
    kept = p.call(kaf_backward, p.grad, n=n, m=m, needs=2)[1]
    scale = p.scale(n, m) * p.grad.double().abs().sum(0).unsqueeze(1)
    assert ((sums - kept).abs() <= ROUNDINGS[dtype] * scale)[::2].all()


@pytest.mark.parametrize("kernel", CODES)
def test_nan_and_infinity_in_plain_pytorch(kernel):
    """What is computed where a backend has no kernel, beside what the compiled kernels compute."""
    p = Problem(kernel, 5, F64)
    p.x[0, 1], p.x[1, 0], p.x[2, 0] = math.nan, math.inf, -math.inf
    for n, m in [(0, 0), (1, 0), (0, 1)]:
        y, want = (p.call(f, n=n, m=m) for f in (plain.kaf, kaf))
        assert y[:3].flatten()[[1, 3, 6]].nan_to_num(nan=7).tolist() == [7, 0, 0]
        torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9, equal_nan=True)
        got, want = (p.call(f, p.grad, n=n, m=m, needs=3) for f in (plain.kaf_backward, kaf_backward))
        torch.testing.assert_close(got[:2], want[:2], rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("kernel", CODES)
@few_and_many
@pytest.mark.parametrize("name", ["alpha", "gamma", "dictionary"])
def test_nan_in_a_parameter_reaches_its_channel_only(kernel, count, name):
    p = Problem(kernel, count, F32)
    getattr(p, name)[1] = math.nan
    for y in (p.call(kaf, n=0, m=0), p.call(kaf, n=1, m=0), p.call(kaf_backward, p.grad, n=0, m=0, needs=1)[0]):
        assert y.isnan().all(0).tolist() == y.isnan().any(0).tolist() == [False, True, False]


# ----------------------------------------------------------------------------------------------------------- refusals


def arguments() -> dict:
    return {
        "x": torch.zeros(2, 3),
        "alpha": torch.zeros(3, 4),
        "gamma": torch.ones(3),
        "dictionary": None,
        "boundary": 3.0,
    }


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("x must be a float32, float64, bfloat16 or float16 tensor on the CPU, got [2, 3], int64, on cpu",
         {"x": torch.zeros(2, 3, dtype=torch.int64)}),
        ("alpha must be a float32 or float64 tensor [C, D] or [1, D] on the CPU, got [3, 4], float16, on cpu",
         {"alpha": torch.zeros(3, 4).half()}),
        ("alpha must be a float32 or float64 tensor [C, D] or [1, D] on the CPU, got [3], float32",
         {"alpha": torch.zeros(3)}),
        ("gamma must be a float32 or float64 tensor [C] or [1] on the CPU, got [3, 1], float32",
         {"gamma": torch.ones(3, 1)}),
        ("dictionary must be a float32 or float64 tensor [C, D] or [1, D] on the CPU, got [4], float32",
         {"dictionary": torch.zeros(4)}),
        ("alpha must have one row per channel of x (dimension 1) or a single row, got alpha [2, 4] for x [2, 3]",
         {"alpha": torch.zeros(2, 4)}),
        ("gamma must have one row per channel of x (dimension 1) or a single row, got gamma [3] for x [3]",
         {"x": torch.zeros(3), "alpha": torch.zeros(1, 4)}),
        ("alpha must have at least one coefficient per channel, got [3, 0]", {"alpha": torch.zeros(3, 0)}),
        ("dictionary and alpha must have the same number of points D, got dictionary [3, 5] and alpha [3, 4]",
         {"dictionary": torch.zeros(3, 5)}),
        ("boundary must be a positive finite number, got 0", {"boundary": 0.0}),
        ("boundary must be a positive finite number, got inf", {"boundary": math.inf}),
        ("boundary must be a positive finite number, got nan", {"boundary": math.nan}),
        ("kernel must be a code from 0 to 3, got 4", {"kappa": 4}),
        ("base must be a code from 0 to 4, got -1", {"base": -1}),
        ("n and m, the orders of differentiation, must not be negative, got n = -1 and m = 0", {"n": -1}),
        ("kafops offers derivatives up to n + 2m = 12, got n = 11 and m = 1 for the curve", {"n": 11, "m": 1}),
        ("kafops offers derivatives up to n + 2m = 12, got n = 13 and m = 0 for the curve", {"n": 13, "kappa": 1}),
        ("kernel 'matern32' was to be differentiated n = 2 times in x or its dictionary and m = 1 times in gamma, "
         "but it has no more than 2 derivatives (n + m ≤ 2)", {"n": 2, "m": 1, "kappa": 2}),
        ("kernel 'bspline' was to be differentiated n = 3 times", {"n": 3, "kappa": 3}),
    ],
)  # fmt: skip
def test_refused(message, changed):
    with torch._C._AutoDispatchBelowAutograd(), pytest.raises(RuntimeError) as caught:
        kaf(**arguments() | changed)
    assert str(caught.value).startswith(message)


def test_refused_of_other_devices():
    """Where the CPU kernel is what is called: the words are tested for a tensor that cannot be read."""
    meta = torch.zeros(3, 4, device="meta")
    with pytest.raises((RuntimeError, ValueError), match=r"meta"):
        kaf(**arguments() | {"alpha": meta})


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("grad must have the shape, dtype and device of x, [2, 3], float32, on cpu, got [2, 2], float32, on cpu",
         {"grad": torch.zeros(2, 2)}),
        ("got [2, 3], float64, on cpu", {"grad": torch.zeros(2, 3, dtype=F64)}),
        ("got n = 13 and m = 0 for the gradient of x", {"n": 12, "needs": 3}),
        ("got n = 11 and m = 1 for the gradient of gamma", {"n": 11, "needs": 4}),
        ("got n = 13 and m = 0 for the gradient of dictionary", {"n": 12, "needs": 8, "dictionary": torch.zeros(1, 4)}),
        ("but it has no more than 2 derivatives (n + m ≤ 2), for the gradient of x", {"n": 2, "needs": 1, "kappa": 3}),
    ],
)  # fmt: skip
def test_refused_of_gradients(message, changed):
    with torch._C._AutoDispatchBelowAutograd(), pytest.raises(RuntimeError) as caught:
        kaf_backward(**{"grad": torch.zeros(2, 3), "needs": 15} | arguments() | changed)
    assert message in str(caught.value)


def test_only_parts_that_are_asked_for_count():
    p = Problem("gaussian", 3, F64)
    assert p.call(kaf_backward, p.grad, n=12, m=0, needs=2)[1].shape == (3, 9)
    assert p.call(kaf_backward, p.grad, n=11, m=0, needs=1 + 2 + 8)[3].shape == (3, 9)
    p = Problem("bspline", 3, F64)
    assert p.call(kaf_backward, p.grad, n=1, m=1, needs=2)[1].shape == (3, 9)
