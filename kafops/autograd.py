"""Derivatives: the formulas, once, for the three routes by which PyTorch asks for them.

The first derivative of `kaf` is the operator `kaf_backward`, whose derivative is `kaf_double_backward`. A third
derivative raises, and so does a second one by forward mode over forward mode but in x and alpha.

- Plain eager calls run the operators below PyTorch's autograd dispatch, which spares half of a small call's time:
  alone where no gradient is wanted, else inside `KAFEagerFunction`.
- torch.compile, export, whatever else handles calls before autograd, and eager derivatives that shall be differentiated
  once more get the operators with their registered formulas.
- torch.func transforms and forward mode, which PyTorch does not offer for registered operators, take `KAFFunction`,
  `KAFBackwardFunction` and `KAFDoubleBackwardFunction`. Inside torch.compile these break the graph, or raise where it
  must be whole.

Forward mode needs no kernel of its own. With J the Jacobian of y = kaf(x, θ) and H_g the Hessian of <g, y>, both over
(x, θ): the operator `kaf_backward(g)` is Jᵀg, and `kaf_double_backward(v, g)` is (Jv, H_g v). So the tangent of y is
the first part of the latter, the tangent of Jᵀg is Jᵀġ + H_g v, and <u, Jv> has the gradients Jᵀu in v and H_u v in
(x, θ).
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from kafops import ops
from kafops.ops import Needs
from kafops.transforms import add, refuse_compiled_forward_mode, transforms_active

Gradients = tuple[Tensor | None, ...]

_KAF_FLAGS = (Needs.X, Needs.ALPHA, Needs.GAMMA, Needs.DICTIONARY)
_BACKWARD_FLAGS = (Needs.GRAD, *_KAF_FLAGS)
_THIRD = "kafops computes first and second derivatives only; a third derivative of a KAF was asked for"


def apply(x: Tensor, alpha: Tensor, gamma: Tensor, dictionary: Tensor | None, boundary: float) -> Tensor:
    """Compute kaf by the quickest route that supports what is active."""
    if torch.compiler.is_compiling():
        refuse_compiled_forward_mode()
        return ops.kaf(x, alpha, gamma, dictionary, boundary)
    if transforms_active():
        return KAFFunction.apply(x, alpha, gamma, dictionary, boundary)
    if _watched((x, alpha, gamma, dictionary)):
        return ops.kaf(x, alpha, gamma, dictionary, boundary)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, alpha, gamma, dictionary):
        return KAFEagerFunction.apply(x, alpha, gamma, dictionary, boundary)
    with torch._C._AutoDispatchBelowAutograd():
        return ops.kaf(x, alpha, gamma, dictionary, boundary)


def _watched(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether something above autograd handles operators: __torch_function__, its modes, make_fx or torch.jit.trace."""
    return has_torch_function(tensors) or torch._C._get_tracing_state() is not None


def _backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """`kaf_backward` by the quickest route that supports what is active."""
    if not torch.compiler.is_compiling():
        if transforms_active():
            return KAFBackwardFunction.apply(grad, *arguments)
        if not torch.is_grad_enabled() and not _watched((grad, *arguments[:4])):
            with torch._C._AutoDispatchBelowAutograd():
                return ops.kaf_backward(grad, *arguments)
    return ops.kaf_backward(grad, *arguments)


def _double_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """`kaf_double_backward` by the route that is differentiable under the active transforms."""
    if not torch.compiler.is_compiling() and transforms_active():
        return KAFDoubleBackwardFunction.apply(*arguments)
    return ops.kaf_double_backward(*arguments)


def _setup_kaf(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.boundary = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _kaf_backward(ctx: Any, grad: Tensor | None) -> Gradients:
    if grad is None:
        return (None,) * 5
    needs = _needs(ctx.needs_input_grad, _KAF_FLAGS)
    gradients = _backward(grad, *ctx.saved_tensors, ctx.boundary, needs)
    return *_only(gradients, _KAF_FLAGS, needs), None


def _setup_kaf_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.boundary, needs = inputs
    ctx.needs = needs if tensors[-1] is not None else needs & ~Needs.DICTIONARY
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _kaf_backward_backward(ctx: Any, *grads: Tensor | None) -> Gradients:
    wanted = _only(grads, _KAF_FLAGS, ctx.needs)
    if all(g is None for g in wanted):
        return (None,) * 7
    needs = _needs(ctx.needs_input_grad, _BACKWARD_FLAGS)
    gradients = _double_backward(*wanted, *ctx.saved_tensors, ctx.boundary, needs)
    return *_only(gradients, _BACKWARD_FLAGS, needs), None, None


def _kaf_double_backward_backward(ctx: Any, *grads: Tensor | None) -> Gradients:
    u, *third = _only(grads, _BACKWARD_FLAGS, ctx.needs)
    if any(g is not None for g in third):
        raise RuntimeError(_THIRD)
    if u is None:
        return (None,) * 11
    *v, _, x, alpha, gamma, dictionary = ctx.saved_tensors
    arguments = (x, alpha, gamma, dictionary, ctx.boundary)
    needs_v, needs = _needs(ctx.needs_input_grad, _KAF_FLAGS), _needs(ctx.needs_input_grad[5:], _KAF_FLAGS)
    first = _only(_backward(u, *arguments, needs_v), _KAF_FLAGS, needs_v)
    second = _only(_double_backward(*v, u, *arguments, needs)[1:], _KAF_FLAGS, needs)
    return *first, None, *second, None, None


def _needs(needs_input_grad: tuple[bool, ...], flags: tuple[int, ...]) -> int:
    return sum([flag for flag, needed in zip(flags, needs_input_grad, strict=False) if needed])


def _only(gradients: tuple[Tensor | None, ...], flags: tuple[int, ...], needs: int) -> Gradients:
    """Drop the gradients that nobody asked for, which the operators return as empty tensors."""
    return tuple([g if needs & flag else None for g, flag in zip(gradients, flags, strict=True)])


torch.library.register_autograd("kafops::kaf", _kaf_backward, setup_context=_setup_kaf)
torch.library.register_autograd("kafops::kaf_backward", _kaf_backward_backward, setup_context=_setup_kaf_backward)
torch.library.register_autograd(
    "kafops::kaf_double_backward", _kaf_double_backward_backward, setup_context=_setup_kaf_backward
)


class KAFEagerFunction(torch.autograd.Function):
    """`kaf` for plain eager calls: (x, alpha, gamma, dictionary or None, boundary) -> y.

    Of the old style, because a setup_context costs 5 µs a call.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Keep the inputs, nothing else, and compute y."""
        _setup_kaf(ctx, inputs, None)
        with torch._C._AutoDispatchBelowAutograd():
            return ops.kaf(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Gradients:
        """Compute Jᵀ grad."""
        return _kaf_backward(ctx, grad)


class KAFFunction(torch.autograd.Function):
    """`kaf` for torch.func transforms and forward mode: (x, alpha, gamma, dictionary or None, boundary) -> y."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        """Compute y."""
        return ops.kaf(*inputs)

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
        """Compute J · tangents; where these are of x and alpha only, the result has a tangent itself."""
        v_x, v_alpha, v_gamma, v_dictionary, _ = tangents
        x, alpha, gamma, dictionary = ctx.saved_tensors
        arguments = (x, alpha, gamma, dictionary, ctx.boundary)
        if v_gamma is not None or v_dictionary is not None:
            return _double_backward(*tangents[:4], x, *arguments, Needs.GRAD)[0]
        of_x = None if v_x is None else _backward(v_x, *arguments, Needs.X)[0]
        of_alpha = None if v_alpha is None else KAFFunction.apply(x, v_alpha, gamma, dictionary, ctx.boundary)
        return add(of_x, of_alpha)


class KAFBackwardFunction(torch.autograd.Function):
    """`kaf_backward` for torch.func transforms and forward mode: (grad, kaf's arguments, needs) -> four gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        """Compute Jᵀ grad."""
        return ops.kaf_backward(*inputs)

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
        first: Gradients = (None,) * 4
        second: Gradients = first
        if v_grad is not None:
            first = _backward(v_grad, *arguments, ctx.boundary, ctx.needs)
        if any(t is not None for t in v):
            second = _double_backward(*v, grad, *arguments, ctx.boundary, ctx.needs)[1:]
        return tuple(map(add, first, second))


class KAFDoubleBackwardFunction(torch.autograd.Function):
    """`kaf_double_backward` for torch.func transforms and forward mode: (v, grad, kaf's arguments, needs) -> five."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        """Compute (Jv, H_g v)."""
        return ops.kaf_double_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the inputs, nothing else."""
        _setup_kaf_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        """Compute the gradients of <u, Jv> for u = grads[0]; those of the other parts are third derivatives."""
        return _kaf_double_backward_backward(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Gradients:
        """Raise: the tangent of Jv would need second derivatives that are not summed over elements."""
        raise RuntimeError(
            f"{_THIRD}, or a second one by forward mode over forward mode, which is offered in x and alpha "
            "only: use torch.func.hessian, or jacfwd of jacrev"
        )
