"""Bases: fixed functions beneath a curve, f(x) = base(x) + Σ_d α_d κ(√γ (x − δ_d)).

- `"identity"`: x.
- `"relu"`: max(x, 0), with slope 0 at 0 as PyTorch's.
- `"silu"`: x σ(x), σ(x) = 1/(1 + e^−x).
- `"gelu"`: x Φ(x), Φ the distribution function of N(0, 1): the exact form, not that by tanh.

At ±inf a base has its limit, 0 for "silu" and "gelu" at −inf, and so have its derivatives.

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, for "gelu" and "silu".
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["BASES", "Base", "BaseName", "code", "named", "value"]

BaseName = Literal["identity", "relu", "silu", "gelu"]

_FAR = 1e4  # beyond which "silu" and "gelu" are "relu" to the last digit


@dataclass(frozen=True)
class Base:
    """One base.

    Attributes:
        name: as the argument `base` of layers and functions has it.
        code: the number that stands for it in operators and state_dicts; 0 is no base. Never changes.
        derivative: (x, n) -> the n-th derivative at every finite element of x.
        kinks: the x at which a derivative of some order jumps.
    """

    name: BaseName
    code: int
    derivative: Callable[[Tensor, int], Tensor]
    kinks: tuple[float, ...] = ()


def named(base: str | None) -> Base | None:
    """Return the base of that name, None for None.

    Raises:
        TypeError: base is neither None nor a string.
        ValueError: there is no such base.
    """
    if base is None:
        return None
    wanted = f"base must be None or one of {', '.join(map(repr, BASES))}"
    if not isinstance(base, str):
        raise TypeError(f"{wanted}, got {type(base).__name__}")
    if base not in BASES:
        near = difflib.get_close_matches(base.lower(), BASES, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"{wanted}, got {base!r}{hint}")
    return BASES[base]


def code(base: str | None) -> int:
    """Return the code of a base, 0 for None. Raises as `named`."""
    found = named(base)
    return 0 if found is None else found.code


def value(
    base: str | None,
    x: Tensor,  # any shape
    order: int = 0,
) -> Tensor:  # as x
    """Return the base, or its derivative of some order, at every element of x; 0 for None.

    PyTorch may differentiate it, in any mode.

    Args:
        base: None or a name in `BASES`.
        x: floating tensor, any values; NaN gives NaN.
        order: of the derivative, 0 or more.

    Raises:
        TypeError, ValueError: no such base; order out of range; x is no floating tensor.

    Example:
        >>> kafops.bases.value("silu", torch.tensor([-1.0, 0.0, 1.0]), order=1)
        tensor([0.0723, 0.5000, 0.9277])
    """
    found = named(base)
    if isinstance(order, bool) or not isinstance(order, int) or order < 0:
        raise ValueError(f"order must be an integer ≥ 0, got {order!r}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if found is None:
        return torch.zeros_like(x)
    return found.derivative(x, order)


def _identity(x: Tensor, n: int) -> Tensor:
    return x.clone() if n == 0 else _constant(x, 1.0 if n == 1 else 0.0)


def _relu(x: Tensor, n: int) -> Tensor:
    if n == 0:
        return F.relu(x)
    return _constant(x, 0.0) if n > 1 else torch.where(x.isnan(), x, (x > 0).to(x.dtype))


def _constant(x: Tensor, c: float) -> Tensor:
    return torch.where(x.isnan(), x, c)


def _with_limits(smooth: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
    def derivative(x: Tensor, n: int) -> Tensor:
        inside = smooth(x.clamp(-_FAR, _FAR), n)  # whose own formulas would be inf · 0 at infinity
        return torch.where(x.abs() < _FAR, inside, _relu(x, n))

    return derivative


def _silu(x: Tensor, n: int) -> Tensor:
    if n == 0:
        return F.silu(x)
    return x * _sigmoid(x, n) + n * _sigmoid(x, n - 1)


def _sigmoid(x: Tensor, n: int) -> Tensor:
    """σ^(n)(x) = e (1 + e)^−(n + 1) Σ_k (−1)^k A_k e^k at x ≤ 0, e = e^x, with A the Eulerian numbers of n.

    They cancel to 1/300 at n = 13, a polynomial in σ to 1e-6. σ^(n)(−x) = (−1)^(n + 1) σ^(n)(x).
    """
    if n == 0:
        return torch.sigmoid(x)
    a = [1.0]
    for m in range(2, n + 1):
        a = [
            (k + 1) * here + (m - k) * before for k, (here, before) in enumerate(zip([*a, 0.0], [0.0, *a], strict=True))
        ]
    e = torch.exp(torch.where(x > 0, -x, x))  # not −|x|, whose slope at 0 would be lost
    y = torch.zeros_like(e)
    for c in reversed(a):
        y = c - y * e
    y = y * e / (1 + e) ** (n + 1)
    return y if n % 2 else torch.where(x > 0, -y, y)


def _gelu(x: Tensor, n: int) -> Tensor:
    if n < 2:
        below = 0.5 * torch.erfc(-x * math.sqrt(0.5))  # F.gelu in float32 is off by 4 unit roundoffs of x
        return below + x * _normal(x, 0) if n else x * below
    return x * _normal(x, n - 1) + n * _normal(x, n - 2)


def _normal(x: Tensor, n: int) -> Tensor:
    """The n-th derivative of the density of N(0, 1), (−1)^n He_n(x) φ(x)."""
    before, h = torch.zeros_like(x), torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    for k in range(n):
        before, h = h, -x * h - k * before
    return h


BASES: dict[str, Base] = {
    b.name: b
    for b in (
        Base("identity", 1, _identity),
        Base("relu", 2, _relu, kinks=(0.0,)),
        Base("silu", 3, _with_limits(_silu)),
        Base("gelu", 4, _with_limits(_gelu)),
    )
}
