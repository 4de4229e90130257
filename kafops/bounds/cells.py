"""Curves as polynomials on cells, and the suprema of such polynomials.

Positions are z = scale (x / unit - δ) from the nearest point δ of the dictionary, the anchor. So a cell's distance from
every point keeps its relative precision, however large γ is and however far apart the points are.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kafops.bounds.curves import EPS, Curves

__all__ = ["Cells", "halved", "largest", "margins", "partition", "places", "polynomials", "suprema"]

_FAR = 1e300  # serves as infinity, without its nan
_AT_ONCE = 2**16  # numbers in a temporary, so that it stays in the cache


@dataclass(frozen=True)
class Cells:
    """B intervals of z, ascending in (channel, anchor, z).

    Attributes:
        channel, anchor: [B], of the curves.
        start, end: [B].
        far: [B], whether no point is near enough to matter: the polynomial is 0, or the base's alone.
        finite: whether far cells end too, as those of curves with a base do.
    """

    channel: Tensor
    anchor: Tensor
    start: Tensor
    end: Tensor
    far: Tensor
    finite: bool = False

    @property
    def centre(self) -> Tensor:
        """The middle [B]."""
        return self.start / 2 + self.end / 2

    @property
    def half(self) -> Tensor:
        """Half of the width [B], rounded up; 0 where `flat`."""
        return ((self.end - self.start) / 2 + 4 * EPS * self.away).masked_fill(self.flat, 0)

    @property
    def flat(self) -> Tensor:
        """Whether the polynomial is 0 and the cell may not end [B]."""
        return self.far & (not self.finite)

    @property
    def near(self) -> Tensor:
        """The least |z| [B] of an end."""
        return torch.minimum(self.start.abs(), self.end.abs())

    @property
    def away(self) -> Tensor:
        """The largest |z| [B]."""
        return torch.maximum(self.start.abs(), self.end.abs())


def partition(curves: Curves, lower: Tensor, upper: Tensor) -> Cells:  # [C], [C]
    """Cut [lower, upper] at the points, halfway between them, and at the edges that the kernel wants around each.

    With a base cells end at its edges too, and the interval must lie within the curves' `ends`.
    """
    apart = curves.scale[:, None] * curves.points.diff(dim=1) / 2 * (1 + 4 * EPS)
    end = torch.full_like(curves.scale[:, None], _FAR)
    left, right = -torch.cat([end, apart], 1).clamp(max=_FAR), torch.cat([apart, end], 1).clamp(max=_FAR)
    first, last = (
        (curves.scale[:, None] * ((x / curves.unit)[:, None] - curves.points)).clamp(-_FAR, _FAR)
        for x in (lower, upper)
    )
    first = (first - 4 * EPS * first.abs() - curves.blur[:, None]).clamp(max=_FAR)
    last = (last + 4 * EPS * last.abs() + curves.blur[:, None]).clamp(min=-_FAR)
    start = torch.stack([torch.maximum(left, first), first.clamp(min=0)], 2)  # [C, D, 2], left and right of each point
    stop = torch.stack([last.clamp(max=0), torch.minimum(right, last)], 2)
    parts = [
        _cut(curves, rows, start[tuple(rows.T)], stop[tuple(rows.T)])
        for rows in _chunks((start <= stop).nonzero(), curves)
    ]
    channel, anchor, starts, ends, far = (torch.cat(column) for column in zip(*parts, strict=True))
    return Cells(channel, anchor, starts, ends, far, finite=curves.base is not None)


def _cut(curves: Curves, where: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, ...]:
    channel, anchor, side = where.T
    ladder = start.new_tensor([*curves.series.ladder, _FAR])
    edges = torch.stack([-ladder.flip(0), ladder])[side]
    extra, ignored = [], torch.zeros_like(start)
    if curves.base is not None and curves.base.edges:
        at, scale = start.new_tensor(curves.base.edges) / curves.unit, curves.scale[channel, None]
        extra.append(scale * (at - curves.points[channel].gather(1, anchor[:, None])))
    if curves.series.knots:
        knots = start.new_tensor([sign * knot for knot in curves.series.knots for sign in (-1, 1)])
        extra.append((_from_anchor(curves, channel, anchor)[:, :, None] + knots).flatten(1))
    if extra:
        edges = torch.cat([edges, *extra], 1)
        # Knots this near each other in one cell change a slope by their distance² / 2; in x it must be small as well.
        in_z = torch.ones_like(start) if curves.base is None else curves.root[channel].clamp(max=1)
        ignored = 1e-8 / edges.shape[1] * in_z
    edges = edges.clamp(start[:, None], stop[:, None])
    if extra:
        edges = edges.sort(1).values
    width = edges.diff(dim=1)
    keep = width > ignored[:, None]
    keep.scatter_(1, width.argmax(1, keepdim=True), True)
    # What is not kept goes to the next cell that is, or to the last.
    reached = torch.where(keep, edges[:, 1:], start[:, None]).cummax(1).values
    starts = torch.cat([start[:, None], reached[:, :-1]], 1)
    ends = torch.where(reached == reached[:, -1:], stop[:, None], edges[:, 1:])
    row = keep.nonzero()[:, 0]
    starts, ends = starts[keep], ends[keep]
    far = torch.minimum(starts.abs(), ends.abs()) >= (1 - 1e-8) * curves.series.ladder[-1]
    return channel[row], anchor[row], starts, ends, far


def polynomials(curves: Curves, cells: Cells) -> tuple[Tensor, Tensor]:  # [B, size], [B, size]
    """Return curve and slope in z, without height, on each cell: coefficients of yᵏ, where z = centre + half y."""
    centre, base = cells.centre, curves.base
    size = max(curves.series.size, base.size if base else 0)
    value = centre.new_zeros(len(centre), size)
    for rows in _chunks((~cells.far).nonzero()[:, 0], curves):
        u = centre[rows, None] - _from_anchor(curves, cells.channel[rows], cells.anchor[rows])
        terms = curves.series.terms(curves.alpha[cells.channel[rows]], u.clamp(-1e100, 1e100))
        value[rows, : curves.series.size] = torch.stack([term.sum(1) for term in terms], 1)
    value, slope = _in_y(value, cells.half.masked_fill(cells.far, 0))
    if base is None:
        return value, slope
    height, root = curves.height[cells.channel, None], curves.root[cells.channel, None]
    beneath, steep = _in_y(base.terms(places(curves, cells)), cells.half / root[:, 0])
    value[:, : base.size] += beneath / height
    slope[:, : base.size] += steep / (height * root)
    return value, slope


def places(curves: Curves, cells: Cells) -> Tensor:  # [B]
    """Return the centres in x."""
    point = curves.points[cells.channel, cells.anchor]
    return curves.unit * (point + cells.centre / curves.scale[cells.channel])


def _in_y(terms: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:  # [B, size], [B] -> [B, size], [B, size]
    """Return a polynomial, and its derivative, in y from one in half y."""
    slope = torch.zeros_like(terms)
    slope[:, :-1] = terms[:, 1:] * torch.arange(1, terms.shape[1], device="cpu")
    powers = half[:, None] ** torch.arange(terms.shape[1], device="cpu")
    powers = powers.clamp(max=_FAR)  # of a line, whose other terms are 0
    return terms * powers, slope * powers


def margins(curves: Curves, cells: Cells) -> tuple[Tensor, Tensor]:  # [B], [B]
    """Return how far values and slopes that are computed from `polynomials` may be off.

    That is the series' remainder, and rounding: 100 times for a term, D times for their sum over the points, 16 times
    for each of up to 15 halvings and for the polynomial itself, of what comes to at most 4 mass in absolute values.
    A base has the same, without the sum, of at most 4 (1 + |x|), of slopes of 4. That its x and the kernels' z, both
    rounded, are a few roundings out of step is one more in the size of either, or less than cells overlap.
    """
    rounding = 4 * (curves.alpha.shape[1] + 512) * EPS / 2
    value, slope = (((r + rounding) * curves.mass)[cells.channel] for r in curves.series.remainders)
    base = curves.base
    if base is None:
        return value, slope
    unit, rounding = curves.height[cells.channel], 4 * 512 * EPS / 2
    x = places(curves, cells)
    size = torch.where((x.abs() < base.far) | base.on_line(x), 1 + x.abs() + cells.half / curves.root[cells.channel], 1)
    value = value + (base.remainders[0] + rounding * size) / unit
    return value, slope + (base.remainders[1] + rounding) / (unit * curves.root[cells.channel])


def suprema(
    polynomial: Tensor,  # [B, size]
    owner: Tensor,  # [B]
    tolerance: Tensor,  # [O]
) -> Tensor:  # [O]
    """Return the largest value on [-1, 1] of each owner's polynomials, or what is at most `tolerance` more.

    By branch and bound: a polynomial is at most the largest value of its first three terms plus the sum of the other
    coefficients' absolute values, and has at least its own value where those three are largest. Rounding of values
    next to which `tolerance` is nothing is not searched for.
    """
    best, retired = torch.full_like(tolerance, -math.inf), torch.full_like(tolerance, -math.inf)
    while len(owner):
        y, upper = largest(polynomial)
        lower = polynomial[:, -1]
        for k in range(polynomial.shape[1] - 2, -1, -1):
            lower = torch.addcmul(polynomial[:, k], lower, y)
        best = best.scatter_reduce(0, owner, lower, "amax")
        split = upper > (best + tolerance)[owner] + 64 * EPS * upper.abs()
        retired = retired.scatter_reduce(0, owner[~split], upper[~split], "amax")
        polynomial, owner = torch.cat(halved(polynomial[split])), owner[split].repeat(2)
    return torch.maximum(best, retired)


def halved(polynomial: Tensor) -> tuple[Tensor, Tensor]:  # [B, size] -> [B, size], [B, size]
    """Return the polynomials on their left and right half, each in a y of its own from -1 to 1."""
    left, right = _halves(polynomial.shape[1])
    return polynomial @ left, polynomial @ right


@lru_cache
def _halves(size: int) -> tuple[Tensor, Tensor]:
    """Return the matrices of the substitutions y = (y ∓ 1) / 2."""
    rows = (
        [[math.comb(k, j) * side ** (k - j) / 2**k if j <= k else 0.0 for j in range(size)] for k in range(size)]
        for side in (-1, 1)
    )
    left, right = (torch.tensor(matrix, dtype=torch.float64, device="cpu") for matrix in rows)
    return left, right


def largest(polynomial: Tensor) -> tuple[Tensor, Tensor]:  # [B, size] -> [B], [B]
    """Return where in [-1, 1] the first three terms are largest, and an upper bound of all."""
    constant, linear, square = polynomial[:, :3].T
    end = torch.where((linear == 0) & (square > 0), 1, linear.sign())  # of an even parabola either end, not its middle
    y = torch.where(square < 0, (linear / (-2 * square)).clamp(-1, 1), end)
    return y, constant + y * (linear + y * square) + polynomial[:, 3:].abs().sum(1)


def _from_anchor(curves: Curves, channel: Tensor, anchor: Tensor) -> Tensor:  # [B], [B] -> [B, D]
    """Return every point's z."""
    points = curves.points[channel]
    return curves.scale[channel, None] * (points - points.gather(1, anchor[:, None]))


def _chunks(rows: Tensor, curves: Curves) -> Iterator[Tensor]:
    return iter(rows.split(max(1, _AT_ONCE // curves.alpha.shape[1])))
