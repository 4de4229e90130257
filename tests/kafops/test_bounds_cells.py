import math

import numpy as np
import pytest
import torch

from kafops.bounds.cells import halved, largest, partition, polynomials, suprema
from kafops.bounds.curves import normalised
from kafops.bounds.series import SERIES

F64 = torch.float64


def curves_of(kernel, size=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    alpha = torch.randn(3, size, generator=draw, dtype=F64)
    points = torch.randn(3, size, generator=draw, dtype=F64) * torch.tensor([[0.1], [1.0], [30.0]])
    points[0, 0] = points[0, 1]
    return normalised(alpha, torch.tensor([0.3, 1.0, 4.0], dtype=F64), points, kernel)


def in_x(curves, cells):
    """Start and end of each cell in x."""
    point, scale = curves.points[cells.channel, cells.anchor], curves.scale[cells.channel]
    return (point + cells.start / scale).numpy(), (point + cells.end / scale).numpy()


@pytest.mark.parametrize("kernel", SERIES)
@pytest.mark.parametrize("ends", [(-math.inf, math.inf), (-0.7, 1.9), (0.25, 0.25), (40.0, 1e9)])
def test_cells_cover_the_interval_in_order(kernel, ends):
    curves = curves_of(kernel)
    cells = partition(curves, *(torch.full((3,), end, dtype=F64) for end in ends))
    start, end = in_x(curves, cells)
    assert (cells.end >= cells.start).all()
    for c in range(3):
        mine = (cells.channel == c).numpy()
        a, b = start[mine], end[mine]
        assert a[0] <= max(ends[0], -1e290)
        assert b[-1] >= min(ends[1], 1e290)
        # Each begins where the one before ends, up to rounding.
        assert np.allclose(a[1:], b[:-1], rtol=1e-14, atol=1e-13)
        if math.isfinite(ends[0]):
            assert a[0] >= ends[0] - 1e-13
        if math.isfinite(ends[1]):
            assert b[-1] <= ends[1] + 1e-13 * max(1, ends[1])


@pytest.mark.parametrize("kernel", SERIES)
def test_no_cell_is_longer_than_the_ladder_or_has_a_knot_inside(kernel):
    curves = curves_of(kernel)
    infinite = torch.full((3,), math.inf, dtype=F64)
    cells = partition(curves, -infinite, infinite)
    points = curves.points[cells.channel]
    z = curves.scale[cells.channel, None] * (points - points.gather(1, cells.anchor[:, None]))  # of every point
    start, end = cells.start[~cells.far, None], cells.end[~cells.far, None]
    nearest = torch.minimum(
        torch.minimum((start - z[~cells.far]).abs(), (end - z[~cells.far]).abs()).amin(1), start[:, 0].abs()
    )
    ladder = torch.tensor(SERIES[kernel].ladder, dtype=F64)
    rung = torch.searchsorted(ladder, nearest + 1e-12, right=True).clamp(max=len(ladder) - 1)
    assert ((end - start)[:, 0] <= ladder.diff()[rung - 1] + 1e-12).all()
    for knot in (*SERIES[kernel].knots, 0.0):
        for sign in (-1, 1):
            inside = (z[~cells.far] + sign * knot > start + 1e-8) & (z[~cells.far] + sign * knot < end - 1e-8)
            assert not inside.any()


@pytest.mark.parametrize("kernel", SERIES)
def test_polynomials_are_the_curve_and_its_slope(kernel):
    curves = curves_of(kernel)
    infinite = torch.full((3,), math.inf, dtype=F64)
    cells = partition(curves, -infinite, infinite)
    value, slope = polynomials(curves, cells)
    terms = SERIES[kernel].terms
    for y in (-0.9, 0.2, 0.9):
        z = (cells.centre + y * cells.half)[:, None]
        points = curves.points[cells.channel]
        u = z - curves.scale[cells.channel, None] * (points - points.gather(1, cells.anchor[:, None]))
        kappa, steep = list(terms(curves.alpha[cells.channel], u.clamp(-1e100, 1e100)))[:2]
        power = torch.tensor(y, dtype=F64) ** torch.arange(value.shape[1])
        # The remainders and the roundings of 6 points.
        assert ((value * power).sum(1) - kappa.sum(1)).abs().max() < 2e-13
        assert ((slope * power).sum(1) - steep.sum(1)).abs().max() < 6 * 2e-12
    assert (value[cells.far] == 0).all()


def roots_supremum(coefficients):
    """The largest value on [-1, 1] among the ends and the stationary points."""
    p = np.polynomial.Polynomial(coefficients)
    roots = p.deriv().roots() if len(np.trim_zeros(coefficients, "b")) > 2 else np.zeros(0)
    roots = roots.real[(abs(roots.imag) < 1e-6) & (abs(roots.real) <= 1)]
    return max(p(np.array([-1.0, 1.0, *roots])))


def test_suprema_of_random_polynomials():
    draw = torch.Generator().manual_seed(0)
    decay = torch.logspace(0, -3, 40, dtype=F64)[:, None] ** (torch.arange(9) / 8)
    polynomial = torch.randn(40, 9, generator=draw, dtype=F64) * decay
    polynomial[0], polynomial[1, 1:], polynomial[2, 2:] = 0, 0, 0
    wanted = torch.tensor([roots_supremum(row) for row in polynomial.numpy()], dtype=F64)
    got = suprema(polynomial, torch.arange(40), torch.full((40,), 1e-12, dtype=F64))
    assert (got >= wanted - 1e-14 * 9).all()
    assert (got <= wanted + 1.1e-12).all()
    # Owners have the largest of theirs; one has none.
    owner = torch.arange(40) % 4
    got = suprema(polynomial, owner, torch.full((5,), 1e-12, dtype=F64))
    best = torch.stack([wanted[owner == i].amax() for i in range(4)])
    assert ((got[:4] - best).abs() < 1.1e-12).all()
    assert got[4] == -math.inf


def test_a_flat_polynomial_needs_no_search():
    flat = torch.tensor([[1.0, 0, 0, 1e-14, -1e-14]], dtype=F64).repeat(1000, 1)
    assert abs(suprema(flat, torch.zeros(1000, dtype=torch.int64), torch.tensor([1e-12], dtype=F64)) - 1) < 1e-12


def test_halves_by_hand():
    # y² on the left half, y = (v - 1)/2, is (1 - 2v + v²)/4.
    left, right = halved(torch.tensor([[0.0, 0, 1, 0]], dtype=F64))
    assert left.tolist() == [[0.25, -0.5, 0.25, 0]]
    assert right.tolist() == [[0.25, 0.5, 0.25, 0]]


def test_largest_by_hand():
    rows = torch.tensor([[0.0, 1, -1, 0], [1, -2, 3, 0.5], [0, 1, 0, 0], [2, 0, 0, -1], [0, 8, -1, 0]], dtype=F64)
    y, upper = largest(rows)
    assert upper.tolist() == [0.25, 6.5, 1, 3, 7]
    assert y.tolist() == [0.5, -1, 1, 0, 1]
    y, upper = largest(torch.tensor([[1.0, 0, 2, 0.25]], dtype=F64))  # 1 + 2y², as large at -1 as at 1
    assert (y.abs().item(), upper.item()) == (1, 3.25)
