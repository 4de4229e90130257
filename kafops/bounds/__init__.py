"""Certified bounds of KAF curves and of their slopes, on any interval and on ℝ."""

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kafops.bounds.cells import margins, partition, polynomials, suprema
from kafops.bounds.curves import EPS, Curves, Piece, pieces
from kafops.bounds.ranges import CurveRanges, Range

__all__ = ["CurveBounds", "CurveRanges", "Range", "curve_bounds", "slope_bounds", "value_bounds"]

_TOLERANCE = 1e-12  # of branch and bound, as a multiple of Σ|α|


class CurveBounds(NamedTuple):
    """Bounds of each of C curves.

    Attributes:
        value: of f, two tensors [C].
        slope: of f′, two tensors [C], in units of 1/x.
        lipschitz: of |f′|, [C].
    """

    value: Range
    slope: Range
    lipschitz: Tensor


def value_bounds(
    alpha: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    boundary: float | Tensor,  # or a dictionary [C, D] or [1, D]
    lower: float | Tensor | None = None,  # or [C] or [1]
    upper: float | Tensor | None = None,  # or [C] or [1]
    kernel: str = "gaussian",
    *,
    base: str | None = None,
) -> Range:  # [C], [C]
    """Return a certified minimum and maximum of each curve on [lower, upper].

    .. math:: f_c(x) = base(x) + \\sum_{d=1}^{D} \\alpha_{c,d} \\kappa(\\sqrt{\\gamma_c} (x - \\delta_{c,d}))

    The minimum is at most f's infimum and the maximum at least its supremum, where f is the real function that these
    parameters define; the rounding of the computation is allowed for. Both are within 1e-11 Σ|α| of these, for D up to
    4096 (with the ends of the interval moved outward by 1e-15 max(|end|, boundary)); with a base, within 1e-11 (Σ|α| +
    1 + |x|), x the place of either. On ℝ a supremum may be a limit and no value, and with a base infinite. An f that is
    computed in float32 is off by its own rounding on top: docs/cpu-kernels.md#exactness.

    Args:
        alpha: mixing coefficients, float32, float64, bfloat16 or float16, finite.
        gamma: bandwidths in units of 1/x², positive and finite.
        boundary: half-width of a uniform dictionary in the units of x, as for `kafops.kaf`; or the points of a free
            one, as for `kafops.kaf_free`, in any order, repeated or not.
        lower, upper: ends of the interval, the same or one for each channel; None, or -inf and inf, for no end.
        kernel: "gaussian" (default), κ(u) = exp(-u²); "rational_quadratic", "matern32" or "bspline".
        base: None, "identity", "relu", "silu" or "gelu" (`kafops.bases`).

    Returns:
        (minimum, maximum), each [C], float64 on the CPU, without gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape, or a value that is NaN or out of its
            range; lower > upper in a channel.

    How: near its points a curve is a polynomial, Taylor's, on each of some dozens of cells, up to a remainder that is
    bounded; so is a base, on cells at most 1/2 wide. Branch and bound finds the supremum of these polynomials.

    Example:
        >>> layer = kafops.KAF(16)
        >>> minimum, maximum = kafops.bounds.value_bounds(layer.alpha, layer.bandwidths(), layer.boundary, -1.0, 1.0)
    """
    return _bounds(pieces(alpha, gamma, boundary, kernel, base), lower, upper, (0,))[0]


def slope_bounds(
    alpha: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    boundary: float | Tensor,  # or a dictionary [C, D] or [1, D]
    lower: float | Tensor | None = None,  # or [C] or [1]
    upper: float | Tensor | None = None,  # or [C] or [1]
    kernel: str = "gaussian",
    *,
    base: str | None = None,
) -> Range:  # [C], [C]
    """Return a certified minimum and maximum of each curve's derivative f′ on [lower, upper].

    As `value_bounds`, but of f′, and within 1e-11 sqrt(γ) Σ|α|; with a base, within 1e-11 (sqrt(γ) Σ|α| + 1). At the
    kink of "relu" the slopes on both sides count, also where it is an end of the interval.

    Example:
        >>> minimum, maximum = kafops.bounds.slope_bounds(layer.alpha, layer.bandwidths(), layer.boundary)
        >>> lipschitz = torch.maximum(-minimum, maximum)
    """
    return _bounds(pieces(alpha, gamma, boundary, kernel, base), lower, upper, (1,))[0]


def curve_bounds(
    alpha: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    boundary: float | Tensor,  # or a dictionary [C, D] or [1, D]
    lower: float | Tensor | None = None,  # or [C] or [1]
    upper: float | Tensor | None = None,  # or [C] or [1]
    kernel: str = "gaussian",
    *,
    base: str | None = None,
) -> CurveBounds:
    """Return what `value_bounds` and `slope_bounds` return, and Lipschitz constants, in the time of one of them.

    Example:
        >>> kafops.bounds.curve_bounds(layer.alpha, layer.bandwidths(), layer.boundary).lipschitz.shape
        torch.Size([16])
    """
    value, slope = _bounds(pieces(alpha, gamma, boundary, kernel, base), lower, upper, (0, 1))
    return CurveBounds(value, slope, torch.maximum(-slope.minimum, slope.maximum))


def _bounds(
    pieces: Sequence[Piece], lower: float | Tensor | None, upper: float | Tensor | None, orders: tuple[int, ...]
) -> list[Range]:
    count = len(pieces[0].curves.scale)
    first, last = _end("lower", lower, -math.inf, count), _end("upper", upper, math.inf, count)
    if (first > last).any():
        c = int((first > last).nonzero()[0])
        raise ValueError(f"lower must not exceed upper, got lower={first[c]} and upper={last[c]} in channel {c}")
    found = torch.stack([_on_piece(piece, first, last, orders) for piece in pieces]).amax(0)
    return [Range(0.0 - below, above) for below, above in found]


def _on_piece(piece: Piece, lower: Tensor, upper: Tensor, orders: tuple[int, ...]) -> Tensor:  # [orders, 2, C]
    """Return upper bounds of minus and plus the curves, or slopes, on a piece of ℝ; -inf where it is out of reach."""
    curves, count = piece.curves, len(lower)
    reached = (lower <= piece.last) & (upper >= piece.first)
    lower, upper = lower.clamp(piece.first, piece.last), upper.clamp(piece.first, piece.last)
    first, last = curves.ends
    cells = partition(curves, lower.clamp(first, last), upper.clamp(first, last))
    all_pieces, all_margins = polynomials(curves, cells), margins(curves, cells)
    both = [sign * all_pieces[order] for order in orders for sign in (-1, 1)]
    for i, polynomial in enumerate(both):
        polynomial[:, 0] += all_margins[orders[i // 2]]
    owner = torch.cat([cells.channel + i * count for i in range(len(both))])
    size = [curves.mass + (0 if curves.base is None else 1 / _unit(curves, order)) for order in orders]
    tolerance = _TOLERANCE * torch.stack(size).repeat_interleave(2, 0).flatten()
    found = suprema(torch.cat(both), owner, tolerance).view(len(orders), 2, count)
    result = []
    for order, bound in zip(orders, found, strict=True):
        if curves.base is not None:
            bound = torch.where((lower <= last) & (upper >= first), bound, -math.inf)
            for start, end in ((lower, upper.minimum(first)), (lower.maximum(last), upper)):
                tail = _base(curves, order, start, end) + curves.series.remainders[order] * curves.mass
                bound = torch.maximum(bound, torch.where(start <= end, tail, -math.inf))
        bound = torch.minimum(bound, _by_size(curves, order) + _base(curves, order, lower, upper))
        result.append(torch.where(reached, _up(curves, order, bound), -math.inf))
    return torch.stack(result)


def _by_size(curves: Curves, order: int) -> Tensor:  # [2, C]
    """Return upper bounds of minus and plus the sum over the points, or its slope, that need no search."""
    rounding = 1 + curves.alpha.shape[1] * EPS
    if order:
        return (curves.mass * curves.series.peaks[1] * (1 + 4 * EPS)).expand(2, -1)
    return torch.stack([(sign * curves.alpha).clamp(min=0).sum(1) * rounding for sign in (-1, 1)])


def _base(curves: Curves, order: int, lower: Tensor, upper: Tensor) -> Tensor:  # [2, C]
    """Return upper bounds of minus and plus the base, or its slope, on intervals, in the curves' units."""
    if curves.base is None:
        return torch.zeros(2, len(lower), dtype=torch.float64, device="cpu")
    least, most = curves.base.extremes(order, lower, upper)
    bound = torch.stack([-least, most]) / _unit(curves, order)
    return bound + EPS * bound.abs().clamp(max=1e300)


def _unit(curves: Curves, order: int) -> Tensor:  # [C]
    return curves.height * curves.root if order else curves.height


def _up(curves: Curves, order: int, bound: Tensor) -> Tensor:
    """Return an upper bound of the curves, or slopes, from that of the normalised ones."""
    product = bound * _unit(curves, order)
    up = torch.nextafter(product + 4 * EPS * product.abs(), torch.full_like(product, math.inf))
    up = torch.where(product.isinf(), product, up)
    return torch.where((bound == 0) | (curves.height == 0), 0.0, up)


def _end(name: str, value: float | Tensor | None, default: float, channels: int) -> Tensor:  # [C]
    wanted = f"{name} must be None, a number, or a floating tensor [C] = [{channels}] or [1]"
    if value is None:
        value = default
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{wanted}, got dtype {value.dtype}")
        if value.dim() > 1 or (value.dim() == 1 and len(value) not in (1, channels)):
            raise ValueError(f"{wanted}, got shape {list(value.shape)}")
        end = value.detach().to(device="cpu", dtype=torch.float64).expand(channels)
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{wanted}, got {type(value).__name__}")
    else:
        end = torch.full((channels,), float(value), dtype=torch.float64, device="cpu")
    if end.isnan().any():
        raise ValueError(f"{wanted}, got nan")
    return end
