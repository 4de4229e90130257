"""Curves of kernels other than the Gaussian, fused: two operators that are each other's derivatives.

With u = √γ (x − δ_d), for a power p of u and an order o of differentiation of the kernel κ,

    kernel_sum       y_n = w_n Σ_d a_d u^p κ^(o)(u)      [N, C, *]
    kernel_moments   m_d = Σ_n w_n u^p κ^(o)(u)          [C, D] or [1, D]

Both are linear in a and in w, and ψ = u^p κ^(o) has the derivatives

    ∂ψ/∂x = √γ (p u^(p−1) κ^(o) + u^p κ^(o+1))      ∂ψ/∂δ = −∂ψ/∂x      ∂ψ/∂γ = (p ψ + u^(p+1) κ^(o+1)) / 2γ

so every derivative of one is an expression in both. A curve is kernel_sum with w = 1, p = o = 0; orders above 2 raise.
Every element pays for D kernel values in each operator, but only x is kept for backward, and no N × D tensor is made.

The operators have CPU kernels (csrc/cpu/kernels.cpp) and serve eager calls and torch.compile. Under torch.func
transforms and forward mode the plain definition takes their place: PyTorch does not offer these for registered
operators. Parameters come as float64, as they are few, and so do the operators' sums.
"""

from typing import Any

import torch
from torch import Tensor

from kafops import kernels, reference
from kafops.transforms import refuse_compiled_forward_mode, transforms_active

Gradients = tuple[Tensor | None, ...]

_library = torch.library.Library("kafops", "FRAGMENT")
_WHICH = "int power, int order, int kernel"
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(
    f"kernel_sum(Tensor x, Tensor? weight, Tensor coefficients, Tensor gamma, Tensor dictionary, {_WHICH}) -> Tensor",
    tags=_TAGS,
)
_library.define(
    f"kernel_moments(Tensor x, Tensor weight, Tensor gamma, Tensor dictionary, {_WHICH}) -> Tensor", tags=_TAGS
)

kernel_sum = torch.ops.kafops.kernel_sum.default
kernel_moments = torch.ops.kafops.kernel_moments.default

_NAMES = {k.code: k.name for k in kernels.KERNELS.values()}


def apply(x: Tensor, alpha: Tensor, gamma: Tensor, dictionary: Tensor, kernel: str) -> Tensor:
    """Compute kaf_free of a kernel other than "gaussian", for arguments on the CPU that have been checked."""
    if torch.compiler.is_compiling():
        refuse_compiled_forward_mode()
    if _plain():
        return reference.kaf_free(x, alpha, gamma, dictionary, kernel)
    alpha, gamma, dictionary = (p.to(torch.float64) for p in (alpha, gamma, dictionary))
    return kernel_sum(x, None, alpha, gamma, dictionary, 0, 0, kernels.KERNELS[kernel].code)


def _plain() -> bool:
    return not torch.compiler.is_compiling() and transforms_active()


def _sum(x: Tensor, weight: Tensor | None, coefficients: Tensor, *rest: Any) -> Tensor:
    """kernel_sum, by the route that supports what is active."""
    if not _plain():
        return kernel_sum(x, weight, coefficients, *rest)
    terms = _plain_terms(x, *rest)
    y = (_as_rows(coefficients, x) * terms).sum(-1)
    return (y if weight is None else y * weight).to(x.dtype)


def _moments(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """kernel_moments, by the route that supports what is active."""
    if not _plain():
        return kernel_moments(x, weight, *rest)
    terms = weight.unsqueeze(-1) * _plain_terms(x, *rest)
    rows, points = _shape_of_moments(*rest[:2])
    if rows == 1:
        return terms.reshape(-1, points).sum(0, keepdim=True).to(torch.float64)
    return terms.movedim(1, 0).flatten(1, -2).sum(1).to(torch.float64)


def _plain_terms(x: Tensor, gamma: Tensor, dictionary: Tensor, power: int, order: int, code: int) -> Tensor:
    """u^p κ^(o)(u) of every element and point [N, C, *, D], 0 where x is infinite."""
    far = x.isinf().unsqueeze(-1)
    z = x.to(torch.promote_types(x.dtype, torch.float32)).unsqueeze(-1)
    u = torch.where(far, 0, _as_rows(gamma.sqrt().unsqueeze(1), x) * (z - _as_rows(dictionary, x)))
    return torch.where(far, 0, u**power * kernels.value(_NAMES[code], u, order))


def _as_rows(p: Tensor, x: Tensor) -> Tensor:  # [C or 1, D] -> [C or 1, 1..., D], or [D] for x without channels
    p = p.to(torch.promote_types(x.dtype, torch.float32))
    return p[0] if x.dim() < 2 else p.reshape(p.shape[0], *(1,) * (x.dim() - 2), p.shape[1])


def _shape_of_moments(gamma: Tensor, dictionary: Tensor) -> tuple[int, int]:
    return dictionary.shape[0] if gamma.shape[0] == 1 else gamma.shape[0], dictionary.shape[1]


@torch.library.register_fake("kafops::kernel_sum")
def _kernel_sum_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("kafops::kernel_moments")
def _kernel_moments_fake(x: Tensor, weight: Tensor, gamma: Tensor, dictionary: Tensor, *_: Any) -> Tensor:
    return x.new_empty(_shape_of_moments(gamma, dictionary), dtype=torch.float64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, power, order, kernel = inputs
    ctx.save_for_backward(*tensors)
    ctx.which = power, order, kernel
    ctx.set_materialize_grads(False)


def _kernel_sum_backward(ctx: Any, grad: Tensor | None) -> Gradients:
    if grad is None:
        return (None,) * 8
    x, weight, coefficients, gamma, dictionary = ctx.saved_tensors
    in_x, in_weight, in_coefficients, *in_points = ctx.needs_input_grad[:5]
    both = grad if weight is None else _product(grad, weight)
    gradients: list[Tensor | None] = [None, None]
    if in_weight:
        gradients[0] = _sum(x, grad, coefficients, gamma, dictionary, *ctx.which).to(weight.dtype)
    if in_coefficients:
        rows = _rows(coefficients, gamma, dictionary)
        gradients[1] = _like(_moments(x, both, gamma.expand(rows), dictionary, *ctx.which), coefficients)
    of_x, *of_points = _derivatives(x, both, coefficients, gamma, dictionary, ctx.which, (in_x, *in_points))
    return (of_x, *gradients, *of_points, None, None, None)


def _kernel_moments_backward(ctx: Any, grad: Tensor | None) -> Gradients:
    if grad is None:
        return (None,) * 7
    x, weight, gamma, dictionary = ctx.saved_tensors
    in_x, in_weight, *in_points = ctx.needs_input_grad[:4]
    of_weight = _sum(x, None, grad, gamma, dictionary, *ctx.which).to(weight.dtype) if in_weight else None
    of_x, *of_points = _derivatives(x, weight, grad, gamma, dictionary, ctx.which, (in_x, *in_points))
    return (of_x, of_weight, *of_points, None, None, None)


def _derivatives(
    x: Tensor,  # [N, C, *]
    weight: Tensor,  # [N, C, *]
    coefficients: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    dictionary: Tensor,  # [C, D] or [1, D]
    which: tuple[int, int, int],
    needed: tuple[bool, ...],
) -> Gradients:
    """Derivatives of Σ_n w_n Σ_d a_d ψ(x_n, δ_d) in x, gamma and dictionary, those that are needed."""
    power, order, kernel = which
    in_x, in_gamma, in_dictionary = needed
    if not any(needed):
        return (None,) * 3
    if order == 2:
        raise RuntimeError(kernels.too_high(_NAMES[kernel], order + 1, 0))
    scaled = gamma.sqrt().unsqueeze(1) * coefficients
    full = gamma.expand(_rows(coefficients, gamma, dictionary))

    def moments(p: int) -> Tensor:  # of ∂ψ/∂u · u^(p − power)
        m = _moments(x, weight, full, dictionary, p, order + 1, kernel)
        return m + power * _moments(x, weight, full, dictionary, p - 1, order, kernel) if power else m

    of_x = of_gamma = of_dictionary = None
    if in_x:
        of_x = _sum(x, weight, scaled, gamma, dictionary, power, order + 1, kernel)
        if power:
            of_x = of_x + _sum(x, weight, power * scaled, gamma, dictionary, power - 1, order, kernel)
    if in_gamma:
        of_gamma = _like((coefficients * moments(power + 1)).sum(1) / (2 * full), gamma)
    if in_dictionary:
        of_dictionary = _like(-scaled * moments(power), dictionary)
    return of_x, of_gamma, of_dictionary


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a · b in float32 at least, as a half type would round it."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.to(dtype) * b.to(dtype)


def _rows(*parameters: Tensor) -> int:
    """The number of channels that have their own parameters, 1 where all are shared."""
    return next((p.shape[0] for p in parameters if p.shape[0] != 1), 1)


def _like(gradient: Tensor, p: Tensor) -> Tensor:
    """Add over channels where they share one row of the parameter."""
    return gradient.sum(0, keepdim=True) if p.shape[0] == 1 and gradient.shape[0] != 1 else gradient


torch.library.register_autograd("kafops::kernel_sum", _kernel_sum_backward, setup_context=_setup)
torch.library.register_autograd("kafops::kernel_moments", _kernel_moments_backward, setup_context=_setup)
