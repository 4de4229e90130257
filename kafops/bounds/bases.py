"""The bases of a KAF as Taylor series with remainders, and their ranges: all that `kafops.bounds` has to know of one.

"relu" is not among them: it is no base on one side of 0 and "identity" on the other, and bounds are made so.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kafops import bases

__all__ = ["BENEATH", "Beneath"]

_EPS = 2.0**-52
_HALF = 0.25  # of a cell, in x
_TAIL = 1e-15  # more than the bases, and two derivatives, differ from 0 or from x by where they count as that


@dataclass(frozen=True)
class Beneath:
    """One base, analytic on ℝ.

    On a cell of half-width 1/4 that lies between two neighbours of `edges` the Taylor polynomial of `size` terms around
    its centre is the base up to `remainders[0]`, and that polynomial's derivative is the base's up to `remainders[1]`.
    Right of the last edge it is x up to these, left of the first one 0, or x for "identity"; half as much already from
    a distance of 1 before them on.

    Attributes:
        name: in `kafops.bases.BASES`.
        size: number of terms.
        edges: places where cells end, ascending.
        remainders: of the base and of its slope.
        steepest: the largest |slope| and |second derivative|.
        turns: where the slope is 0.
        bends: where the slope is largest and least.
        rounding: unit roundoffs of |x| that `bases.value` may be off by, and of 1 for slopes; with some for a sum.
    """

    name: str
    size: int
    edges: tuple[float, ...] = ()
    remainders: tuple[float, float] = (0.0, 0.0)
    steepest: tuple[float, float] = (1.0, 0.0)
    turns: tuple[float, ...] = ()
    bends: tuple[float, ...] = ()
    rounding: float = 16.0

    @property
    def far(self) -> float:
        """The |x| from which on the base is a line on either side; 0 for "identity"."""
        return self.edges[-1] if self.edges else 0.0

    def terms(self, x: Tensor) -> Tensor:  # [B] -> [B, size]
        """Return base⁽ᵏ⁾(x)/k! for k = 0 .. size - 1, those of the lines where |x| is `far` or more.

        Rounding errors of the terms at a cell's edge sum up to at most 400 unit roundoffs of 1 + |x|, of slopes of 1.
        """
        line = self.on_line(x)
        result = x.new_zeros(len(x), self.size)
        slope = torch.where(line, 1.0, 0.0)
        result[:, 0], result[:, 1] = torch.where(line, x, 0.0), slope
        near = (x.abs() < self.far).nonzero()[:, 0]
        for k in range(self.size if len(near) else 0):
            result[near, k] = bases.value(self.name, x[near], k) / math.factorial(k)
        return result

    def on_line(self, x: Tensor) -> Tensor:
        """Return whether the base is the line x beyond `far`, on the side of each x."""
        return (x > 0) | (not self.edges)

    def extremes(self, order: int, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:  # any shape
        """Return a lower and an upper bound of the base, or of its slope, on [lower, upper], ±inf allowed."""
        inside = (lower.new_tensor(place).clamp(lower, upper) for place in (self.turns, self.bends)[order])
        at = torch.stack([lower, upper, *inside])
        values = bases.value(self.name, at, order)
        size = torch.ones_like(at) if order else at.abs().clamp(max=1e300)
        if order == 0 and self.edges:
            size = size.masked_fill(at < -self.far, 0)
        slack = self.rounding * _EPS / 2 * size + self.remainders[order]
        return (values - slack).amin(0), (values + slack).amax(0)


def _edges(far: float) -> tuple[float, ...]:
    count = round(far / (2 * _HALF))
    return tuple(2 * _HALF * k for k in range(-count, count + 1))


def _silu() -> Beneath:
    """x σ(x), whose poles nearest to ℝ are ±πi. Where |Im z| ≤ 3, |σ(z)| ≤ 1/sin 3; so Cauchy on circles of radius 3.

    Its slope is 0 where 1 + x (1 - σ) = 0, and its second derivative where x tanh(x/2) = 2.
    """
    size, far, ratio = 16, 42.0, 1.01 * _HALF / 3
    most = (far + 3) / math.sin(3)
    return Beneath(
        "silu",
        size,
        _edges(far),
        remainders=(
            most * ratio**size / (1 - ratio) + _TAIL,
            most * ratio**size * (size - (size - 1) * ratio) / (1 - ratio) ** 2 / _HALF + _TAIL,
        ),
        steepest=(1.1, 0.5),
        turns=(-1.2784645427610738,),
        bends=(-2.3993572805154677, 2.3993572805154677),
    )


def _gelu() -> Beneath:
    """x Φ(x), whose derivatives from the second on are φ⁽ᵏ⁻²⁾ - φ⁽ᵏ⁾, and |φ⁽ᵏ⁾| ≤ 1.0865 sqrt(k!/2π) by Cramér.

    The second, φ (2 - x²), is 0 at ±√2.
    """
    size, half = 16, 1.01 * _HALF
    most = 1.0865 / math.sqrt(2 * math.pi) * (math.sqrt(math.factorial(size)) + math.sqrt(math.factorial(size - 2)))
    return Beneath(
        "gelu",
        size,
        _edges(10.0),
        remainders=(
            most * half**size / math.factorial(size) + _TAIL,
            most * half ** (size - 1) / math.factorial(size - 1) + _TAIL,
        ),
        steepest=(1.13, 0.8),
        turns=(-0.7517915246935645,),
        bends=(-math.sqrt(2), math.sqrt(2)),
    )


BENEATH = {b.name: b for b in (Beneath("identity", 2, rounding=4.0), _silu(), _gelu())}
