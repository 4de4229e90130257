"""Curves in the units of their kernels, from the parameters of a KAF, which are checked here."""

import math
import numbers
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kafops import bases
from kafops.bounds.bases import BENEATH, Beneath
from kafops.bounds.series import SERIES, Series

__all__ = ["EPS", "Curves", "Piece", "normalised", "pieces"]

EPS = 2.0**-52


@dataclass(frozen=True)
class Curves:
    """C curves base(x) + height[c] Σ_d alpha[c, d] κ(scale[c] (x / unit - points[c, d])), all float64 on the CPU.

    Attributes:
        alpha: [C, D], of absolute value at most 1.
        height: [C], at least 1 where there is a base.
        points: [C, D], ascending; on a uniform dictionary multiples of 1/2, which are exact.
        unit: the spacing of a uniform dictionary, or 1.
        scale: [C], sqrt(γ) unit.
        root: [C], sqrt(γ), by which slopes in scale x / unit become slopes in x.
        blur: [C], what rounding adds to scale x / unit at the points.
        series: the kernel.
        base: the base, or None.
    """

    alpha: Tensor
    height: Tensor
    points: Tensor
    unit: float
    scale: Tensor
    root: Tensor
    blur: Tensor
    series: Series
    base: Beneath | None = None

    @property
    def mass(self) -> Tensor:
        """Σ|alpha| [C], rounded up, and at least a tiny number."""
        return (self.alpha.abs().sum(1) * (1 + self.alpha.shape[1] * EPS)).clamp(min=1e-300)

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """Where cells end [C], [C], so that kernels do not matter and a base is a line beyond; ±inf without a base."""
        if self.base is None:
            everywhere = torch.full_like(self.scale, math.inf)
            return -everywhere, everywhere
        first, last = self.unit * self.points[:, 0], self.unit * self.points[:, -1]
        beyond = (1 + 1e-6) * self.series.ladder[-1] / self.root
        first, last = first - 8 * EPS * first.abs() - beyond, last + 8 * EPS * last.abs() + beyond
        return first.clamp(max=-self.base.far), last.clamp(min=self.base.far)


class Piece(NamedTuple):
    """Curves on the part [first, last] of ℝ."""

    curves: Curves
    first: float
    last: float


def pieces(alpha: Tensor, gamma: Tensor, boundary: float | Tensor, kernel: str, base: str | None) -> tuple[Piece, ...]:
    """Check the arguments of `kafops.bounds.value_bounds` and return their curves, whose bases are analytic.

    Where two pieces meet both count, and with them the slopes on both sides of a kink.

    Raises:
        TypeError, ValueError: as `normalised`, or there is no such base.
    """
    if bases.named(base) is not None and base not in BENEATH:
        left, right = (normalised(alpha, gamma, boundary, kernel, b) for b in (None, BENEATH["identity"]))
        return Piece(left, -math.inf, 0.0), Piece(right, 0.0, math.inf)
    curves = normalised(alpha, gamma, boundary, kernel, None if base is None else BENEATH[base])
    return (Piece(curves, -math.inf, math.inf),)


def normalised(
    alpha: Tensor, gamma: Tensor, boundary: float | Tensor, kernel: str, base: Beneath | None = None
) -> Curves:
    """Check the arguments of `kafops.bounds.value_bounds` and return their curves.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape, or a value out of its range.
    """
    if not isinstance(kernel, str):
        raise TypeError(f"kernel must be a string, got {type(kernel).__name__}")
    if kernel not in SERIES:
        raise ValueError(f"kernel must be one of {', '.join(map(repr, SERIES))}, got {kernel!r}")
    alpha, gamma = _parameter("alpha", alpha, 2), _parameter("gamma", gamma, 1)
    size, rows = alpha.shape[1], {"alpha": len(alpha), "gamma": len(gamma)}
    if size == 0:
        raise ValueError(f"alpha must have at least one coefficient per channel, got shape {list(alpha.shape)}")
    if not (gamma > 0).all():
        raise ValueError(f"gamma must be positive, got {gamma[~(gamma > 0)][0].item()}")
    if isinstance(boundary, Tensor):
        unit, points = 1.0, _parameter("boundary (a dictionary)", boundary, 2)
        rows["boundary"] = len(points)
        if points.shape[1] != size:
            raise ValueError(
                "boundary (a dictionary) and alpha must have the same number of points D, got boundary "
                f"{list(points.shape)} and alpha {list(alpha.shape)}"
            )
    else:
        unit = _half_width(boundary) / ((size - 1) / 2) if size > 1 else 1.0
        points = (torch.arange(size, dtype=torch.float64, device="cpu") - (size - 1) / 2)[None]
    several = sorted({n for n in rows.values() if n != 1})
    if len(several) > 1:
        raise ValueError(f"parameters must have one row per channel or a single row, got rows {rows}")
    channels = several[0] if several else 1
    points, order = points.expand(channels, -1).sort(1)
    alpha = alpha.expand(channels, -1).gather(1, order)
    height, root = alpha.abs().amax(1), gamma.sqrt().expand(channels)
    if base is not None:
        height = height.clamp(min=1)
    scale = root * unit
    return Curves(
        alpha=alpha / torch.where(height > 0, height, 1.0)[:, None],
        height=height,
        points=points,
        unit=unit,
        scale=scale,
        root=root,
        blur=scale * (0.0 if isinstance(boundary, Tensor) else 2 * EPS * (size - 1)),
        series=SERIES[kernel],
        base=base,
    )


def _parameter(name: str, value: Tensor, dim: int) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got dtype {value.dtype}")
    if value.dim() != dim:
        wanted = "[C, D] or [1, D]" if dim == 2 else "[C] or [1]"
        raise ValueError(f"{name} must have shape {wanted}, got {list(value.shape)}")
    value = value.detach().to(device="cpu", dtype=torch.float64)
    if not value.isfinite().all():
        raise ValueError(f"{name} must be finite, got {value[~value.isfinite()][0].item()}")
    return value


def _half_width(boundary: float) -> float:
    # Within these limits no product or quotient with sqrt(γ) or x overflows where it matters.
    wanted = "boundary must be a number between 1e-100 and 1e100, or a dictionary tensor"
    if isinstance(boundary, bool) or not isinstance(boundary, numbers.Real):
        raise TypeError(f"{wanted}, got {type(boundary).__name__}")
    if not 1e-100 <= boundary <= 1e100:
        raise ValueError(f"{wanted}, got boundary={boundary}")
    return float(boundary)
