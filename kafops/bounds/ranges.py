"""Bounds of curves on many intervals at once: a table of cells for each curve, made once."""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kafops.bounds.bases import Beneath
from kafops.bounds.cells import Cells, halved, largest, margins, partition, places, polynomials
from kafops.bounds.curves import EPS, Curves, pieces

__all__ = ["CurveRanges", "Range"]

_FINEST = 1 / 32  # half a cell, in units of 1/sqrt(γ), near a point of the dictionary; in x for a base, near 0
_AT_ONCE = 2**15  # intervals, so that temporaries stay in the cache


class Range(NamedTuple):
    """A minimum and a maximum, tensors of one shape."""

    minimum: Tensor
    maximum: Tensor


class CurveRanges:
    """Certified bounds of KAF curves, and of their slopes, on any number of intervals.

    For interval propagation through networks. Each curve is cut into a few hundred cells, on each of which it is a
    cubic up to a small remainder; ranges of runs of 1, 2, 4, ... cells are kept too. An interval then costs about a
    third of a microsecond, whatever its length and D.

    Bounds are certified as those of `kafops.bounds.value_bounds`, but not as close: within 3e-4 Σ|α|, or sqrt(γ) times
    as much for slopes, and closer on short intervals: within 2e-5 Σ|α| where lower = upper; with a base, that of Σ|α| +
    1, or of sqrt(γ) Σ|α| + 1. The cells are fixed in x, in float64: once |x| > 1e10/sqrt(γ) at a point of the
    dictionary, its rounding widens the bounds.

    Args:
        alpha, gamma, boundary, kernel, base: as for `kafops.bounds.value_bounds`. Copied; gradients do not flow.

    Raises:
        TypeError, ValueError: as `kafops.bounds.value_bounds`.

    Memory: for values and for slopes, each when first asked for, about 50 kB for each curve of 20 points; with a base
    about 100 kB.

    Example:
        >>> ranges = kafops.bounds.CurveRanges(layer.alpha, layer.bandwidths(), layer.boundary)
        >>> x = torch.randn(8, 16, 32, 32)
        >>> minimum, maximum = ranges.values(x - 0.1, x + 0.1)
    """

    def __init__(
        self,
        alpha: Tensor,  # [C, D] or [1, D]
        gamma: Tensor,  # [C] or [1]
        boundary: float | Tensor,  # or a dictionary [C, D] or [1, D]
        kernel: str = "gaussian",
        *,
        base: str | None = None,
    ) -> None:
        self._pieces = pieces(alpha, gamma, boundary, kernel, base)
        self._device = alpha.device

    def values(self, lower: Tensor, upper: Tensor) -> Range:  # [N, C, *], [N, C, *]
        """Return bounds of f_c on each interval [lower, upper].

        Args:
            lower, upper: [N, C, *], floating, on alpha's device; any shape where there is one curve. ±inf are allowed.

        Returns:
            (minimum, maximum), each as lower, in float64. Round outward when casting them to float32.

        Raises:
            TypeError, ValueError: shapes, dtypes or devices do not fit, lower > upper, or NaN.
        """
        return self._values.bounds(*self._checked(lower, upper))

    def slopes(self, lower: Tensor, upper: Tensor) -> Range:  # [N, C, *], [N, C, *]
        """Return bounds of f_c′ on each interval [lower, upper], in units of 1/x; as `values`."""
        return self._slopes.bounds(*self._checked(lower, upper))

    @cached_property
    def _values(self) -> "_Table | _Sides":
        return self._tables(0)

    @cached_property
    def _slopes(self) -> "_Table | _Sides":
        return self._tables(1)

    def _tables(self, order: int) -> "_Table | _Sides":
        tables = [_table(piece.curves, order, self._device) for piece in self._pieces]
        return _Sides(*tables) if len(tables) > 1 else tables[0]

    def _checked(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        channels = len(self._pieces[0].curves.scale)
        for name, t in (("lower", lower), ("upper", upper)):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
            if not t.is_floating_point():
                raise TypeError(f"{name} must be a floating tensor, got dtype {t.dtype}")
            if t.device != self._device:
                raise ValueError(f"{name} is on {t.device}, but the curves are on {self._device}; move one with .to()")
        if lower.shape != upper.shape:
            raise ValueError(f"lower and upper must have one shape, got {list(lower.shape)} and {list(upper.shape)}")
        if channels != 1 and (lower.dim() < 2 or lower.shape[1] != channels):
            raise ValueError(
                f"lower and upper must have shape [N, C, *] with C = {channels}, one for each curve, "
                f"got {list(lower.shape)}"
            )
        wrong = ~(lower <= upper)
        if wrong.any():
            at = tuple(int(i) for i in wrong.nonzero()[0])
            raise ValueError(
                f"lower must not exceed upper, and neither be nan, got lower={lower[at].item()} and "
                f"upper={upper[at].item()} at {list(at)}"
            )
        return lower.detach().double(), upper.detach().double()


class _Table(NamedTuple):
    """C curves, or slopes, on K cells each.

    Attributes:
        edges: [C, K - 1], x where the next cell begins.
        rows: [C K, 7], a cell's centre in x, 1 / half its width, four coefficients and the remainder of the cubic.
        extremes: [levels C K, 2], of -f and f on 2^level cells from this one on.
        level: [K + 1], the level of the longest run in that many cells.
        beyond: the base and what else may be there, where it goes on beyond the cells.
    """

    edges: Tensor
    rows: Tensor
    extremes: Tensor
    level: Tensor
    beyond: "_Beyond | None"

    def bounds(self, lower: Tensor, upper: Tensor) -> Range:
        """Return the bounds on intervals, of shape [N, C, *] where there are several curves."""
        curves = len(self.edges)
        if curves == 1:
            ends = torch.stack([lower.reshape(1, -1), upper.reshape(1, -1)])
        else:
            ends = torch.stack([lower, upper]).transpose(1, 2).flatten(2)  # [2, C, N *]
        found = torch.empty_like(ends)
        for part in range(0, ends.shape[2], max(1, _AT_ONCE // max(1, curves))):
            columns = slice(part, part + max(1, _AT_ONCE // max(1, curves)))
            found[..., columns] = self._everywhere(*ends[..., columns].contiguous())
        if curves == 1:
            return Range(*found.view(2, *lower.shape))
        n, _, *rest = lower.shape
        minimum, maximum = found.unflatten(2, (n, *rest)).transpose(1, 2)
        return Range(minimum, maximum)

    def _everywhere(self, lower: Tensor, upper: Tensor) -> Tensor:  # [C, M], [C, M] -> [2, C, M]
        if self.beyond is None:
            return self._bounds(lower.clamp(-1e300, 1e300), upper.clamp(-1e300, 1e300))
        first, last = self.beyond.first, self.beyond.last
        minimum, maximum = self._bounds(lower.clamp(first, last), upper.clamp(first, last))
        out_of_reach = (lower > last) | (upper < first)
        minimum, maximum = minimum.masked_fill(out_of_reach, torch.inf), maximum.masked_fill(out_of_reach, -torch.inf)
        for start, end in ((lower, upper.minimum(first)), (lower.maximum(last), upper)):
            if not (start <= end).any():
                continue
            least, most = self.beyond.base.extremes(self.beyond.order, start, end)
            minimum = torch.where(start <= end, minimum.minimum(least - self.beyond.tail), minimum)
            maximum = torch.where(start <= end, maximum.maximum(most + self.beyond.tail), maximum)
        return torch.stack([minimum, maximum])

    def _bounds(self, lower: Tensor, upper: Tensor) -> Tensor:  # [C, M], [C, M] -> [2, C, M]
        curves, cells = len(self.edges), self.edges.shape[1] + 1
        offset = cells * torch.arange(curves, device=lower.device)[:, None]
        first = torch.searchsorted(self.edges, lower, right=True)
        last = torch.searchsorted(self.edges, upper, right=True)
        same = first == last
        left, right = self.rows[first + offset].unbind(-1), self.rows[last + offset].unbind(-1)
        start = ((lower - left[0]) * left[1]).clamp(-1, 1)
        end = ((upper - right[0]) * right[1]).clamp(-1, 1)
        below, above = _cubic(left, start, torch.where(same, end, 1.0))
        more_below, more_above = _cubic(right, torch.where(same, start, -1.0), end)
        # The cells in between, by two runs that may overlap.
        count = (last - first - 1).clamp(min=0)
        level = self.level[count]
        run = level * (curves * cells) + offset
        one = self.extremes[run + (first + 1).clamp(max=cells - 1)]
        two = self.extremes[run + torch.where(count > 0, last - 2**level, last)]
        between = torch.maximum(one, two).masked_fill((count == 0)[..., None], -torch.inf)
        minus, plus = between.unbind(-1)
        below = torch.maximum(torch.maximum(below, more_below), minus)
        above = torch.maximum(torch.maximum(above, more_above), plus)
        return torch.stack([0.0 - below, above])


class _Beyond(NamedTuple):
    """What curves with a base are beyond their cells, which end at `first` and `last`: the base up to `tail`.

    Attributes:
        base: the base.
        order: 0 for curves, 1 for slopes.
        first, last, tail: [C, 1].
    """

    base: Beneath
    order: int
    first: Tensor
    last: Tensor
    tail: Tensor


class _Sides(NamedTuple):
    """Curves that are those of one table left of 0, and those of another right of it."""

    left: _Table
    right: _Table

    def bounds(self, lower: Tensor, upper: Tensor) -> Range:
        """Return the bounds on intervals, of both sides where 0 is one of an interval's points."""
        left = self.left.bounds(lower.clamp(max=0), upper.clamp(max=0))
        right = self.right.bounds(lower.clamp(min=0), upper.clamp(min=0))
        no_left, no_right = lower > 0, upper < 0
        return Range(
            torch.minimum(left.minimum.masked_fill(no_left, torch.inf), right.minimum.masked_fill(no_right, torch.inf)),
            torch.maximum(
                left.maximum.masked_fill(no_left, -torch.inf), right.maximum.masked_fill(no_right, -torch.inf)
            ),
        )


def _cubic(row: tuple[Tensor, ...], start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Return upper bounds of minus and plus the curve on [start, end] in y of its cell."""
    _, _, constant, linear, square, cube, remainder = row
    # The first three terms are extreme at an end or at the vertex, the fourth at an end.
    vertex = (linear / (-2 * square)).nan_to_num(0).clamp(start, end)
    at_start = start * (linear + start * square)
    at_vertex = vertex * (linear + vertex * square)
    at_end = end * (linear + end * square)
    cube_start, cube_end = cube * start**3, cube * end**3
    most = torch.maximum(torch.maximum(at_start, at_vertex), at_end) + torch.maximum(cube_start, cube_end)
    least = torch.minimum(torch.minimum(at_start, at_vertex), at_end) + torch.minimum(cube_start, cube_end)
    return remainder - constant - least, remainder + constant + most


def _table(curves: Curves, order: int, device: torch.device) -> _Table:
    first, last = curves.ends
    cells = partition(curves, first, last)
    cells, centre, half, polynomial = _refined(cells, polynomials(curves, cells)[order], _finest(curves, cells))
    channel = cells.channel
    point, scale = curves.points[channel, cells.anchor], curves.scale[channel]
    # Places in x, and so in which cell an x is found, are rounded.
    shift = 8 * EPS * (scale * point.abs() + torch.where(cells.flat, cells.near, cells.away))
    shift = shift + 2 * curves.blur[channel]
    margin = margins(curves, cells)[order]
    unit = (curves.height * curves.root if order else curves.height)[channel, None]
    underflow = torch.finfo(torch.float64).tiny * (unit > 0)
    remainder = polynomial[:, 4:].abs().sum(1) + margin + curves.series.peaks[order + 1] * curves.mass[channel] * shift
    beyond = None
    if curves.base is not None:
        step, x = shift / curves.root[channel], places(curves, cells)
        moved = curves.base.steepest[order] * step / unit[:, 0]
        if order:  # a line's slope stays
            moved[(x.abs() - half / curves.root[channel] >= curves.base.far) & (step <= 1)] = 0
        remainder = remainder + moved
        tail = curves.series.remainders[order] * curves.mass * (curves.height * curves.root if order else curves.height)
        beyond = _Beyond(curves.base, order, *(t[:, None].to(device) for t in (first, last, tail)))
    extremes = (torch.stack([largest(-polynomial)[1], largest(polynomial)[1]], 1) + margin[:, None]) * unit + underflow
    middle = curves.unit * (point + centre / scale).masked_fill(cells.flat, 0)
    inverse = torch.where(half > 1e-100, curves.root[channel] / half, 0.0)
    rows = [middle[:, None], inverse[:, None], polynomial[:, :4] * unit, remainder[:, None] * unit + underflow]

    # Curves with fewer cells than others get copies of the last, which is far.
    counts = torch.bincount(channel, minlength=len(curves.scale))
    most = int(counts.max()) if len(counts) else 1
    first = (counts.cumsum(0) - counts)[:, None]
    column = torch.arange(most, device="cpu")
    index = first + torch.minimum(column, counts[:, None] - 1)
    edges = (curves.unit * (point + cells.start / scale))[index]
    edges = edges.masked_fill(column >= counts[:, None], torch.inf)[:, 1:].cummax(1).values
    runs, width = [extremes[index]], 1
    while 2 * width <= most:
        shifted = torch.cat([runs[-1][:, width:], runs[-1][:, -1:].expand(-1, width, -1)], 1)
        runs.append(torch.maximum(runs[-1], shifted))
        width *= 2
    level = torch.frexp(torch.arange(most + 1, device="cpu").clamp(min=1).double()).exponent - 1
    return _Table(
        edges=edges.contiguous().to(device),
        beyond=beyond,
        rows=torch.cat(rows, 1)[index].flatten(0, 1).to(device),
        extremes=torch.stack(runs).flatten(0, 2).to(device),
        level=level.to(device),
    )


def _finest(curves: Curves, cells: Cells) -> Tensor:  # [B]
    """Return how large half of a cell may be, in z."""
    finest = _fraction(cells.centre)
    if curves.base is None:
        return finest
    x, root = places(curves, cells), curves.root[cells.channel]
    of_base = (root * _fraction(x)).masked_fill(x.abs() >= curves.base.far, torch.inf)
    return torch.minimum(of_base, finest.masked_fill(cells.far, torch.inf))


def _fraction(centre: Tensor) -> Tensor:
    return _FINEST * torch.hypot(torch.ones_like(centre), centre)


def _refined(cells: Cells, polynomial: Tensor, finest: Tensor) -> tuple[Cells, Tensor, Tensor, Tensor]:
    """Halve cells until they are fine; return them, their centres, halves and polynomials."""
    centre, half = cells.centre, cells.half
    times = (half / finest).log2().ceil().clamp(min=0).long()
    while (times > 0).any():
        split = times > 0
        index = torch.repeat_interleave(1 + split.long())
        second = torch.zeros_like(index, dtype=torch.bool)
        second[1:] = index[1:] == index[:-1]
        left, right = halved(polynomial)
        pieces = torch.where(split[:, None], left, polynomial)[index]
        polynomial = torch.where(second[:, None], right[index], pieces)
        split, middle = split[index], cells.centre[index]
        start = torch.where(second, middle, cells.start[index])
        end = torch.where(split & ~second, middle, cells.end[index])
        cells = Cells(cells.channel[index], cells.anchor[index], start, end, cells.far[index], cells.finite)
        half = torch.where(split, half[index] / 2, half[index])
        centre = centre[index] + torch.where(split, torch.where(second, half, -half), 0.0)
        times = times[index] - split.long()
    return cells, centre, half, polynomial
