"""Certified bounds of KAF curves and of their slopes, on any interval and on ℝ."""

import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from kafops.bounds.cells import margins, partition, polynomials, suprema
from kafops.bounds.curves import EPS, Curves, normalised
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
) -> Range:  # [C], [C]
    """Return a certified minimum and maximum of each curve on [lower, upper].

    .. math:: f_c(x) = \\sum_{d=1}^{D} \\alpha_{c,d} \\kappa(\\sqrt{\\gamma_c} (x - \\delta_{c,d}))

    The minimum is at most f's infimum and the maximum at least its supremum, where f is the real function that these
    parameters define; the rounding of the computation is allowed for. Both are within 1e-11 Σ|α| of these, for D up to
    4096 (with the ends of the interval moved outward by 1e-15 max(|end|, boundary)). On ℝ a supremum may be the limit
    0 and no value. An f that is computed in float32 is off by its own rounding on top: docs/cpu-kernels.md#exactness.

    Args:
        alpha: mixing coefficients, float32 or float64, finite.
        gamma: bandwidths in units of 1/x², positive and finite.
        boundary: half-width of a uniform dictionary in the units of x, as for `kafops.kaf`; or the points of a free
            one, as for `kafops.kaf_free`, in any order, repeated or not.
        lower, upper: ends of the interval, the same or one for each channel; None, or -inf and inf, for no end.
        kernel: "gaussian" (default), κ(u) = exp(-u²); "rational_quadratic", "matern32" or "bspline".

    Returns:
        (minimum, maximum), each [C], float64 on the CPU, without gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape, or a value that is NaN or out of its
            range; lower > upper in a channel.

    How: near its points a curve is a polynomial, Taylor's, on each of some dozens of cells, up to a remainder that is
    bounded; branch and bound finds the supremum of these polynomials.

    Example:
        >>> layer = kafops.KAF(16)
        >>> minimum, maximum = kafops.bounds.value_bounds(layer.alpha, layer.bandwidths(), layer.boundary, -1.0, 1.0)
    """
    return _bounds(normalised(alpha, gamma, boundary, kernel), lower, upper, (0,))[0]


def slope_bounds(
    alpha: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    boundary: float | Tensor,  # or a dictionary [C, D] or [1, D]
    lower: float | Tensor | None = None,  # or [C] or [1]
    upper: float | Tensor | None = None,  # or [C] or [1]
    kernel: str = "gaussian",
) -> Range:  # [C], [C]
    """Return a certified minimum and maximum of each curve's derivative f′ on [lower, upper].

    As `value_bounds`, but of f′, and within 1e-11 sqrt(γ) Σ|α|.

    Example:
        >>> minimum, maximum = kafops.bounds.slope_bounds(layer.alpha, layer.bandwidths(), layer.boundary)
        >>> lipschitz = torch.maximum(-minimum, maximum)
    """
    return _bounds(normalised(alpha, gamma, boundary, kernel), lower, upper, (1,))[0]


def curve_bounds(
    alpha: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    boundary: float | Tensor,  # or a dictionary [C, D] or [1, D]
    lower: float | Tensor | None = None,  # or [C] or [1]
    upper: float | Tensor | None = None,  # or [C] or [1]
    kernel: str = "gaussian",
) -> CurveBounds:
    """Return what `value_bounds` and `slope_bounds` return, and Lipschitz constants, in the time of one of them.

    Example:
        >>> kafops.bounds.curve_bounds(layer.alpha, layer.bandwidths(), layer.boundary).lipschitz
    """
    value, slope = _bounds(normalised(alpha, gamma, boundary, kernel), lower, upper, (0, 1))
    return CurveBounds(value, slope, torch.maximum(-slope.minimum, slope.maximum))


def _bounds(
    curves: Curves, lower: float | Tensor | None, upper: float | Tensor | None, orders: tuple[int, ...]
) -> list[Range]:
    count = len(curves.scale)
    first, last = _end("lower", lower, -math.inf, count), _end("upper", upper, math.inf, count)
    if (first > last).any():
        c = int((first > last).nonzero()[0])
        raise ValueError(f"lower must not exceed upper, got lower={first[c]} and upper={last[c]} in channel {c}")
    cells = partition(curves, first, last)
    pieces = polynomials(curves, cells)
    both = [sign * pieces[order] for order in orders for sign in (-1, 1)]
    owner = torch.cat([cells.channel + i * count for i in range(len(both))])
    found = suprema(torch.cat(both), owner, (_TOLERANCE * curves.mass).repeat(len(both)))
    result = []
    for order, (below, above) in zip(orders, found.view(len(orders), 2, count), strict=True):
        margin, (most_below, most_above) = margins(curves)[order], _whatever_the_interval(curves, order)
        minimum = 0.0 - _up(curves, order, torch.minimum(below + margin, most_below))
        maximum = _up(curves, order, torch.minimum(above + margin, most_above))
        result.append(Range(minimum, maximum))
    return result


def _whatever_the_interval(curves: Curves, order: int) -> tuple[Tensor, Tensor]:  # [C], [C]
    """Return upper bounds of minus and plus a normalised curve, or slope, that need no search."""
    rounding = 1 + curves.alpha.shape[1] * EPS
    if order:
        most = curves.mass * curves.series.peaks[1] * (1 + 4 * EPS)
        return most, most
    return (-curves.alpha).clamp(min=0).sum(1) * rounding, curves.alpha.clamp(min=0).sum(1) * rounding


def _up(curves: Curves, order: int, bound: Tensor) -> Tensor:
    """Return an upper bound of the curves, or slopes, from that of the normalised ones."""
    product = (bound * curves.root if order else bound) * curves.height
    up = torch.nextafter(product + 4 * EPS * product.abs(), torch.full_like(product, math.inf))
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
