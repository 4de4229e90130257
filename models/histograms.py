"""Histograms of values that come in batches, whose bins widen as far as the values reach.

A bin is as wide as a power of two, and 0 is always an edge. So two neighbours make one bin of twice the width, counted
exactly, and what comes out depends on the values alone, not on how they were cut into batches.
"""

import math

import torch
from torch import Tensor

from models.support.errors import UserError

BINS = 2048
_LEAST = -100  # exponent of the narrowest bins, so narrow that only zeros stay there
_CHUNK = 1 << 22  # values worked on at once


class NotFinite(UserError):
    """A value that no histogram holds."""


class Histogram:
    """Counts of values in rows [C], each row on bins of its own width.

    The bins of a row are [k w, (k + 1) w) for k = -bins/2 .. bins/2 - 1 with w a power of two, the least for which all
    its values fit: between 2/bins and 4/bins of the largest |value|.

    Args:
        rows: C, at least 1.
        bins: of a row, a power of two; memory is C · bins · 8 bytes.
        device: of counts and values.

    Attributes:
        counts: [C, bins], int64.
        exponent: [C], int64; w = 2^exponent.

    Example:
        >>> histogram = Histogram(3)
        >>> histogram.add(torch.randn(3, 1000))
        >>> histogram.upper(0.5)  # the three medians, at most a bin too high
    """

    def __init__(self, rows: int, bins: int = BINS, device: torch.device | str = "cpu") -> None:
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        if bins < 2 or bins & (bins - 1):
            raise ValueError(f"bins must be a power of two, at least 2, got {bins}")
        self.counts = torch.zeros(rows, bins, dtype=torch.int64, device=device)
        self.exponent = torch.full((rows,), _LEAST, dtype=torch.int64, device=device)

    @property
    def bins(self) -> int:
        """Bins of a row."""
        return self.counts.shape[1]

    @property
    def width(self) -> Tensor:  # [C], float64
        """The width of each row's bins, and the largest error of anything computed from the counts."""
        return _powers_of_two(self.exponent)

    def add(self, values: Tensor) -> None:
        """Count values [C, n], floating.

        Raises:
            ValueError: the shape is another one.
            NotFinite: a value is NaN or infinite; nothing is counted then.
        """
        rows = len(self.counts)
        if values.dim() != 2 or len(values) != rows:
            raise ValueError(f"values must be of shape [{rows}, n], got {list(values.shape)}")
        if values.numel() == 0:
            return
        values = values.detach()
        if values.dtype != torch.float64:
            values = values.float()
        low, high = values.aminmax(dim=1)
        reach = torch.maximum(-low, high)
        if not reach.isfinite().all():
            raise NotFinite(f"{int((~values.isfinite()).sum())} of {values.numel()} values are not finite")
        needed = torch.frexp(reach).exponent - round(math.log2(self.bins // 2))
        self._widen(torch.maximum(self.exponent, needed.masked_fill(reach == 0, _LEAST)))
        scale = _powers_of_two(-self.exponent).to(values.dtype)[:, None]
        start = torch.arange(rows, device=values.device)[:, None] * self.bins + self.bins // 2
        for chunk in values.split(max(1, _CHUNK // rows), 1):
            places = (chunk * scale).floor_().long() + start
            self.counts += torch.bincount(places.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def widened(self, exponent: Tensor) -> "Histogram":
        """Return the histogram on bins of width 2^exponent [C], which must not be narrower."""
        if (exponent < self.exponent).any():
            raise ValueError("exponent must not be below the histogram's own: bins cannot be parted again")
        other = Histogram(len(self.counts), self.bins, self.counts.device)
        other.counts, other.exponent = self.counts, self.exponent
        other._widen(exponent)
        return other

    def upper(self, share: float) -> Tensor:  # [C], float64
        """Return the least edge that has at least `share` of the values below it: a quantile, at most a bin too high.

        Raises:
            ValueError: share is not in (0, 1], or a row is empty.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0, at most 1, got {share}")
        total = self.counts.sum(1)
        if (total == 0).any():
            raise ValueError("an empty row has no quantiles; add values first")
        below = self.counts.cumsum(1)
        wanted = (share * total.double()).ceil().clamp(min=1)
        place = (below < wanted[:, None]).sum(1)
        return (place + 1 - self.bins // 2) * self.width

    def lower(self, share: float) -> Tensor:  # [C], float64
        """Return the greatest edge that has at least `share` of the values at or above it."""
        mirrored = Histogram(len(self.counts), self.bins, self.counts.device)
        mirrored.counts, mirrored.exponent = self.counts.flip(1), self.exponent
        return -mirrored.upper(share)

    def _widen(self, exponent: Tensor) -> None:
        steps = (exponent - self.exponent).clamp(max=62)
        if (steps > 0).any():
            half = self.bins // 2
            places = (torch.arange(-half, half, device=steps.device) >> steps[:, None]) + half
            self.counts = torch.zeros_like(self.counts).scatter_add(1, places, self.counts)
        self.exponent = exponent


def _powers_of_two(exponent: Tensor) -> Tensor:  # [C] int64 -> [C] float64
    # torch.exp2 and torch.ldexp round, which a width or a scale must not.
    powers = [math.ldexp(1.0, e) for e in exponent.tolist()]
    return torch.tensor(powers, dtype=torch.float64, device=exponent.device)


def wasserstein(a: Histogram, b: Histogram) -> Tensor:  # [C], float64
    """Return the Wasserstein-1 distance of each row of two histograms, in the units of the values.

    It is ∫ |F_a − F_b| over the two distribution functions, which is the mean distance that values move when one
    sample is turned into the other at the least cost. With every value moved to the lower edge of its bin, the error is
    at most the width of the wider bins, and far smaller where both are smooth within a bin.

    Raises:
        ValueError: the histograms have other rows or bins, or one has an empty row.
    """
    if a.counts.shape != b.counts.shape:
        raise ValueError(f"histograms must be alike, got counts {list(a.counts.shape)} and {list(b.counts.shape)}")
    totals = a.counts.sum(1), b.counts.sum(1)
    if any((total == 0).any() for total in totals):
        raise ValueError("an empty row has no distance; add values first")
    exponent = torch.maximum(a.exponent, b.exponent)
    a, b = a.widened(exponent), b.widened(exponent)
    left, right = (h.counts.cumsum(1).double() / total[:, None] for h, total in zip((a, b), totals, strict=True))
    return (left - right).abs().sum(1) * a.width
