import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kafops
from kafops import reference
from kafops.bounds import curve_bounds, slope_bounds, value_bounds

F64 = torch.float64
LONG = np.longdouble
INF = math.inf
KERNELS = ("gaussian", "rational_quadratic", "matern32", "bspline")
TIGHT = 1e-11  # what the docstrings promise, as a multiple of Σ|α|, of slopes sqrt(γ) Σ|α|
PEAK_SLOPES = {  # the largest |κ′|: at 1/√2, 1/√3, 1/√2, and 2/3 of a knot spacing sqrt(3/2)
    "gaussian": math.sqrt(2 / math.e),
    "rational_quadratic": 3 * math.sqrt(3) / 8,
    "matern32": math.sqrt(2) / math.e,
    "bspline": math.sqrt(2 / 3),
}
BOUNDS = (value_bounds, slope_bounds)


def f64(*values):
    return torch.tensor(values, dtype=F64)


def definition(kernel, u, order):
    """κ(u) or, for order 1, κ′(u)."""
    if kernel == "gaussian":
        return np.exp(-u * u) * (-2 * u if order else 1)
    if kernel == "rational_quadratic":
        return -2 * u / (1 + u * u) ** 2 if order else 1 / (1 + u * u)
    if kernel == "matern32":
        s = np.sqrt(LONG(2)) * abs(u)
        return -2 * u * np.exp(-s) if order else (1 + s) * np.exp(-s)
    h = np.sqrt(LONG(1.5))
    w, rest = abs(u) / h, np.maximum(2 - abs(u) / h, 0)
    if order:
        return np.sign(u) / h * np.where(w < 1, w * (LONG(2.25) * w - 3), LONG(-0.75) * rest**2)
    return np.where(w < 1, 1 - LONG(1.5) * w**2 + LONG(0.75) * w**3, rest**3 / 4)


def curve(kernel, x, alpha, gamma, points, order):
    """Values or slopes of one curve at x [M], in extended precision."""
    root = np.sqrt(LONG(gamma))
    return alpha @ definition(kernel, root * (x - points[:, None]), order) * (root if order else 1)


def supremum_found(kernel, alpha, gamma, points, order, lower=-INF, upper=INF):
    """The largest value or slope on a fine grid, improved around the best x; the limit 0 counts on ℝ."""
    unit = 1 / np.sqrt(LONG(gamma))
    near, away = np.arange(0, 7, 0.02), 7 * 1.03 ** np.arange(300 if kernel == "rational_quadratic" else 60)
    offsets = np.concatenate([near, away]).astype(LONG) * unit
    x = np.concatenate([points[0] - offsets, points[-1] + offsets, *(p + near[near < 1] * unit for p in points)])
    x = np.concatenate([x, *(np.linspace(a, b, 60) for a, b in itertools.pairwise(points))])
    x = np.unique(np.clip(x, lower if lower > -INF else None, upper if upper < INF else None))
    found = curve(kernel, x, alpha, gamma, points, order)
    i = int(found.argmax())
    best, at, step = found[i], x[i], max(np.diff(x[max(i - 1, 0) : i + 2]), default=LONG(0))
    for _ in range(9):
        x = np.clip(at + step * np.linspace(LONG(-1), LONG(1), 41), x.min(), x.max())
        found = curve(kernel, x, alpha, gamma, points, order)
        best, at, step = max(best, found.max()), x[found.argmax()], step / 8
    return best if math.isfinite(lower) and math.isfinite(upper) else max(best, LONG(0))


def assert_certified(alpha, gamma, boundary, kernel, lower=-INF, upper=INF):
    """Compare one curve's bounds with what a search in extended precision finds."""
    if isinstance(boundary, torch.Tensor):
        points = np.sort(boundary[0].numpy().astype(LONG))
        weights = alpha[0][boundary[0].argsort(stable=True)].numpy().astype(LONG)
    else:
        size = alpha.shape[1]
        points = np.linspace(-LONG(boundary), LONG(boundary), size) if size > 1 else np.zeros(1, LONG)
        weights = alpha[0].numpy().astype(LONG)
    scale = alpha.abs().sum().item()
    for order, bounds in enumerate(BOUNDS):
        minimum, maximum = (t.item() for t in bounds(alpha, gamma, boundary, lower, upper, kernel))
        most = supremum_found(kernel, weights, gamma.item(), points, order, lower, upper)
        least = -supremum_found(kernel, -weights, gamma.item(), points, order, lower, upper)
        # 1e-17: rounding of the search itself, in numbers of 64 bits
        unit = scale * (math.sqrt(gamma.item()) if order else 1)
        assert -1e-17 <= (maximum - most) / unit <= TIGHT, (order, "maximum")
        assert -1e-17 <= (least - minimum) / unit <= TIGHT, (order, "minimum")


def random_curve(size, spacing, boundary=3.0, seed=0):
    """alpha [1, D], gamma [1] with γΔ² = spacing, and a free dictionary around the even one."""
    draw = torch.Generator().manual_seed(seed)
    step = 2 * boundary / (size - 1) if size > 1 else boundary
    alpha = 0.3 * torch.randn(1, size, generator=draw, dtype=F64)
    noise = 0.3 * step * torch.randn(1, size, generator=draw, dtype=F64)
    points = torch.linspace(-boundary, boundary, size, dtype=F64) if size > 1 else torch.zeros(1, dtype=F64)
    return alpha, f64(spacing / step**2), points + noise


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("alpha", [2.0, -0.5])
def test_one_point_by_hand(kernel, alpha):
    gamma = f64(0.7)
    value, slope, lipschitz = curve_bounds(f64([alpha]), gamma, 3.0, kernel=kernel)
    steepest = abs(alpha) * math.sqrt(0.7) * PEAK_SLOPES[kernel]
    assert value.minimum.item() == pytest.approx(min(alpha, 0), rel=1e-14, abs=0)
    assert value.maximum.item() == pytest.approx(max(alpha, 0), rel=1e-14, abs=0)
    for got, wanted in ((slope.minimum, -steepest), (slope.maximum, steepest), (lipschitz, steepest)):
        assert got.dtype == F64
        assert got.shape == (1,)
        assert got.item() == pytest.approx(wanted, abs=TIGHT * steepest)


def test_two_equal_points_by_hand():
    # f = exp(-(x - 2)²) + exp(-(x + 2)²): the maximum is near ±2, exp(-16) higher, and f(0) = 2 exp(-4).
    alpha, gamma = f64([1.0, 1.0]), f64(1.0)
    _, maximum = value_bounds(alpha, gamma, 2.0)
    assert 1 + math.exp(-16) < maximum.item() < 1 + 1.0001 * math.exp(-16)
    minimum, _ = value_bounds(alpha, gamma, 2.0, -2.0, 2.0)
    assert minimum.item() == pytest.approx(2 * math.exp(-4), abs=TIGHT * 2)


def test_a_curve_below_0_has_the_limit_0_as_its_supremum():
    alpha = -torch.rand(5, 20, dtype=F64) - 0.1
    for kernel in KERNELS:
        _, maximum = value_bounds(alpha, f64(1.7), 3.0, kernel=kernel)
        assert (maximum == 0).all()
        _, maximum = value_bounds(alpha, f64(1.7), 3.0, -3.0, 3.0, kernel=kernel)
        assert (maximum < -0.09).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("size", "spacing"), [(1, 0.5), (2, 8.0), (5, 0.5), (20, 1 / 6), (20, 2.0), (33, 1 / 8), (33, 8.0)]
)
def test_bounds_are_those_that_a_search_finds(kernel, size, spacing):
    alpha, gamma, dictionary = random_curve(size, spacing)
    for boundary in (3.0, dictionary):
        assert_certified(alpha, gamma, boundary, kernel)
        assert_certified(alpha, gamma, boundary, kernel, -1.3, 0.4)
    assert_certified(alpha, gamma, dictionary, kernel, 0.9, INF)


@pytest.mark.parametrize("size", [128])
@pytest.mark.parametrize("spacing", [1 / 8, 8.0])
def test_many_points(size, spacing):
    alpha, gamma, _ = random_curve(size, spacing)
    assert_certified(alpha, gamma, 3.0, "gaussian", -1.0, 1.0)


@pytest.mark.parametrize("target", ["relu", "tanh", "identity"])
def test_ridge_fits_of_large_coefficients(target):
    layer = kafops.KAF(1, init=target)
    assert layer.alpha.abs().max() > 5
    assert_certified(layer.alpha.detach().double(), layer.gamma.double(), 3.0, "gaussian")
    assert_certified(layer.alpha.detach().double(), layer.gamma.double(), 3.0, "gaussian", -0.5, 2.0)


@pytest.mark.parametrize("boundary", [1e-90, 1e-3, 3.0, 1e4, 1e90])
def test_isometric_curves_on_any_scale(boundary):
    torch.manual_seed(0)
    layer = kafops.KAF(1, init="isometric", dtype=F64)
    assert_certified(layer.alpha.detach(), layer.gamma * (3 / boundary) ** 2, boundary, "gaussian")


@pytest.mark.parametrize("kernel", KERNELS)
def test_repeated_points_are_one(kernel):
    gamma, alpha = f64(1.3), f64([0.5, 0.25, -1.0, 2.0])
    repeated = curve_bounds(alpha, gamma, f64([1.0, -0.4, 1.0, 1.0]), -1.0, 2.0, kernel)
    once = curve_bounds(f64([1.5, 0.25]), gamma, f64([1.0, -0.4]), -1.0, 2.0, kernel)
    for a, b in zip((*repeated.value, *repeated.slope), (*once.value, *once.slope), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2 * TIGHT * 3.75 * math.sqrt(1.3))


@pytest.mark.parametrize("kernel", KERNELS)
def test_dictionary_may_be_in_any_order_and_the_uniform_one_given_as_points(kernel):
    torch.manual_seed(1)
    alpha, gamma = torch.randn(3, 20, dtype=F64), f64(0.4, 1.7, 9.0)
    points, order = torch.linspace(-3, 3, 20, dtype=F64)[None], torch.randperm(20)
    uniform = curve_bounds(alpha, gamma, 3.0, kernel=kernel)
    free = curve_bounds(alpha, gamma, points, kernel=kernel)
    shuffled = curve_bounds(alpha[:, order], gamma, points[:, order], kernel=kernel)
    assert all(
        torch.equal(a, b) for a, b in zip((*free.value, *free.slope), (*shuffled.value, *shuffled.slope), strict=True)
    )
    atol = 2 * TIGHT * alpha.abs().sum(1).max().item() * 3
    torch.testing.assert_close(tuple(uniform.value), tuple(free.value), rtol=0, atol=atol)
    torch.testing.assert_close(tuple(uniform.slope), tuple(free.slope), rtol=0, atol=atol)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mirrored_curves_and_multiples(kernel):
    torch.manual_seed(2)
    alpha, gamma = torch.randn(4, 7, dtype=F64), f64(0.9)
    value, slope, _ = curve_bounds(alpha, gamma, 2.0, -0.5, 1.5, kernel)
    mirrored, mirrored_slope, _ = curve_bounds(alpha.flip(1), gamma, 2.0, -1.5, 0.5, kernel)
    negative, negative_slope, _ = curve_bounds(-4 * alpha, gamma, 2.0, -0.5, 1.5, kernel)
    atol = 2 * TIGHT * alpha.abs().sum(1).max().item()
    torch.testing.assert_close(tuple(mirrored), tuple(value), rtol=0, atol=atol)
    torch.testing.assert_close(mirrored_slope.maximum, -slope.minimum, rtol=0, atol=atol)
    torch.testing.assert_close(negative.maximum, -4 * value.minimum, rtol=0, atol=4 * atol)
    torch.testing.assert_close(negative_slope.minimum, -4 * slope.maximum, rtol=0, atol=4 * atol)


@pytest.mark.parametrize("kernel", KERNELS)
def test_points_far_apart_are_curves_of_their_own(kernel):
    # Between the two groups the kernels are below TIGHT, the rational quadratic too: 1 / (1 + 1e14).
    gamma, group = f64(1.0), f64([0.3, -1.0, 0.8])
    points = f64([-0.4, 0.0, 1.0])
    both = curve_bounds(
        torch.cat([group, -2 * group], 1), gamma, torch.cat([points - 1e7, points + 1e7], 1), kernel=kernel
    )
    one = curve_bounds(group, gamma, points, kernel=kernel)
    atol = 3 * TIGHT * 3 * group.abs().sum().item()
    maximum, minimum = (
        torch.maximum(one.value.maximum, -2 * one.value.minimum),
        torch.minimum(one.value.minimum, -2 * one.value.maximum),
    )
    torch.testing.assert_close(tuple(both.value), (minimum, maximum), rtol=0, atol=atol)
    torch.testing.assert_close(both.lipschitz, 2 * one.lipschitz, rtol=0, atol=atol)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gamma", [1e-300, 1e-30, 1e25, 1e300])
def test_huge_and_tiny_bandwidths(kernel, gamma):
    """Wide kernels are one kernel of weight Σα; narrow ones stand alone, although no float64 lies within them."""
    alpha = f64([1.0, -3.0, 0.5, 2.5, 1.0])
    value, slope, lipschitz = curve_bounds(alpha, f64(gamma), 3.0, kernel=kernel)
    root = math.sqrt(gamma)
    least, most, steepest = (0.0, 2.0, 2.0) if gamma < 1 else (-3.0, 2.5, 3.0)
    assert value.minimum.item() == pytest.approx(least, abs=TIGHT * 8)
    assert value.maximum.item() == pytest.approx(most, abs=TIGHT * 8)
    assert lipschitz.item() == pytest.approx(steepest * PEAK_SLOPES[kernel] * root, rel=TIGHT * 8)
    assert slope.maximum.item() == pytest.approx(steepest * PEAK_SLOPES[kernel] * root, rel=TIGHT * 8)
    # An interval of two neighbouring floats has all of the narrow kernel at 0, and nothing of the wide one's slope.
    at_0 = curve_bounds(alpha, f64(gamma), 3.0, 0.0, 5e-324, kernel=kernel)
    assert at_0.value.maximum.item() == pytest.approx(0.5 if gamma > 1 else 2.0, abs=TIGHT * 8)


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_and_small_coefficients(kernel):
    base = f64([1.0, -0.7, 0.2])
    wanted = curve_bounds(base, f64(2.0), 1.0, kernel=kernel)
    for factor in (1e-310, 1e-200, 1e200):
        got = curve_bounds(factor * base, f64(2.0), 1.0, kernel=kernel)
        rtol = 1e-9 if factor > 1e-300 else 1e-12 / 1e-14  # there are no more than 1e14 subnormal numbers below
        torch.testing.assert_close(got.value.maximum, factor * wanted.value.maximum, rtol=rtol, atol=0)
        assert (got.value.maximum >= factor * (wanted.value.maximum - 1e-10)).all()
        assert got.lipschitz.isfinite().all()


def test_curves_that_are_0():
    value, slope, lipschitz = curve_bounds(torch.zeros(3, 20), torch.ones(1), 3.0)
    for t in (*value, *slope, lipschitz):
        assert torch.equal(t, torch.zeros(3, dtype=F64))


@pytest.mark.parametrize("kernel", KERNELS)
def test_intervals_of_one_point(kernel):
    alpha, gamma, dictionary = random_curve(9, 0.5, seed=3)
    x = torch.cat([dictionary[0], f64(-7.0, 0.1, 2.0, 1e5)])
    rows = [t.expand(len(x), -1) for t in (alpha, dictionary)]
    for order, bounds in enumerate(BOUNDS):
        minimum, maximum = bounds(rows[0], gamma, rows[1], x, x, kernel)
        exact = curve(
            kernel, x.numpy().astype(LONG), alpha[0].numpy(), gamma.item(), dictionary[0].numpy().astype(LONG), order
        )
        exact = torch.from_numpy(exact.astype(np.float64))
        unit = alpha.abs().sum() * (gamma.sqrt() if order else 1)
        assert (minimum <= exact).all()
        assert (maximum >= exact).all()
        assert ((maximum - minimum) / unit <= 2 * TIGHT).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_rounding_of_the_sum_is_allowed_for(kernel):
    """Of a thousand intervals of one point, where nothing but the allowance covers a sum that came out too small."""
    draw = torch.Generator().manual_seed(0)
    alpha = torch.randn(1000, 20, generator=draw, dtype=F64)
    x = 3 * torch.randn(1000, generator=draw, dtype=F64)
    points = torch.linspace(-3, 3, 20, dtype=F64)[None]
    at, even = x.numpy().astype(LONG), points[0].numpy().astype(LONG)
    for order, bounds in enumerate(BOUNDS):
        terms = definition(kernel, at[:, None] - even, order)
        minimum, maximum = (t.numpy().astype(LONG) for t in bounds(alpha, f64(1.0), points, x, x, kernel))
        exact = (alpha.numpy().astype(LONG) * terms).sum(1)
        assert (minimum <= exact).all()
        assert (maximum >= exact).all()


@pytest.mark.parametrize("size", [8, 20])
def test_even_points_lie_where_no_float64_does(size):
    """Kernels narrower than float64 is fine: within 1e-15 of a point a curve rises from 0 to its height."""
    gamma, boundary = 1e28, 3.0
    points = [Fraction(boundary) * (2 * k - size + 1) / (size - 1) for k in range(size)]
    x = np.concatenate([float(p) + np.spacing(float(p)) * np.arange(-8, 9) for p in points])
    z = np.array([[float((Fraction(at) - p) * Fraction(math.sqrt(gamma))) for p in points] for at in x])
    rows = torch.from_numpy(x)
    for sign in (1.0, -1.0):
        alpha = torch.full((1, size), sign, dtype=F64)
        for order, bounds in enumerate(BOUNDS):
            minimum, maximum = bounds(alpha.expand(len(x), -1), f64(gamma), boundary, rows, rows)
            exact = torch.from_numpy(sign * definition("gaussian", z, order).sum(1)) * (gamma**0.5 if order else 1)
            assert (minimum <= exact).all()
            assert (maximum >= exact).all()


# Cells whose curve is a parabola about their middle, with no linear part: lowest there, and largest at both ends.
@pytest.mark.parametrize("kernel", ["matern32", "bspline", "gaussian", "rational_quadratic"])
@pytest.mark.parametrize("gamma", [1.0, 3.0, 4.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("middle", "half"), [(0.7109375, 0.03125), (0.1875, 0.125)])
def test_intervals_whose_curve_is_even(kernel, gamma, sign, middle, half):
    points = f64(-1.0, middle, 1.0)[None]  # the point in the middle is where cells may start, and weighs nothing
    assert_certified(sign * f64(1.0, 0.0, 1.0)[None], f64(gamma), points, kernel, -half, half)


@pytest.mark.parametrize("half", [1e-3, 1e-5, 0.05])
def test_intervals_around_the_steepest_point(half):
    steepest = math.sqrt(2 / 3)
    assert_certified(f64([1.0]), f64(1.0), 3.0, "bspline", steepest - half, steepest + half)


def test_intervals_at_infinity():
    alpha = torch.randn(3, 20, dtype=F64)
    for lower, upper in ((INF, INF), (-INF, -INF), (1e300, INF)):
        for t in (*value_bounds(alpha, f64(1.0), 3.0, lower, upper), *slope_bounds(alpha, f64(1.0), 3.0, lower, upper)):
            assert (t.abs() <= TIGHT * alpha.abs().sum(1)).all()
    everywhere = curve_bounds(alpha, f64(1.0), 3.0)
    for lower, upper in ((-INF, INF), (None, INF), (-1e300, None)):
        assert torch.equal(curve_bounds(alpha, f64(1.0), 3.0, lower, upper).lipschitz, everywhere.lipschitz)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_interval_for_each_channel_and_shared_rows(kernel):
    torch.manual_seed(4)
    alpha, gamma = torch.randn(1, 6, dtype=F64), f64(0.5, 3.0, 0.5)
    dictionary = torch.randn(3, 6, dtype=F64)
    lower, upper = f64(-1.0, 0.2, -INF), f64(0.0, 0.3, 2.0)
    together = curve_bounds(alpha, gamma, dictionary, lower, upper, kernel)
    for c in range(3):
        alone = curve_bounds(alpha, gamma[c : c + 1], dictionary[c : c + 1], lower[c].item(), upper[c : c + 1], kernel)
        for a, b in zip((*together.value, *together.slope), (*alone.value, *alone.slope), strict=True):
            torch.testing.assert_close(a[c : c + 1], b, rtol=0, atol=2 * TIGHT * alpha.abs().sum().item() * 2)


@settings(deadline=None, max_examples=60)
@given(
    kernel=st.sampled_from(KERNELS),
    terms=st.lists(st.tuples(st.floats(-100, 100), st.floats(-10, 10)), min_size=1, max_size=6),
    gamma=st.floats(1e-4, 1e4),
    ends=st.lists(st.floats(-12, 12), min_size=4, max_size=4).map(sorted),
)
def test_bounds_hold_and_shrink_with_the_interval(kernel, terms, gamma, ends):
    alpha, points = (torch.tensor([column], dtype=F64) for column in zip(*terms, strict=True))
    outer, inner = (curve_bounds(alpha, f64(gamma), points, *pair, kernel) for pair in (ends[::3], ends[1:3]))
    x = np.linspace(LONG(ends[1]), LONG(ends[2]), 200)
    for order in range(2):
        unit = alpha.abs().sum().item() * (math.sqrt(gamma) if order else 1)
        found = curve(kernel, x, alpha[0].numpy(), gamma, points[0].numpy().astype(LONG), order)
        assert inner[order].minimum.item() <= found.min() + 1e-17 * unit
        assert inner[order].maximum.item() >= found.max() - 1e-17 * unit
        assert outer[order].minimum.item() <= inner[order].minimum.item() + TIGHT * unit
        assert outer[order].maximum.item() >= inner[order].maximum.item() - TIGHT * unit


def test_no_channels():
    for boundary in (3.0, torch.zeros(0, 5)):
        value, slope, lipschitz = curve_bounds(torch.zeros(0, 5), torch.ones(1), boundary, torch.zeros(0), 1.0)
        assert all(t.shape == (0,) for t in (*value, *slope, lipschitz))


def test_gradients_do_not_flow_and_arguments_stay():
    layer = kafops.KAF(2, learn_gamma=True, learn_dictionary=True)
    before = [p.clone() for p in layer.parameters()]
    assert not layer.bounds().lipschitz.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


@pytest.mark.parametrize("options", [{}, {"learn_gamma": True}, {"learn_dictionary": True}])
def test_layer(options):
    torch.manual_seed(5)
    layer = kafops.KAF(4, 9, 2.0, gamma=f64(0.5, 1.0, 2.0, 4.0), **options)
    if layer.dictionary is not None:
        layer.dictionary.data += 0.2 * torch.randn(4, 9)
    points = 2.0 if layer.dictionary is None else layer.dictionary
    got = layer.bounds(-1.0, f64(0.0, 1.0, 2.0, INF))
    wanted = curve_bounds(layer.alpha, layer.bandwidths(), points, -1.0, f64(0.0, 1.0, 2.0, INF))
    assert all(torch.equal(a, b) for a, b in zip((*got.value, *got.slope), (*wanted.value, *wanted.slope), strict=True))
    assert torch.equal(got.lipschitz, torch.maximum(got.slope.maximum, -got.slope.minimum))
    # The function that the layer computes, in float64.
    value, slope, _ = layer.bounds()
    x = torch.linspace(-6, 6, 4001, dtype=F64)[:, None].expand(-1, 4).contiguous().requires_grad_()
    y = reference.kaf_free(x, layer.alpha.double(), layer.bandwidths().double(), layer.points().double())
    (dy,) = torch.autograd.grad(y.sum(), x)
    # The reference has the even points rounded to float32.
    slack = 1e-6 * layer.alpha.abs().sum(1)
    for (minimum, maximum), t in ((value, y), (slope, dy)):
        assert (t.amin(0) >= minimum - slack).all()
        assert (t.amin(0) <= minimum + 1e-3).all()
        assert (t.amax(0) <= maximum + slack).all()
        assert (t.amax(0) >= maximum - 1e-3).all()


def test_shared_layer_has_one_bound():
    assert kafops.KAF(1).bounds().lipschitz.shape == (1,)


def test_a_layer_without_channels_yet_says_so():
    with pytest.raises(RuntimeError, match="before its first call"):
        kafops.LazyKAF1d().bounds()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layers_with_coefficients_in_half_precision(dtype):
    layer = kafops.KAF(4, dtype=dtype)
    wide = kafops.KAF(4)
    wide.alpha.data.copy_(layer.alpha)  # exactly
    wide.gamma.copy_(layer.gamma)
    for got, wanted in zip(layer.bounds(-2, 2).slope, wide.bounds(-2, 2).slope, strict=True):
        assert torch.equal(got, wanted)


GOOD = {"alpha": torch.ones(3, 5), "gamma": torch.ones(3), "boundary": 3.0, "lower": -1.0, "upper": 1.0}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"alpha": [1.0]}, TypeError, "alpha must be a torch.Tensor, got list"),
        (
            {"alpha": torch.ones(3, 5, dtype=torch.int32)},
            TypeError,
            "alpha must be float32, float64, bfloat16 or float16, got dtype torch.int32",
        ),
        ({"alpha": torch.ones(5)}, ValueError, r"alpha must have shape \[C, D\] or \[1, D\], got \[5\]"),
        ({"alpha": torch.ones(3, 0)}, ValueError, "at least one coefficient"),
        ({"alpha": torch.full((3, 5), math.nan)}, ValueError, "alpha must be finite, got nan"),
        ({"gamma": torch.ones(3, 1)}, ValueError, r"gamma must have shape \[C\] or \[1\], got \[3, 1\]"),
        (
            {"gamma": torch.ones(2)},
            ValueError,
            "one row per channel or a single row, got rows {'alpha': 3, 'gamma': 2}",
        ),
        ({"gamma": f64(1.0, 0.0, 1.0)}, ValueError, "gamma must be positive, got 0.0"),
        ({"gamma": f64(1.0, INF, 1.0)}, ValueError, "gamma must be finite, got inf"),
        ({"boundary": "3"}, TypeError, "boundary must be a number between .* or a dictionary tensor, got str"),
        ({"boundary": True}, TypeError, "got bool"),
        ({"boundary": -1.0}, ValueError, "boundary must be .*, got boundary=-1.0"),
        ({"boundary": math.nan}, ValueError, "got boundary=nan"),
        (
            {"boundary": torch.ones(3, 4)},
            ValueError,
            r"same number of points D, got boundary \[3, 4\] and alpha \[3, 5\]",
        ),
        ({"boundary": torch.full((1, 5), INF)}, ValueError, r"boundary \(a dictionary\) must be finite, got inf"),
        ({"lower": "a"}, TypeError, "lower must be None, a number, .* got str"),
        ({"lower": torch.zeros(3, dtype=torch.int64)}, TypeError, "lower must be .* got dtype torch.int64"),
        ({"upper": torch.ones(2)}, ValueError, r"upper must be .*\[C\] = \[3\] or \[1\], got shape \[2\]"),
        ({"upper": math.nan}, ValueError, "upper must be .* got nan"),
        (
            {"upper": f64(1.0, -2.0, 1.0)},
            ValueError,
            "lower must not exceed upper, got lower=-1.0 and upper=-2.0 in channel 1",
        ),
        ({"kernel": "cubic"}, ValueError, "kernel must be one of 'gaussian', .* got 'cubic'"),
        ({"kernel": None}, TypeError, "kernel must be a string, got NoneType"),
    ],
)
def test_wrong_arguments_are_named(wrong, error, message):
    for bounds in (value_bounds, slope_bounds, curve_bounds):
        with pytest.raises(error, match=message):
            bounds(**{**GOOD, **wrong})


def test_thousands_of_points():
    alpha = torch.randn(2, 3, dtype=F64)
    points = f64([-1.0, 0.0, 2.0])
    many = curve_bounds(alpha.repeat(1, 700) / 700, f64(1.0), points.repeat(1, 700))
    torch.testing.assert_close(
        tuple(many.value), tuple(curve_bounds(alpha, f64(1.0), points).value), rtol=0, atol=2 * TIGHT * 8
    )
