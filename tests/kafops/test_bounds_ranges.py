import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kafops
from kafops.bounds import CurveRanges, slope_bounds, value_bounds

F64 = torch.float64
INF = math.inf
KERNELS = ("gaussian", "rational_quadratic", "matern32", "bspline")
TIGHT = 2e-11  # of two exact bounds, as a multiple of Σ|α|
NEAR, NEAR_POINT = 3e-4, 2e-5  # what the docstring promises


def random_curves(channels, size, spacing, free, seed=0):
    draw = torch.Generator().manual_seed(seed)
    step = 6 / (size - 1) if size > 1 else 3.0
    alpha = torch.randn(channels, size, generator=draw, dtype=F64)
    gamma = torch.full((channels,), spacing / step**2, dtype=F64) * torch.logspace(-0.3, 0.3, channels, dtype=F64)
    if not free:
        return alpha, gamma, 3.0
    points = torch.linspace(-3, 3, size, dtype=F64) + 0.3 * step * torch.randn(
        channels, size, generator=draw, dtype=F64
    )
    points[0, : size // 2] = points[0, 0]
    points[-1, -1] = 300.0
    return alpha, gamma, points


def intervals(channels, count=60, seed=0):
    """[count, C] intervals of all lengths, in and out of the dictionary, some infinite, some points."""
    draw = torch.Generator().manual_seed(seed)
    centre = 4 * torch.randn(count, channels, generator=draw, dtype=F64)
    half = torch.logspace(-7, 1, count, dtype=F64)[:, None] * torch.rand(count, channels, generator=draw, dtype=F64)
    lower, upper = centre - half, centre + half
    lower[0], upper[1], lower[2], upper[2] = -INF, INF, -INF, INF
    upper[3:9] = lower[3:9]
    return lower, upper


def excess(ranges, exact, arguments, lower, upper, kernel, order):
    """How much wider each interval's bounds are than exact ones, below and above, as multiples of Σ|α|: [2, N, C]."""
    alpha, gamma, boundary = arguments
    count, channels = lower.shape
    got = ranges(lower, upper)
    rows = [t.repeat(count, 1) if t.dim() == 2 else t.repeat(count) for t in (alpha, gamma)]
    where = boundary.repeat(count, 1) if isinstance(boundary, torch.Tensor) else boundary
    wanted = exact(*rows, where, lower.flatten(), upper.flatten(), kernel)
    unit = alpha.abs().sum(1) * (gamma.sqrt() if order else 1)
    below = wanted.minimum.view(count, channels) - got.minimum
    return torch.stack([below, got.maximum - wanted.maximum.view(count, channels)]) / unit


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize(("size", "spacing"), [(1, 0.5), (5, 0.5), (20, 1 / 6), (33, 8.0)])
def test_bounds_contain_the_exact_ones_and_are_near(kernel, free, size, spacing):
    arguments = random_curves(3, size, spacing, free and size > 1)
    ranges = CurveRanges(*arguments, kernel)
    lower, upper = intervals(3)
    for order, (many, exact) in enumerate(((ranges.values, value_bounds), (ranges.slopes, slope_bounds))):
        wider = excess(many, exact, arguments, lower, upper, kernel, order)
        assert wider.min() >= -TIGHT
        assert wider.max() <= NEAR
        assert wider[:, 3:9].max() <= NEAR_POINT


def test_ends_at_and_around_the_edges_of_cells():
    arguments = random_curves(2, 4, 0.5, False)
    ranges = CurveRanges(*arguments)
    ranges.values(torch.zeros(1, 2), torch.zeros(1, 2))
    edges = ranges._values.edges.T
    ends = torch.cat([edges, torch.nextafter(edges, edges + 1), torch.nextafter(edges, edges - 1)])
    later = torch.cat([ends[1:], ends[-1:]]).maximum(ends)
    for lower, upper in ((ends, ends), (ends, later), (ends - 0.1, ends)):
        wider = excess(ranges.values, value_bounds, arguments, lower, upper, "gaussian", 0)
        assert wider.min() >= -TIGHT
        assert wider.max() <= NEAR


@settings(deadline=None, max_examples=40)
@given(
    kernel=st.sampled_from(KERNELS),
    terms=st.lists(st.tuples(st.floats(-100, 100), st.floats(-10, 10)), min_size=1, max_size=5),
    gamma=st.floats(1e-4, 1e4),
    ends=st.lists(st.floats(-12, 12), min_size=8, max_size=8),
)
def test_any_curve_and_interval(kernel, terms, gamma, ends):
    alpha, points = (torch.tensor([column], dtype=F64) for column in zip(*terms, strict=True))
    arguments = (alpha, torch.tensor([gamma], dtype=F64), points)
    pairs = torch.tensor(ends, dtype=F64).view(-1, 1, 2).sort(2).values
    ranges = CurveRanges(*arguments, kernel)
    for order, (many, exact) in enumerate(((ranges.values, value_bounds), (ranges.slopes, slope_bounds))):
        found = many(pairs[..., 0], pairs[..., 1])
        rows = (alpha.repeat(4, 1), arguments[1].repeat(4), points.repeat(4, 1))
        wanted = exact(*rows, pairs[:, 0, 0], pairs[:, 0, 1], kernel)
        unit = alpha.abs().sum().item() * (math.sqrt(gamma) if order else 1)
        assert (found.minimum[:, 0] <= wanted.minimum + TIGHT * unit).all()
        assert (found.maximum[:, 0] >= wanted.maximum - TIGHT * unit).all()
        assert (found.maximum[:, 0] <= wanted.maximum + NEAR * unit).all()


def test_one_point_by_hand():
    ranges = CurveRanges(torch.tensor([[2.0]]), torch.tensor([1.0]), 3.0)
    minimum, maximum = ranges.values(torch.tensor([0.5, -1.0, 5.0]), torch.tensor([1.0, 2.0, INF]))
    torch.testing.assert_close(
        maximum, torch.tensor([2 * math.exp(-0.25), 2, 0], dtype=F64), rtol=0, atol=2 * NEAR, check_stride=False
    )
    torch.testing.assert_close(
        minimum, torch.tensor([2 * math.exp(-1), 2 * math.exp(-4), 0], dtype=F64), rtol=0, atol=2 * NEAR
    )
    steepest = 2 * math.sqrt(2 / math.e)
    minimum, maximum = ranges.slopes(torch.tensor([-2.0, 0.1]), torch.tensor([2.0, 0.2]))
    down = [-4 * x * math.exp(-x * x) for x in (0.2, 0.1)]
    torch.testing.assert_close(minimum, torch.tensor([-steepest, down[0]], dtype=F64), rtol=0, atol=2 * NEAR)
    torch.testing.assert_close(maximum, torch.tensor([steepest, down[1]], dtype=F64), rtol=0, atol=2 * NEAR)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 3, 4, 5), (1, 3, 2, 2, 2), (0, 3, 4), (2, 3, 0)])
def test_shapes_and_channels(shape):
    alpha, gamma, boundary = random_curves(3, 9, 0.5, False)
    ranges = CurveRanges(alpha, gamma, boundary)
    x = torch.randn(shape)
    minimum, maximum = ranges.values(x, x)
    assert minimum.shape == maximum.shape == shape
    assert minimum.dtype == F64
    f = kafops.kaf(x.double(), alpha, gamma, boundary)
    unit = alpha.abs().sum(1).view(3, *(1,) * (x.dim() - 2))
    assert ((f - minimum) / unit >= -1e-14).all()
    assert ((maximum - f) / unit >= -1e-14).all()
    assert ((maximum - minimum) / unit <= 2 * NEAR_POINT).all()


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 0), (2, 3, 4)])
def test_a_shared_curve_takes_any_shape(shape):
    alpha, gamma, boundary = random_curves(1, 9, 0.5, False)
    x = torch.randn(shape, dtype=F64)
    minimum, maximum = CurveRanges(alpha, gamma, boundary).values(x, x)
    f = (alpha[0] * torch.exp(-gamma * (x[..., None] - torch.linspace(-3, 3, 9, dtype=F64)) ** 2)).sum(-1)
    torch.testing.assert_close(minimum, f, rtol=0, atol=NEAR_POINT * 9)
    torch.testing.assert_close(maximum, f, rtol=0, atol=NEAR_POINT * 9)


def test_strided_ends_and_pieces(monkeypatch):
    monkeypatch.setattr("kafops.bounds.ranges._AT_ONCE", 7)
    arguments = random_curves(3, 9, 0.5, True)
    x = torch.randn(4, 5, 3, dtype=F64).movedim(2, 1)
    pieces = CurveRanges(*arguments).values(x - 0.1, x + 0.2)
    monkeypatch.undo()
    whole = CurveRanges(*arguments).values((x - 0.1).contiguous(), (x + 0.2).contiguous())
    assert all(torch.equal(a, b) for a, b in zip(pieces, whole, strict=True))


def test_no_channels_and_curves_that_are_0():
    x = torch.randn(2, 0, 3)
    assert CurveRanges(torch.zeros(0, 5), torch.ones(1), 3.0).values(x, x).minimum.shape == (2, 0, 3)
    x = torch.randn(2, 4)
    ranges = CurveRanges(torch.zeros(4, 5), torch.ones(1), 3.0)
    for t in (*ranges.values(x, x + 1), *ranges.slopes(x, x + 1)):
        assert torch.equal(t, torch.zeros(2, 4, dtype=F64))


@pytest.mark.parametrize("gamma", [1e-30, 1e30])
def test_bandwidths_beyond_the_precision_of_x(gamma):
    """Wide kernels are constant; with narrow ones each x near a point may be anywhere in the kernel."""
    alpha = torch.tensor([[1.0, -3.0, 2.5]], dtype=F64)
    ranges = CurveRanges(alpha, torch.tensor([gamma], dtype=F64), 3.0)
    x = torch.tensor([-3.0, 0.0, 3.0, 1.5], dtype=F64)
    minimum, maximum = ranges.values(x, x)
    f = torch.tensor([1.0, -3.0, 2.5, 0.0] if gamma > 1 else [0.5] * 4, dtype=F64)
    assert (minimum <= f).all()
    assert (maximum >= f).all()
    if gamma < 1:
        assert (maximum - minimum).max() < 2 * NEAR_POINT * 6.5


def test_tables_are_made_when_asked_for_and_do_not_follow_the_layer():
    layer = kafops.KAF(2)
    ranges = CurveRanges(layer.alpha, layer.bandwidths(), layer.boundary)
    x = torch.randn(3, 2)
    before = ranges.values(x, x)
    layer.alpha.data.zero_()
    assert torch.equal(ranges.values(x, x).maximum, before.maximum)
    assert "_slopes" not in vars(ranges)


@pytest.mark.parametrize(
    ("lower", "upper", "error", "message"),
    [
        (0.0, torch.zeros(2, 3), TypeError, "lower must be a torch.Tensor, got float"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32), TypeError, "upper must be a floating .* torch.int32"),
        (torch.zeros(2, 3), torch.zeros(2, 1), ValueError, r"one shape, got \[2, 3\] and \[2, 1\]"),
        (torch.zeros(2, 4), torch.zeros(2, 4), ValueError, r"C = 3, .* got \[2, 4\]"),
        (torch.zeros(3), torch.zeros(3), ValueError, r"C = 3, .* got \[3\]"),
        (
            torch.zeros(2, 3, device="meta"),
            torch.zeros(2, 3),
            ValueError,
            "lower is on meta, but the curves are on cpu",
        ),
        (torch.ones(2, 3), torch.eye(2, 3), ValueError, r"got lower=1.0 and upper=0.0 at \[0, 1\]"),
        (torch.zeros(2, 3), torch.full((2, 3), math.nan), ValueError, "neither be nan, got lower=0.0 and upper=nan"),
    ],
)
def test_wrong_arguments_are_named(lower, upper, error, message):
    ranges = CurveRanges(*random_curves(3, 5, 0.5, False))
    for many in (ranges.values, ranges.slopes):
        with pytest.raises(error, match=message):
            many(lower, upper)
    with pytest.raises(ValueError, match="gamma must be positive"):
        CurveRanges(torch.ones(1, 2), torch.zeros(1), 3.0)
