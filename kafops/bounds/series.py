"""The kernels of a KAF as Taylor series with remainders: all that `kafops.bounds` has to know of a kernel.

Each kernel κ(u) is even, positive, falls from κ(0) = 1 towards 0, and is analytic but for a few knots. On a cell, which
lies between two neighbours of `ladder`, or their mirror images, and has no knot inside, the Taylor polynomial of `size`
terms around its centre is κ up to `remainders[0]`, and that polynomial's derivative is κ′ up to `remainders[1]`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SERIES", "Series"]


@dataclass(frozen=True)
class Series:
    """One kernel.

    Attributes:
        terms: from tensors alpha and u of one shape to alpha κ⁽ᵏ⁾(u)/k! for k = 0 .. size - 1. The terms of κ, and of
            κ′, at a cell's edge have absolute values that sum up to at most 4 |alpha|, and rounding errors that sum up
            to at most 400 unit roundoffs of |alpha|, where u has 7 itself.
        size: number of terms.
        ladder: edges of the cells in |u|, ascending from 0. Beyond the last one |κ| and |κ′| are below the remainders.
        remainders: of κ and of κ′.
        peaks: the largest |κ|, |κ′| and |κ″|.
        knots: the |u| > 0 where κ is not analytic. At 0 it need not be either.
    """

    terms: Callable[[Tensor, Tensor], Iterator[Tensor]]
    size: int
    ladder: tuple[float, ...]
    remainders: tuple[float, float]
    peaks: tuple[float, float, float]
    knots: tuple[float, ...] = ()


def _gaussian() -> Series:
    """κ = exp(-u²), where κ⁽ᵏ⁺¹⁾ = -2u κ⁽ᵏ⁾ - 2k κ⁽ᵏ⁻¹⁾ and, by Cramér, |κ⁽ᵏ⁾| ≤ 1.0865 sqrt(2ᵏ k!)."""
    size, width = 16, 0.5

    def terms(alpha: Tensor, u: Tensor) -> Iterator[Tensor]:
        before, term = torch.zeros_like(u), alpha * torch.exp(-u * u)
        for k in range(size):
            yield term
            before, term = term, torch.addcmul(before, u, term).mul_(-2 / (k + 1))

    remainder = 1.0865 * math.sqrt(2**size / math.factorial(size)) * (width / 2) ** size
    return Series(
        terms=terms,
        size=size,
        ladder=tuple(width * k for k in range(14)),
        remainders=(remainder, remainder * size / (width / 2)),
        peaks=(1.0, math.sqrt(2 / math.e), 2.0),
    )


def _rational_quadratic() -> Series:
    """κ = 1/(1 + u²) = Re 1/(1 - iu), so that |κ⁽ᵏ⁾|/k! ≤ (1 + u²)^(-(k + 1)/2).

    The terms follow from (1 + (u + w)²) Σ termₖ wᵏ = 1. Cells are a fraction of the distance to the poles ±i.
    """
    size, fraction = 16, 1 / 8  # of the distance, half a cell

    def terms(alpha: Tensor, u: Tensor) -> Iterator[Tensor]:
        minus_inverse = -1 / (1 + u * u)
        before, term, twice = torch.zeros_like(u), -alpha * minus_inverse, 2 * u
        for _ in range(size):
            yield term
            before, term = term, torch.addcmul(before, twice, term).mul_(minus_inverse)

    ladder = [0.0]
    while ladder[-1] < 1e7:
        ladder.append(ladder[-1] + 2 * fraction * math.hypot(1, ladder[-1]))
    return Series(
        terms=terms,
        size=size,
        ladder=tuple(ladder),
        remainders=(1e-14, size * fraction ** (size - 1)),
        peaks=(1.0, math.sqrt(27 / 64), 2.0),
    )


def _matern32() -> Series:
    """κ = (1 + s) e⁻ˢ with s = √2 |u|, where κ⁽ᵏ⁾ = (∓√2)ᵏ (s + 1 - k) e⁻ˢ on the right and on the left of 0."""
    size, width = 16, 1.0

    def terms(alpha: Tensor, u: Tensor) -> Iterator[Tensor]:
        s = math.sqrt(2) * u.abs()
        factor, step = alpha * torch.exp(-s), torch.full_like(u, math.sqrt(2)).copysign(-u)
        for k in range(size):
            yield factor * (s + (1 - k))
            factor = factor * step / (k + 1)

    # |s + 1 - k| e⁻ˢ is largest at s = 0.
    remainder = (size - 1) * math.sqrt(2) ** size / math.factorial(size) * (width / 2) ** size
    return Series(
        terms=terms,
        size=size,
        ladder=tuple(width * k for k in range(29)),
        remainders=(remainder, remainder * size / (width / 2)),
        peaks=(1.0, math.sqrt(2) / math.e, 2.0),
    )


def _bspline() -> Series:
    """κ = 1 - 3w²/2 + 3w³/4 for w ≤ 1, (2 - w)³/4 for w ≤ 2, else 0, with w = |u|/h and h = sqrt(3/2)."""
    h = math.sqrt(1.5)

    def terms(alpha: Tensor, u: Tensor) -> Iterator[Tensor]:
        w = u.abs() / h
        inside, rest = w < 1, (2 - w).clamp(min=0)
        step = torch.full_like(u, 1 / h).copysign(u)
        yield alpha * torch.where(inside, 1 - w * w * (1.5 - 0.75 * w), rest**3 / 4)
        yield alpha * step * torch.where(inside, w * (2.25 * w - 3), -0.75 * rest**2)
        yield alpha / h**2 * torch.where(inside, 2.25 * w - 1.5, 0.75 * rest)
        yield alpha * step / h**2 * torch.where(inside, 0.75, -0.25 * (rest > 0))

    return Series(
        terms=terms,
        size=4,
        ladder=(0.0, h, 2 * h),
        remainders=(0.0, 0.0),
        peaks=(1.0, 1 / h, 2.0),
        knots=(h, 2 * h),
    )


SERIES = {
    "gaussian": _gaussian(),
    "rational_quadratic": _rational_quadratic(),
    "matern32": _matern32(),
    "bspline": _bspline(),
}
