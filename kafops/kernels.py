"""Kernels κ(u) that a kernel activation function can be made of, with their derivatives.

A curve is f(x) = Σ_d α_d κ(u_d) with u_d = √γ (x − δ_d). All kernels have κ(0) = 1 and the curvature of the Gaussian,
κ″(0) = −2, so that γ means the same for each: near its point each is 1 − γ (x − δ)². They differ in their tails:

- `"gaussian"`: exp(−u²). Analytic. The default, and the only one with kernels that do not pay for D.
- `"rational_quadratic"`: 1 / (1 + u²). Analytic, with tails that fall as 1/u².
- `"matern32"`: (1 + s) exp(−s), s = √2 |u|. Twice continuously differentiable, exponential tails.
- `"bspline"`: the cubic B-spline whose knots are √(3/2) apart in u. Twice continuously differentiable, 0 from two knots
  away on. With γ = 3/(2Δ²), the default for it, its knots are the points of the dictionary: curves are cubic splines.

Source: Scardapane et al., "Kafnets", 2017, for the rational quadratic, there 1 − d²/(d² + c) with c = 1/γ; Rasmussen
and Williams, "Gaussian Processes for Machine Learning", 2006, section 4.2, for the Matérn class, here ν = 3/2; de Boor,
"A Practical Guide to Splines", 1978, for B-splines.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kafops.transforms import product

__all__ = ["HIGHEST", "KERNELS", "Kernel", "KernelName", "check_order", "named", "value"]

KernelName = Literal["gaussian", "rational_quadratic", "matern32", "bspline"]

HIGHEST = 12  # order n + 2m of n derivatives in x and m in gamma that is offered
_KNOT = math.sqrt(1.5)  # of the B-spline, in u
_FAR = 1e18  # beyond which a kernel is 0 to rounding; its square is finite in float32


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        name: as the argument `kernel` of layers and functions has it.
        code: the number that stands for it in operators and state_dicts. Never changes.
        derivative: (u, n) -> κ^(n)(u) at every element of a tensor of finite u, n up to `smoothness`.
        t: the default of γΔ², as a fraction.
        kinks: the u at which a derivative of some order jumps.
        smoothness: how many derivatives are offered: all that there are, and of analytic kernels `HIGHEST`.
    """

    name: KernelName
    code: int
    derivative: Callable[[Tensor, int], Tensor]
    t: tuple[int, int] = (1, 6)
    kinks: tuple[float, ...] = ()
    smoothness: int = HIGHEST


def named(kernel: str) -> Kernel:
    """Return the kernel of that name.

    Raises:
        TypeError: kernel is not a string.
        ValueError: there is no such kernel.
    """
    if not isinstance(kernel, str):
        raise TypeError(f"kernel must be one of {', '.join(map(repr, KERNELS))}, got {type(kernel).__name__}")
    if kernel not in KERNELS:
        near = difflib.get_close_matches(kernel.lower(), KERNELS, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"kernel must be one of {', '.join(map(repr, KERNELS))}, got {kernel!r}{hint}")
    return KERNELS[kernel]


def value(
    kernel: str,
    u: Tensor,  # any shape
    order: int = 0,
) -> Tensor:  # as u
    """Return κ(u), or its derivative of some order, at every element of u.

    May be differentiated as long as the order stays within the kernel's smoothness: at the knots of a B-spline and in
    the middle of a Matérn kernel there is no third derivative, and of the others no more than 12 are offered.

    Args:
        kernel: a name in `KERNELS`.
        u: floating tensor, in units of 1/√γ; half precision is computed in float32.
        order: 0 to 12, or to 2 for "matern32" and "bspline".

    Raises:
        TypeError, ValueError: no such kernel; order out of range; u is no floating tensor.
        RuntimeError: on differentiation, an order out of range is asked for.

    Example:
        >>> kafops.kernels.value("matern32", torch.zeros(()), order=2)
        tensor(-2.)
    """
    chosen = named(kernel)
    if isinstance(order, bool) or not isinstance(order, int) or not 0 <= order <= chosen.smoothness:
        raise ValueError(f"order must be an integer from 0 to {chosen.smoothness} for {kernel!r}, got {order!r}")
    if not isinstance(u, Tensor) or not u.is_floating_point():
        raise TypeError(f"u must be a floating tensor, got {u.dtype if isinstance(u, Tensor) else type(u).__name__}")
    if u.dtype in (torch.float16, torch.bfloat16):  # computed in float32, and rounded once
        return value(kernel, u.float(), order).to(u.dtype)
    if torch.compiler.is_compiling():  # which cannot trace a rule for forward mode, and differentiates once only
        return chosen.derivative(u.clamp(-_FAR, _FAR), order)
    return _Value.apply(u, order, kernel)


def check_order(code: int, n: int, m: int) -> None:
    """Raise unless a kernel, given by code, may be differentiated n times in x (or the dictionary) and m in gamma.

    Raises:
        RuntimeError: it is not.
    """
    k = next(k for k in KERNELS.values() if k.code == code)
    if n + m <= k.smoothness and n + 2 * m <= HIGHEST:
        return
    got = f"kernel {k.name!r} was to be differentiated n = {n} times in x or its dictionary and m = {m} times in gamma"
    if n + m > k.smoothness and k.smoothness < HIGHEST:
        raise RuntimeError(f"{got}, but it has no more than {k.smoothness} derivatives (n + m ≤ {k.smoothness})")
    raise RuntimeError(f"{got}; kafops offers derivatives up to n + 2m = {HIGHEST}")


def _gaussian(u: Tensor, n: int) -> Tensor:
    """(−1)^n H_n(u) exp(−u²), H_n the Hermite polynomials."""
    before, h = torch.zeros_like(u), torch.exp(-u * u)
    for k in range(n):
        before, h = h, -2 * (u * h + k * before)
    return h


def _rational_quadratic(u: Tensor, n: int) -> Tensor:
    """(−1)^n n! Im w^(n + 1) with w = (u + i)/(1 + u²), as κ = Im 1/(u − i)."""
    t = 1 / (1 + u * u)
    a, b = real, imaginary = u * t, t
    for k in range(n):
        factor = -(k + 1)
        real, imaginary = factor * (real * a - imaginary * b), factor * (real * b + imaginary * a)
    return imaginary


def _size(u: Tensor) -> Tensor:  # |u|, but 1 for its derivative at 0, where torch.abs has 0
    return torch.where(u < 0, -u, u)


def _distance(u: Tensor) -> Tensor:  # s of "matern32"
    return math.sqrt(2) * _size(u).clamp(max=1e4)  # where exp(−s) is 0


def _matern32(u: Tensor, n: int) -> Tensor:
    s = _distance(u)
    return ((1 + s), -2 * u, 2 * (s - 1))[n] * torch.exp(-s)


def _bspline(u: Tensor, n: int) -> Tensor:
    w = (_size(u) / _KNOT).clamp(max=2)  # how many knots away
    if n == 0:
        return torch.where(w < 1, 1 + w * w * (0.75 * w - 1.5), (2 - w) ** 3 / 4)
    if n == 1:
        slope = torch.where(w < 1, w * (2.25 * w - 3), -0.75 * (2 - w) ** 2) / _KNOT
        return torch.where(u < 0, -slope, slope)  # not by sign(u), which is 0 at 0
    return torch.where(w < 1, 3 * w - 2, 2 - w)


KERNELS: dict[str, Kernel] = {
    k.name: k
    for k in (
        Kernel("gaussian", 0, _gaussian),
        Kernel("rational_quadratic", 1, _rational_quadratic),
        Kernel("matern32", 2, _matern32, kinks=(0.0,), smoothness=2),
        Kernel("bspline", 3, _bspline, (3, 2), tuple(i * _KNOT for i in (-2, -1, 0, 1, 2)), smoothness=2),
    )
}


class _Value(torch.autograd.Function):
    """(u, order, kernel) -> κ^(order)(u). PyTorch's own rules would be wrong at u = 0, where |u| has no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, order: int, kernel: str) -> Tensor:
        return KERNELS[kernel].derivative(u.clamp(-_FAR, _FAR), order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        u, ctx.order, ctx.kernel = inputs
        ctx.save_for_backward(u)
        ctx.save_for_forward(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * _next(ctx), None, None

    @staticmethod
    def jvp(ctx: Any, v: Tensor, *_: None) -> Tensor:
        return product(v, _next(ctx))


def _next(ctx: Any) -> Tensor:
    check_order(KERNELS[ctx.kernel].code, ctx.order + 1, 0)
    return _Value.apply(ctx.saved_tensors[0], ctx.order + 1, ctx.kernel)
