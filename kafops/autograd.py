"""Derivatives: the formulas, once, for the two routes by which PyTorch asks for them.

The first derivative of `kaf` is the operator `kaf_backward`; the derivative of that is `kaf_double_backward`; a third
derivative raises. Plain reverse mode, torch.compile and export take the operators with their registered formulas, which
is the quickest route. torch.func transforms and forward mode, which PyTorch does not offer for registered operators,
take `KAFFunction` and `KAFBackwardFunction`.

Forward mode needs no kernel of its own. With J the Jacobian of y = kaf(x, θ) and H_g the Hessian of <g, y>, both over
(x, θ): the operator `kaf_backward(g)` is Jᵀg, and `kaf_double_backward(v, g)` is (Jv, H_g v). So the tangent of y is
the first part of the latter, and the tangent of Jᵀg is Jᵀġ + H_g v.
"""

from typing import Any

import torch
from torch import Tensor

from kafops import ops
from kafops.ops import Needs

Gradients = tuple[Tensor | None, ...]


def apply(x: Tensor, alpha: Tensor, gamma: Tensor, dictionary: Tensor | None, boundary: float) -> Tensor:
    """Compute kaf by the route that supports the transforms which are active."""
    if torch.compiler.is_compiling():
        _refuse_compiled_forward_mode()
        return ops.kaf(x, alpha, gamma, dictionary, boundary)
    if transforms_active():
        return KAFFunction.apply(x, alpha, gamma, dictionary, boundary)
    return ops.kaf(x, alpha, gamma, dictionary, boundary)


def transforms_active() -> bool:
    """Whether a torch.func transform or a forward-mode level is active (PyTorch has no public name for either)."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _refuse_compiled_forward_mode() -> None:
    if torch.autograd.forward_ad._current_level >= 0:
        raise RuntimeError(
            "kafops cannot be differentiated in forward mode inside torch.compile: PyTorch would return a zero tangent. "
            "Call torch.func.jvp, jacfwd or hessian outside torch.compile"
        )


def _backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """`kaf_backward` by the route that is differentiable under the active transforms."""
    if not torch.compiler.is_compiling() and transforms_active():
        return KAFBackwardFunction.apply(grad, *arguments)
    return ops.kaf_backward(grad, *arguments)


def _setup_kaf(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.boundary = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _kaf_backward(ctx: Any, grad: Tensor | None) -> Gradients:
    if grad is None:
        return (None,) * 5
    needs = _needs(ctx.needs_input_grad, _KAF_FLAGS)
    gradients = _backward(grad, *ctx.saved_tensors, ctx.boundary, needs)
    return *_only(gradients, _KAF_FLAGS, needs), None


def _setup_kaf_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.boundary, ctx.needs = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _kaf_backward_backward(ctx: Any, *grads: Tensor | None) -> Gradients:
    wanted = tuple(g if ctx.needs & flag else None for g, flag in zip(grads, _KAF_FLAGS, strict=True))
    if all(g is None for g in wanted):
        return (None,) * 7
    needs = _needs(ctx.needs_input_grad, _BACKWARD_FLAGS)
    gradients = ops.kaf_double_backward(*wanted, *ctx.saved_tensors, ctx.boundary, needs)
    return *_only(gradients, _BACKWARD_FLAGS, needs), None, None


def _kaf_double_backward_backward(ctx: Any, *grads: Tensor) -> Gradients:
    raise RuntimeError("kafops computes first and second derivatives only; a third derivative of a KAF was asked for")


_KAF_FLAGS = (Needs.X, Needs.ALPHA, Needs.GAMMA, Needs.DICTIONARY)
_BACKWARD_FLAGS = (Needs.GRAD, *_KAF_FLAGS)


def _needs(needs_input_grad: tuple[bool, ...], flags: tuple[Needs, ...]) -> int:
    return sum(int(flag) for flag, needed in zip(flags, needs_input_grad, strict=False) if needed)


def _only(gradients: tuple[Tensor, ...], flags: tuple[Needs, ...], needs: int) -> Gradients:
    """Drop the empty tensors that stand for gradients nobody asked for."""
    return tuple(g if needs & flag else None for g, flag in zip(gradients, flags, strict=True))


torch.library.register_autograd("kafops::kaf", _kaf_backward, setup_context=_setup_kaf)
torch.library.register_autograd("kafops::kaf_backward", _kaf_backward_backward, setup_context=_setup_kaf_backward)
torch.library.register_autograd("kafops::kaf_double_backward", _kaf_double_backward_backward)


class KAFFunction(torch.autograd.Function):
    """`kaf` for torch.func transforms and forward mode: (x, alpha, gamma, dictionary or None, boundary) -> y."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, alpha: Tensor, gamma: Tensor, dictionary: Tensor | None, boundary: float) -> Tensor:
        """Compute y."""
        return ops.kaf(x, alpha, gamma, dictionary, boundary)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs, nothing else."""
        _setup_kaf(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Gradients:
        """Compute Jᵀ grad."""
        return _kaf_backward(ctx, grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        """Compute J · tangents; the part in x and alpha can itself be differentiated."""
        v_x, v_alpha, v_gamma, v_dictionary, _ = tangents
        x, alpha, gamma, dictionary = ctx.saved_tensors
        parts = []
        if v_x is not None:
            parts.append(_backward(v_x, x, alpha, gamma, dictionary, ctx.boundary, int(Needs.X))[0])
        if v_alpha is not None:
            parts.append(KAFFunction.apply(x, v_alpha, gamma, dictionary, ctx.boundary))
        if v_gamma is not None or v_dictionary is not None:
            v = (None, None, v_gamma, v_dictionary)
            parts.append(
                ops.kaf_double_backward(*v, x, x, alpha, gamma, dictionary, ctx.boundary, int(Needs.GRAD))[0]
            )
        return sum(parts[1:], start=parts[0]) if parts else None


class KAFBackwardFunction(torch.autograd.Function):
    """`kaf_backward` for torch.func transforms and forward mode: (grad, kaf's arguments, needs) -> four gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """Compute Jᵀ grad."""
        return ops.kaf_backward(grad, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the inputs, nothing else."""
        _setup_kaf_backward(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        """Compute (Jv, H_g v) for v = grads."""
        return _kaf_backward_backward(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, v_grad: Tensor | None, *tangents: Any) -> Gradients:
        """Compute Jᵀ v_grad + H_g · tangents."""
        grad, *arguments = ctx.saved_tensors
        v = tangents[:4]
        total: Gradients | None = None
        if v_grad is not None:
            total = ops.kaf_backward(v_grad, *arguments, ctx.boundary, ctx.needs)
        if any(t is not None for t in v):
            second = ops.kaf_double_backward(*v, grad, *arguments, ctx.boundary, ctx.needs)[1:]
            total = second if total is None else tuple(a + b for a, b in zip(total, second, strict=True))
        return total if total is not None else (None,) * 4
