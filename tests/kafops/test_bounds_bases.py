"""Bounds of curves on a base: what is taken for granted of bases at 40 digits, searches, and by hand."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kafops
from kafops import bases, kernels
from kafops.bounds import CurveRanges, curve_bounds, slope_bounds, value_bounds
from kafops.bounds.bases import BENEATH
from kafops.bounds.cells import partition, polynomials
from kafops.bounds.curves import normalised

F64 = torch.float64
INF = math.inf
ROUNDOFF = 2.0**-53
BASES = ("identity", "relu", "silu", "gelu")
KERNELS = ("gaussian", "rational_quadratic", "matern32", "bspline")
TIGHT = 1e-11  # what the docstrings promise, as a multiple of Σ|α| + 1 + |x|, of slopes sqrt(γ) Σ|α| + 1
NEAR = 3e-4  # of CurveRanges, as a multiple of the same
SILU_TURN, GELU_TURN = "-1.278464542761073795109358739022980155439477488619745", "-0.7517915246935645745"

of_bases = pytest.mark.parametrize("base", BASES)
of_kernels = pytest.mark.parametrize("kernel", KERNELS)


def f64(*values):
    return torch.tensor(values, dtype=F64)


def definition(name, x):
    """The base in mpmath."""
    if name == "identity":
        return mpmath.mpf(x)
    if name == "relu":
        return max(mpmath.mpf(x), mpmath.mpf(0))
    return x / (1 + mpmath.exp(-x)) if name == "silu" else x * mpmath.ncdf(x)


def f(x, alpha, gamma, points, kernel, base, order):
    """One curve, or its slope, at x [M] in float64."""
    root = math.sqrt(gamma)
    k = kernels.value(kernel, root * (x[:, None] - points), order)
    return (alpha * k).sum(1) * (root if order else 1) + bases.value(base, x, order)


def size(alpha, gamma, order, *ends):
    """What bounds are exact to a part of."""
    x = max((abs(e) for e in ends if math.isfinite(e)), default=0.0)
    return alpha.abs().sum().item() * (math.sqrt(gamma) if order else 1) + 1 + (0 if order else x)


# ------------------------------------------------------------------------------------------------ bases in themselves


@pytest.mark.parametrize("name", BENEATH)
def test_terms_are_derivatives_and_round_as_promised(name):
    base, half = BENEATH[name], 0.25
    for x in (-41.9, -12.3, -3.07, -1.0, -0.13, 0.0, 0.25, 1.4, 2.39, 6.01, 9.7, 20.0, 41.6):
        got = base.terms(f64(x))[0].tolist()
        with mpmath.workdps(60):
            wanted = mpmath.taylor(lambda v: definition(name, v), mpmath.mpf(x), base.size - 1)
            errors = [abs(g - w) for g, w in zip(got, wanted, strict=True)]
            # Lines count as bases where they begin.
            allowed = 400 * ROUNDOFF * (1 + abs(x)) + (1e-15 if abs(x) >= base.far else 0)
            assert sum(e * half**k for k, e in enumerate(errors)) <= allowed
            allowed = 400 * ROUNDOFF + (1e-15 if abs(x) >= base.far else 0)
            assert sum(k * e * half ** (k - 1) for k, e in enumerate(errors) if k) <= allowed
            assert sum(abs(w) * half**k for k, w in enumerate(wanted)) <= 4 * (1 + abs(x))
            assert sum(k * abs(w) * half ** (k - 1) for k, w in enumerate(wanted) if k) <= 4


@pytest.mark.parametrize("name", BENEATH)
def test_remainders(name):
    """Of exact terms, also a little beyond the cell, as cells may overlap."""
    base = BENEATH[name]
    for x in (-41.75, -9.75, -2.25, -0.75, -0.25, 0.25, 0.75, 1.25, 3.75, 9.75, 41.75):
        with mpmath.workdps(60):
            terms = mpmath.taylor(lambda v: definition(name, v), mpmath.mpf(x), base.size - 1)
            for w in map(mpmath.mpf, (-0.2502, -0.2, 0.11, 0.2502)):
                value = sum(t * w**k for k, t in enumerate(terms))
                slope = sum(k * t * w ** (k - 1) for k, t in enumerate(terms) if k)
                assert abs(value - definition(name, x + w)) <= base.remainders[0]
                exact = mpmath.diff(lambda v: definition(name, v), x + w)
                assert abs(slope - exact) <= base.remainders[1] + mpmath.mpf("1e-25")


@pytest.mark.parametrize("name", BENEATH)
def test_beyond_the_edges_a_base_is_a_line(name):
    base = BENEATH[name]
    assert list(base.edges) == sorted(base.edges)
    assert all(b - a == 0.5 for a, b in zip(base.edges, base.edges[1:], strict=False))
    for x in (base.far - 1, base.far + 1e-6, base.far + 3, 1e3, 1e9):
        for sign in (-1, 1):
            with mpmath.workdps(40):
                exact = [mpmath.diff(lambda v: definition(name, v), mpmath.mpf(sign * x), n) for n in range(3)]
            line = (sign * x, 1.0, 0.0) if sign > 0 or name == "identity" else (0.0, 0.0, 0.0)
            for n, (got, wanted) in enumerate(zip(line, exact, strict=True)):
                assert abs(got - wanted) <= base.remainders[min(n, 1)] + 1e-25, (x, n)
            if x > base.far:
                assert base.terms(f64(sign * x))[0, :2].tolist() == list(line[:2])


@pytest.mark.parametrize("name", BENEATH)
def test_steepest(name):
    x = torch.linspace(-12, 12, 24001, dtype=F64)
    for order, most in enumerate(BENEATH[name].steepest, start=1):
        found = bases.value(name, x, order).abs().max().item()
        assert found <= most <= 1.01 * found + 1e-3


@pytest.mark.parametrize("name", BENEATH)
def test_extremes_are_those_of_a_grid(name):
    base, draw = BENEATH[name], torch.Generator().manual_seed(0)
    ends = (4 * torch.randn(200, 2, generator=draw, dtype=F64)).sort(1).values
    ends[:20, 1] = ends[:20, 0]
    x = ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * torch.linspace(0, 1, 4001, dtype=F64)
    x = x.clamp(ends[:, :1], ends[:, 1:])
    for order in range(2):
        seen = bases.value(name, x, order)
        least, most = base.extremes(order, *ends.unbind(1))
        # A grid of 4,000 steps of at most 0.005 misses an extreme by no more than f″ h² / 8 or f‴ h² / 8.
        assert (least <= seen.amin(1)).all()
        assert (most >= seen.amax(1)).all()
        assert (seen.amin(1) - least).max() <= 4e-6
        assert (most - seen.amax(1)).max() <= 4e-6
        assert (most - least)[:20].max() <= 4e-13
    least, most = base.extremes(0, f64(-INF, -INF, INF, 1.0), f64(INF, -INF, INF, INF))
    left = -INF if name == "identity" else 0.0
    assert most.tolist() == pytest.approx([INF, left, INF, INF], abs=1e-14)
    assert least.tolist()[1:] == pytest.approx([left, INF, definition(name, mpmath.mpf(1))], abs=1e-14)


def test_extremes_by_hand():
    for name, turn in (("silu", SILU_TURN), ("gelu", GELU_TURN)):
        with mpmath.workdps(30):
            lowest = float(definition(name, mpmath.mpf(turn)))
            steep = mpmath.findroot(
                lambda v, name=name: mpmath.diff(lambda w: definition(name, w), v, 2), 2.3 if name == "silu" else 1.4
            )
            steepest = float(mpmath.diff(lambda w, name=name: definition(name, w), steep))
        least, _ = BENEATH[name].extremes(0, f64(-INF), f64(INF))
        assert least.item() == pytest.approx(lowest, abs=1e-14)
        assert BENEATH[name].extremes(1, f64(-INF), f64(INF))[1].item() == pytest.approx(steepest, abs=3e-13)
        # Slopes of x s(x) with s(-x) = 1 - s(x) are even about (0, 1/2).
        assert BENEATH[name].extremes(1, f64(-INF), f64(INF))[0].item() == pytest.approx(1 - steepest, abs=3e-13)


# ----------------------------------------------------------------------------------------------- of no curve, by hand


@of_bases
@of_kernels
def test_without_a_curve_bounds_are_the_base_s(base, kernel):
    alpha, gamma = torch.zeros(1, 20), f64(1.7)
    for lower, upper in ((-2.0, 3.0), (-5.0, -0.5), (0.3, 0.4), (-100.0, 70.0), (1.0, 1.0), (0.0, 0.0)):
        value, slope, lipschitz = curve_bounds(alpha, gamma, 3.0, lower, upper, kernel, base=base)
        x = torch.linspace(lower, upper, 100001, dtype=F64)
        x = torch.cat([x, f64(-2.3993572805154677, -1.2784645427610738, -math.sqrt(2), -0.7517915246935645)])
        x = torch.cat([x, -x]).clamp(lower, upper)
        for order, found in enumerate((value, slope)):
            y = bases.value(base, x, order)
            least, most = y.min().item(), y.max().item()
            if base == "relu" and order and lower <= 0 <= upper:
                least, most = 0.0, 1.0
            assert found.minimum.item() == pytest.approx(least, abs=1e-12, rel=1e-14)
            assert found.maximum.item() == pytest.approx(most, abs=1e-12, rel=1e-14)
            assert found.minimum.item() <= least
            assert found.maximum.item() >= most
        assert lipschitz.item() == max(-slope.minimum.item(), slope.maximum.item())


@of_bases
def test_on_the_whole_line(base):
    """Values go to infinity where the base does, slopes do not; the curve has returned to 0 there."""
    torch.manual_seed(0)
    alpha, gamma = torch.randn(5, 20, dtype=F64), f64(1.7)
    value, slope, lipschitz = curve_bounds(alpha, gamma, 3.0, base=base)
    x = torch.linspace(-9, 9, 20001, dtype=F64)
    points = torch.linspace(-3, 3, 20, dtype=F64)
    for c in range(5):
        y, steep = (f(x, alpha[c], 1.7, points, "gaussian", base, order) for order in range(2))
        assert value.maximum[c] == INF
        if base == "identity":
            assert value.minimum[c] == -INF
        else:
            assert y.min() - 1e-5 <= value.minimum[c] <= y.min()
        assert steep.max() <= slope.maximum[c] <= steep.max() + 1e-2
        assert steep.min() - 1e-2 <= slope.minimum[c] <= steep.min()
    assert lipschitz.isfinite().all()


@of_bases
@of_kernels
def test_ends_at_infinity_and_far_away(base, kernel):
    alpha = f64([1.0, -3.0, 2.0])
    grows_left = base == "identity"
    for lower, upper, values, slopes in (
        (INF, INF, (INF, INF), (1, 1)),
        (-INF, -INF, (-INF, -INF) if grows_left else (0, 0), (1, 1) if grows_left else (0, 0)),
        (1e9, INF, (1e9, INF), (1, 1)),
        (-INF, -1e9, (-INF, -1e9) if grows_left else (0, 0), (1, 1) if grows_left else (0, 0)),
        (1e9, 2e9, (1e9, 2e9), (1, 1)),
        (1e300, INF, (1e300, INF), (1, 1)),
    ):
        ranges = CurveRanges(alpha, f64(1.0), 3.0, kernel, base=base)
        one, other = f64([lower]), f64([upper])
        for found, wanted, near in (
            (value_bounds(alpha, f64(1.0), 3.0, lower, upper, kernel, base=base), values, 1e-10),
            (slope_bounds(alpha, f64(1.0), 3.0, lower, upper, kernel, base=base), slopes, 1e-10),
            (ranges.values(one, other), values, 1e-6),
            (ranges.slopes(one, other), slopes, 1e-6),
        ):
            for got, exact in zip(found, wanted, strict=True):
                assert got.item() == pytest.approx(exact, rel=1e-14, abs=near)
            assert found.minimum.item() <= wanted[0]
            assert found.maximum.item() >= wanted[1]


@pytest.mark.parametrize("base", ["silu", "gelu"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_slow_tail_goes_on_beyond_the_cells(base, sign):
    """Where the base is 0 to the left: α / (1 + x²), 4e-9 of α = 1e6, of which nothing is searched."""
    alpha, gamma, ends = f64([sign * 1e6]), f64(1.0), f64([-1.5e7])
    for found, x in (
        (value_bounds(alpha, gamma, 3.0, -2e7, -1.5e7, "rational_quadratic", base=base), -1.5e7),
        (CurveRanges(alpha, gamma, 3.0, "rational_quadratic", base=base).values(ends - 1, ends), -1.5e7),
    ):
        assert found.minimum.item() <= sign * 1e6 / (1 + x * x) <= found.maximum.item()


@of_kernels
def test_both_slopes_of_a_kink_count(kernel):
    """Of relu at 0, also where 0 is an end, or all there is."""
    torch.manual_seed(0)
    alpha, gamma, points = torch.randn(1, 7, dtype=F64), f64(0.8), torch.randn(1, 7, dtype=F64)
    at_0 = f(f64(0.0), alpha[0], 0.8, points[0], kernel, None, 1).item()
    ranges = CurveRanges(alpha, gamma, points, kernel, base="relu")
    tiny = 1e-6  # on which the curve's own slope changes by 1e-5
    for lower, upper in ((0.0, 0.0), (-tiny, 0.0), (0.0, tiny), (-tiny, tiny)):
        exact = slope_bounds(alpha, gamma, points, lower, upper, kernel, base="relu")
        near = ranges.slopes(f64([lower]), f64([upper]))
        for found, room in ((exact, 1e-4), (near, 1e-3)):
            assert found.minimum.item() == pytest.approx(at_0, abs=room)
            assert found.maximum.item() == pytest.approx(at_0 + 1, abs=room)
            assert found.minimum.item() <= at_0
            assert found.maximum.item() >= at_0 + 1
    beside = slope_bounds(alpha, gamma, points, 1e-300, tiny, kernel, base="relu")
    assert beside.minimum.item() == pytest.approx(at_0 + 1, abs=1e-4)
    beside = slope_bounds(alpha, gamma, points, -tiny, -1e-300, kernel, base="relu")
    assert beside.maximum.item() == pytest.approx(at_0, abs=1e-4)


# ------------------------------------------------------------------------------------------------- against a search


def searched(alpha, gamma, points, kernel, base, order, lower, upper):
    """The least and the largest that is seen on a grid, made fine around its best places."""
    unit = 1 / math.sqrt(gamma)
    near = torch.arange(-7, 7, 0.02, dtype=F64) * unit
    x = torch.cat([*(p + near for p in points), torch.linspace(-12, 12, 2001, dtype=F64), f64(lower, upper)])
    x = x.clamp(lower, upper).unique()
    found = []
    for sign in (-1, 1):
        y = sign * f(x, alpha, gamma, points, kernel, base, order)
        i = int(y.argmax())
        best, at = y[i], x[i]
        step = x[max(i - 1, 0) : i + 2].diff().max() if len(x) > 1 else torch.zeros((), dtype=F64)
        for _ in range(9):
            closer = (at + step * torch.linspace(-1, 1, 41, dtype=F64)).clamp(lower, upper)
            if base == "relu" and order:  # not across the kink, beside which the best may be
                closer = closer[(closer > 0) == (at > 0)]
            y = sign * f(closer, alpha, gamma, points, kernel, base, order)
            best, at, step = max(best, y.max()), closer[y.argmax()], step / 8
        found.append(sign * best.item())
    return found


@of_bases
@of_kernels
@pytest.mark.parametrize(("points", "spacing"), [(1, 0.5), (5, 0.5), (20, 1 / 6), (12, 8.0)])
def test_bounds_are_those_that_a_search_finds(base, kernel, points, spacing):
    draw = torch.Generator().manual_seed(points)
    step = 6 / (points - 1) if points > 1 else 3.0
    gamma = spacing / step**2
    even = torch.linspace(-3, 3, points, dtype=F64) if points > 1 else torch.zeros(1, dtype=F64)
    dictionary = even + 0.3 * step * torch.randn(points, generator=draw, dtype=F64)
    alpha = 0.3 * torch.randn(1, points, generator=draw, dtype=F64)
    for lower, upper in ((-7.0, 8.0), (-1.3, 0.4), (0.9, 2.5), (-60.0, -2.0)):
        for order, bounds in enumerate((value_bounds, slope_bounds)):
            found = bounds(alpha, f64(gamma), dictionary[None], lower, upper, kernel, base=base)
            least, most = searched(alpha[0], gamma, dictionary, kernel, base, order, lower, upper)
            unit = size(alpha, gamma, order, lower, upper)
            slack = TIGHT
            if base == "relu" and order and lower <= 0 <= upper:
                slack = 2e-3  # the search comes no nearer to the kink than its grid
            assert -2e-15 <= (least - found.minimum.item()) / unit <= slack
            assert -2e-15 <= (found.maximum.item() - most) / unit <= slack


@settings(deadline=None, max_examples=120)
@given(
    base=st.sampled_from(BASES),
    kernel=st.sampled_from(KERNELS),
    terms=st.lists(st.tuples(st.floats(-100, 100), st.floats(-10, 10)), min_size=1, max_size=6),
    gamma=st.floats(1e-4, 1e4),
    ends=st.lists(st.floats(-60, 60), min_size=4, max_size=4).map(sorted),
)
def test_bounds_hold_and_shrink_with_the_interval(base, kernel, terms, gamma, ends):
    """Of any curve on any interval; and those of many intervals hold these, and are near."""
    alpha, points = (torch.tensor([column], dtype=F64) for column in zip(*terms, strict=True))
    outer, inner = (
        curve_bounds(alpha, f64(gamma), points, *pair, kernel, base=base) for pair in (ends[::3], ends[1:3])
    )
    ranges = CurveRanges(alpha, f64(gamma), points, kernel, base=base)
    lower, upper = f64([ends[1]]), f64([ends[2]])
    x = torch.linspace(ends[1], ends[2], 300, dtype=F64).clamp(ends[1], ends[2])
    x = torch.cat([x, (points[0] + torch.linspace(-2, 2, 9, dtype=F64)[:, None] / math.sqrt(gamma)).flatten()])
    x = x.clamp(ends[1], ends[2])
    for order, many in enumerate((ranges.values(lower, upper), ranges.slopes(lower, upper))):
        unit = size(alpha, gamma, order, *ends)
        seen = f(x, alpha[0], gamma, points[0], kernel, base, order)
        rounding = 1e-14 * unit * len(terms)  # of what is seen, in float64
        assert inner[order].minimum.item() <= seen.min() + rounding
        assert inner[order].maximum.item() >= seen.max() - rounding
        assert outer[order].minimum.item() <= inner[order].minimum.item() + TIGHT * unit
        assert outer[order].maximum.item() >= inner[order].maximum.item() - TIGHT * unit
        assert many.minimum.item() <= inner[order].minimum.item() + 2 * TIGHT * unit
        assert many.maximum.item() >= inner[order].maximum.item() - 2 * TIGHT * unit
        assert many.minimum.item() >= inner[order].minimum.item() - NEAR * unit
        assert many.maximum.item() <= inner[order].maximum.item() + NEAR * unit


def exact(x, alpha, gamma, points, kernel, base, order):
    """One curve, or its slope, at one x, at mpmath's precision."""

    def kappa(u):
        if kernel == "gaussian":
            return mpmath.exp(-u * u) * (-2 * u if order else 1)
        if kernel == "rational_quadratic":
            return -2 * u / (1 + u * u) ** 2 if order else 1 / (1 + u * u)
        s = mpmath.sqrt(2) * abs(u)
        if kernel == "matern32":
            return (-2 * u if order else 1 + s) * mpmath.exp(-s)
        h = mpmath.sqrt(mpmath.mpf(3) / 2)
        w, rest = abs(u) / h, max(2 - abs(u) / h, mpmath.mpf(0))
        if order:
            inside = w * (mpmath.mpf(9) / 4 * w - 3) if w < 1 else -mpmath.mpf(3) / 4 * rest**2
            return mpmath.sign(u) / h * inside
        return 1 - 3 * w**2 / 2 + 3 * w**3 / 4 if w < 1 else rest**3 / 4

    root, x = mpmath.sqrt(mpmath.mpf(gamma)), mpmath.mpf(x)
    total = sum(a * kappa(root * (x - p)) for a, p in zip(map(mpmath.mpf, alpha), points, strict=True))
    total = total * (root if order else 1)
    if base is None:
        return total
    if order == 0:
        return total + definition(base, x)
    if base in ("identity", "relu"):
        return total + (1 if base == "identity" or x > 0 else 0)
    s = mpmath.ncdf(x) if base == "gelu" else 1 / (1 + mpmath.exp(-x))
    return total + s + x * (mpmath.npdf(x) if base == "gelu" else s * (1 - s))


@pytest.mark.parametrize("base", [None, *BASES])
@of_kernels
def test_at_a_point_no_digit_is_lost(base, kernel):
    """Curves whose coefficients cancel: Σ|α| is 1e4 times f and more, so rounding alone would be on the wrong side."""
    draw = torch.Generator().manual_seed(1)
    gamma, points = 1.7, torch.linspace(-3, 3, 21, dtype=F64)
    alternating = torch.tensor([math.comb(20, k) * (-1) ** k for k in range(21)], dtype=F64)
    alpha = (alternating * (1 + 1e-9 * torch.randn(21, generator=draw, dtype=F64)))[None]
    x = torch.cat([6 * torch.rand(25, generator=draw, dtype=F64) - 3, f64(-40.0, -8.5, 9.0, 37.0)])
    rows = (alpha.expand(len(x), -1), f64(gamma), points.expand(len(x), -1))
    ranges = CurveRanges(alpha, f64(gamma), points[None], kernel, base=base)
    for order, bounds in enumerate((value_bounds, slope_bounds)):
        found = bounds(*rows, x, x, kernel, base=base)
        many = (ranges.slopes if order else ranges.values)(x[:, None], x[:, None])
        with mpmath.workdps(50):
            for i, place in enumerate(x.tolist()):
                truth = exact(place, alpha[0].tolist(), gamma, points.tolist(), kernel, base, order)
                assert mpmath.mpf(found.minimum[i].item()) <= truth <= mpmath.mpf(found.maximum[i].item())
                assert mpmath.mpf(many.minimum[i].item()) <= truth <= mpmath.mpf(many.maximum[i].item())
                room = 2 * TIGHT * size(alpha, gamma, order, place)
                assert found.maximum[i].item() - found.minimum[i].item() <= room


@pytest.mark.parametrize("base", [None, *BASES])
def test_many_even_points_whose_spacing_is_no_float(base):
    """Narrow kernels on 3,001 points: places rounded by a point's number times ε are a part of a kernel there."""
    size_, gamma_, boundary = 3001, 1e12, 2.9
    gamma = f64(gamma_)
    numbers = list(range(0, size_, 150))
    with mpmath.workdps(50):
        points = [-mpmath.mpf(boundary) + 2 * mpmath.mpf(boundary) * k / (size_ - 1) for k in numbers]
        x = f64(*(float(p - mpmath.sqrt(mpmath.mpf(1) / 2 / gamma_)) for p in points))  # where they are steepest
        rows = (torch.eye(size_, dtype=F64)[numbers], gamma, boundary)
        for order, bounds in enumerate((value_bounds, slope_bounds)):
            found = bounds(*rows, x, x, base=base)
            for i, (place, p) in enumerate(zip(x.tolist(), points, strict=True)):
                truth = exact(place, [1.0], gamma_, [p], "gaussian", base, order)
                assert mpmath.mpf(found.minimum[i].item()) <= truth <= mpmath.mpf(found.maximum[i].item())


@of_bases
@pytest.mark.parametrize("away", [1e6, 1e10, 1e14])
def test_a_base_between_points_that_are_far_apart(base, away):
    """Places near 0 are known to a unit roundoff of the nearest point; bounds are wider by that, and hold."""
    alpha, points = f64([1.0, -2.0]), f64([-away, away])
    at = torch.linspace(-4, 4, 60, dtype=F64)
    rows = (alpha.expand(60, -1), f64(1.7), points.expand(60, -1))
    ranges = CurveRanges(alpha, f64(1.7), points, base=base)
    for order, bounds in enumerate((value_bounds, slope_bounds)):
        found = bounds(*rows, at, at + 0.01, base=base)
        many = (ranges.slopes if order else ranges.values)(at[:, None], at[:, None] + 0.01)
        x = at + 0.01 * torch.linspace(0, 1, 101, dtype=F64)[:, None]
        seen = bases.value(base, x, order)
        for got in (found, (many.minimum[:, 0], many.maximum[:, 0])):
            assert (got[0] <= seen.amin(0)).all()
            assert (got[1] >= seen.amax(0)).all()
        room = 1e-4 + 40 * away * 2**-52
        assert (seen.amin(0) - found[0]).max() <= room
        assert (found[1] - seen.amax(0)).max() <= room + (1 if order and base == "relu" else 0)


@pytest.mark.parametrize("base", ["silu", "gelu"])
def test_where_cells_meet_between_points_that_are_far_apart(base):
    """An x there may be looked up in the neighbour of its cell."""
    torch.manual_seed(0)
    tried = 0
    for draw in torch.rand(80, 2, dtype=F64).tolist():
        away, gamma = 10 ** (7 + 8 * draw[0]), f64(10 ** (3 * draw[1] - 2))
        ranges = CurveRanges(f64([1.0, 1.0]), gamma, f64([-away, 1.3 * away]), base=base)
        for order, name in enumerate(("values", "slopes")):
            many = getattr(ranges, name)
            many(f64([0.0]), f64([0.0]))
            edges = getattr(ranges, f"_{name}").edges[0]
            at = edges[edges.abs() < 6, None]
            at = at + f64(0.0, 2**-52, -(2**-52), 1e-9, -1e-9, 1e-16 * away, -1e-16 * away)
            found, seen = many(at, at), bases.value(base, at, order)
            assert (found.minimum <= seen).all()
            assert (found.maximum >= seen).all()
            tried += at.numel()
    assert tried > 5000


@of_bases
@of_kernels
@pytest.mark.parametrize("gamma", [1e-300, 1e-30, 1e-8, 1e8, 1e25, 1e300])
@pytest.mark.parametrize("reach", [3.0, 30.0])
def test_huge_and_tiny_bandwidths(base, kernel, gamma, reach):
    """Wide kernels are one number, narrow ones stand alone; the base is as wide as ever."""
    alpha = f64([1.0, -3.0, 0.5, 2.5, 1.0])
    points = torch.linspace(-3, 3, 5, dtype=F64)
    value, slope, _ = curve_bounds(alpha, f64(gamma), 3.0, -reach, reach, kernel, base=base)
    x = torch.linspace(-reach, reach, 60001, dtype=F64)
    at, steep = bases.value(base, points), bases.value(base, x, 1)
    if gamma < 1:
        y = bases.value(base, x) + 2.0
        peak = 0.0
    else:
        y = torch.cat([bases.value(base, x), at + alpha[0]])
        peak = 3 * math.sqrt(gamma)
    slack = 1e-7 if gamma in (1e-8, 1e8) else 1e-10
    slack += 30 * math.sqrt(gamma) if gamma < 1 else 0
    assert value.minimum.item() == pytest.approx(y.min().item(), abs=1e-3 + slack)
    assert value.minimum.item() <= y.min().item() + slack
    assert value.maximum.item() == pytest.approx(y.max().item(), abs=1e-3 + slack)
    assert value.maximum.item() >= y.max().item() - slack
    assert slope.minimum.item() <= steep.min().item() + slack
    assert slope.maximum.item() >= steep.max().item() - slack
    assert slope.maximum.item() <= steep.max().item() + peak + 1e-6 + slack


@of_bases
def test_an_interval_for_each_channel_shared_rows_and_no_channels(base):
    torch.manual_seed(4)
    alpha, gamma, dictionary = torch.randn(1, 6, dtype=F64), f64(0.5, 3.0, 0.5), torch.randn(3, 6, dtype=F64)
    lower, upper = f64(-1.0, 0.2, -INF), f64(0.0, 0.3, -2.0)
    together = curve_bounds(alpha, gamma, dictionary, lower, upper, base=base)
    for c in range(3):
        alone = curve_bounds(
            alpha, gamma[c : c + 1], dictionary[c : c + 1], lower[c].item(), upper[c : c + 1], base=base
        )
        for a, b in zip((*together.value, *together.slope), (*alone.value, *alone.slope), strict=True):
            torch.testing.assert_close(a[c : c + 1], b, rtol=0, atol=2 * TIGHT * 20)
    none = curve_bounds(torch.zeros(0, 5), torch.ones(1), 3.0, base=base)
    assert all(t.shape == (0,) for t in (*none.value, *none.slope, none.lipschitz))
    x = torch.randn(2, 0, 3)
    assert CurveRanges(torch.zeros(0, 5), torch.ones(1), 3.0, base=base).values(x, x).minimum.shape == (2, 0, 3)


@of_bases
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 2, 2)])
def test_ranges_by_channel_are_those_of_the_layer(base, shape):
    torch.manual_seed(0)
    layer = kafops.KAF(3, 9, init="normal", base=base, dtype=F64)
    ranges = CurveRanges(layer.alpha, layer.bandwidths(), layer.boundary, base=base)
    x = 20 * torch.randn(shape, dtype=F64)
    for found, wanted in ((ranges.values(x, x), layer(x).detach()), (ranges.values(x - 1, x + 1), None)):
        assert found.minimum.shape == shape
        y = layer(x).detach()
        assert (found.minimum <= y + 1e-13 * (1 + x.abs())).all()
        assert (found.maximum >= y - 1e-13 * (1 + x.abs())).all()
        if wanted is not None:
            assert ((found.maximum - found.minimum) <= 4e-5 * (1 + layer.alpha.abs().sum(1).max())).all()


@of_kernels
def test_cells_of_a_base_are_no_wider_than_its_series_allows(kernel):
    for name, gamma in (("silu", 1e-6), ("gelu", 0.1), ("silu", 40.0)):
        base = BENEATH[name]
        curves = normalised(torch.randn(2, 4, dtype=F64), f64(gamma), torch.randn(2, 4, dtype=F64), kernel, base)
        cells = partition(curves, *curves.ends)
        point, scale = curves.points[cells.channel, cells.anchor], curves.scale[cells.channel]
        start, end = (point + z / scale for z in (cells.start, cells.end))
        near = ((start + end) / 2).abs() < base.far
        assert near.any()
        assert (end - start)[near].max() <= 0.5 + 1e-6
        # And there polynomials are the base where the kernels' sum is 0.
        far = near & cells.far
        value, _ = polynomials(curves, cells)
        unit = curves.height[cells.channel]
        for y in (-1.0, 0.4):
            x = (start + end) / 2 + y * (end - start) / 2
            power = y ** torch.arange(value.shape[1], dtype=F64)
            wanted = bases.value(name, x)
            assert ((value * power).sum(1) * unit - wanted)[far].abs().max() <= 1e-12 if far.any() else True


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        ("elu", ValueError, "base must be None or one of 'identity', .* got 'elu'"),
        (3, TypeError, "base must be None or one of .* got int"),
    ],
)
def test_wrong_bases_are_named(base, error, message):
    for bounds in (value_bounds, slope_bounds, curve_bounds, CurveRanges):
        with pytest.raises(error, match=message):
            bounds(torch.ones(3, 5), torch.ones(3), 3.0, base=base)


def test_new_arguments_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        curve_bounds(torch.ones(3, 5), torch.ones(3), 3.0, None, None, "gaussian", "silu")
    assert np.isfinite(curve_bounds(torch.ones(3, 5), torch.ones(3), 3.0, base=None).lipschitz).all()
