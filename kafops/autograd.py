"""Derivatives: the formulas, once, for every way in which PyTorch asks for them.

With ψ[n, m](x − δ) = ∂ⁿ/∂xⁿ ∂ᵐ/∂γᵐ κ(√γ (x − δ)) and M[n, m](g)_k = Σ_i g_i ψ[n, m](x_i − δ_k), summed over elements,

    kaf[n, m]              Σ_k α_k ψ[n, m](x − δ_k)
    kaf_backward[n, m](g)  g kaf[n + 1, m],   M[n, m](g),   ⟨α, M[n, m + 1](g)⟩,   −α M[n + 1, m](g)

the second is the gradient of ⟨g, kaf[n, m]⟩ in x, α, γ and δ, and the gradient of its four parts against the weights
v, h, s and q is that of

    ⟨g v, kaf[n + 1, m](α)⟩ + ⟨g, kaf[n, m](h)⟩ + ⟨g, kaf[n, m + 1](s α)⟩ + ⟨g, kaf[n + 1, m](−q α)⟩

which is made of calls of the two again: they are closed under differentiation. A base belongs to the true α alone, so
calls with other coefficients are made without it. Where the graph ends at a second derivative, as it does when a loss
with a gradient penalty is differentiated, one fused operator, `kaf_double_backward`, takes the place of the sum.

There is one route, on the operators' Autograd key, for eager calls, torch.func and torch.compile. Plain eager calls go
by `KAFEagerFunction` instead, which spares them half of their time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kafops import ops
from kafops.ops import OPERATORS, Needs
from kafops.torch_private import (
    AutoDispatchBelowAutograd,
    SingleLevelFunction,
    any_requires_grad,
    function_of,
    gradients_wanted,
    transforms_active,
    watched,
)
from kafops.transforms import add, below, cast, product, register

Gradients = tuple[Tensor | None, ...]

_KAF, _BACKWARD, _DOUBLE = (OPERATORS[name] for name in ("kaf", "kaf_backward", "kaf_double_backward"))
_FLAGS = _BACKWARD.flags
_kaf, _kaf_backward = function_of(ops.kaf), function_of(ops.kaf_backward)


def apply(
    x: Tensor,  # [N, C, *]
    alpha: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    dictionary: Tensor | None,  # [C, D] or [1, D]
    boundary: float,
    kernel: int,
    base: int,
) -> Tensor:  # [N, C, *]
    """Compute kaf by the quickest route that supports what is active."""
    if torch.compiler.is_compiling():
        return ops.kaf(x, alpha, gamma, dictionary, boundary, kernel, base)
    return apply_eagerly(x, alpha, gamma, dictionary, boundary, kernel, base)


def apply_eagerly(
    x: Tensor, alpha: Tensor, gamma: Tensor, dictionary: Tensor | None, boundary: float, kernel: int, base: int
) -> Tensor:
    """`apply` where nothing is compiled."""
    if watched((x, alpha, gamma, dictionary)):
        return ops.kaf(x, alpha, gamma, dictionary, boundary, kernel, base)
    if torch.is_grad_enabled() and any_requires_grad(x, alpha, gamma, dictionary):
        return KAFEagerFunction.apply(x, alpha, gamma, dictionary, boundary, kernel, base)
    with AutoDispatchBelowAutograd():
        return _kaf(x, alpha, gamma, dictionary, boundary, kernel, base)


class KAFEagerFunction(torch.autograd.Function):
    """`kaf` for plain eager calls: (x, alpha, gamma, dictionary or None, boundary, kernel, base) -> y.

    Of the old style, because a setup_context costs 5 µs a call.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Keep the inputs, nothing else, and compute y."""
        ctx.save_for_backward(*inputs[:4])
        ctx.rest = inputs[4:]
        ctx.set_materialize_grads(False)
        with AutoDispatchBelowAutograd():
            return _kaf(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Gradients:
        """Compute the gradients of ⟨grad, y⟩."""
        if grad is None:
            return (None,) * 7
        needs = _needs(ctx)
        x, alpha, gamma, dictionary = tensors = ctx.saved_tensors
        boundary, kernel, base = ctx.rest
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or watched((grad, *tensors)):
            gradients = ops.kaf_backward(grad, x, alpha, gamma, dictionary, boundary, needs, kernel, base)
        else:
            with AutoDispatchBelowAutograd():
                gradients = _kaf_backward(grad, x, alpha, gamma, dictionary, boundary, needs, kernel, base)
        return *_only(gradients, needs), None, None, None


class _Kaf(SingleLevelFunction):
    """The operator `kaf`: all its arguments -> y."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        with below():
            return ops.kaf(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])
        ctx.curve = _Curve(*inputs[4:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, w: Tensor | None) -> Gradients:
        if w is None:
            return _KAF.no_gradients
        needs = _needs(ctx)
        return *ctx.curve.backward(w, *ctx.saved_tensors, needs), *(None,) * 5

    @staticmethod
    def jvp(ctx: Any, v_x: Tensor | None, v_alpha: Tensor | None, v_gamma: Any, v_dictionary: Any, *_: None) -> Any:
        x, *parameters = ctx.saved_tensors
        if x.dtype == torch.float64:  # float32 parameters' products would be rounded
            parameters = _widened(parameters, x.dtype, cast)
            v_alpha, v_gamma, v_dictionary = _widened((v_alpha, v_gamma, v_dictionary), x.dtype, cast)
        alpha, gamma, dictionary = parameters
        curve, points = ctx.curve, (gamma, dictionary)
        of_x = None if v_x is None else curve.backward(v_x, x, alpha, *points, Needs.X)[0]
        of_alpha = None if v_alpha is None else curve.bare()(x, v_alpha, *points)
        of_gamma = None if v_gamma is None else curve.bare(0, 1)(x, product(alpha, v_gamma), *points)
        of_points = None if v_dictionary is None else curve.bare(1, 0)(x, product(alpha, v_dictionary, -1.0), *points)
        return add(add(of_x, of_alpha), add(of_gamma, of_points))


class _KafBackward(SingleLevelFunction):
    """The operator `kaf_backward`: all its arguments -> the gradients of x, alpha, gamma and dictionary."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        with below():
            return ops.kaf_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, boundary, needs = inputs[:7]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.curve = _Curve(boundary, *inputs[7:])
        ctx.needs = needs if tensors[-1] is not None else needs & ~Needs.DICTIONARY
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *v: Tensor | None) -> Gradients:
        weights = _only(v, ctx.needs)
        if all(t is None for t in weights):
            return _BACKWARD.no_gradients
        needs = _needs(ctx, _DOUBLE.flags)
        return *ctx.curve.double_backward(weights, *ctx.saved_tensors, needs), *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, v_grad: Any, v_x: Any, v_alpha: Any, v_gamma: Any, v_dictionary: Any, *_: None) -> Gradients:
        """The tangent is kaf_backward(v_grad) and the derivative of kaf_backward(grad) along the other tangents."""
        saved = ctx.saved_tensors
        wide = torch.promote_types(saved[1].dtype, torch.float32)  # products and partial sums would be rounded
        grad, x, alpha, gamma, dictionary = _widened(saved, wide, cast)
        v = (v_grad, v_x, v_alpha, v_gamma, v_dictionary)
        v_grad, v_x, v_alpha, v_gamma, v_dictionary = _widened(v, wide, cast)
        curve, needs, points = ctx.curve, ctx.needs, (gamma, dictionary)
        but_alpha = needs & ~Needs.ALPHA
        parts: list[Gradients] = []
        if v_grad is not None:
            parts.append(curve.backward(v_grad, x, alpha, *points, needs))
        if v_x is not None:
            parts.append(curve.derived(1, 0).backward(product(grad, v_x), x, alpha, *points, needs))
        if v_alpha is not None:
            parts.append(curve.bare().backward(grad, x, v_alpha, *points, but_alpha))
        for v, order, sign in ((v_gamma, (0, 1), 1.0), (v_dictionary, (1, 0), -1.0)):
            if v is None:
                continue
            of_x, sums, *rest = curve.bare(*order).backward(grad, x, product(alpha, v, sign), *points, needs)
            shared = sums is not None and sums.shape[0] != alpha.shape[0]
            parts.append((of_x, None if sums is None else product(sums, v, sign, shared), *rest))
        tangents = []
        for flag, like, terms in zip(_FLAGS, saved[1:], zip(*parts, strict=True), strict=True):
            total = None
            for term in terms:
                total = add(total, term)
            if total is None:
                total = torch.zeros_like(like) if needs & flag else x.new_zeros(0)
            tangents.append(total if like is None else cast(total, like.dtype))
        return tuple(tangents)


class _Curve:
    """What of a call is no tensor, and the operators for it."""

    def __init__(self, boundary: float, kernel: int, base: int, n: int, m: int) -> None:
        self.boundary, self.kernel, self.base, self.n, self.m = boundary, kernel, base, n, m

    def derived(self, n: int, m: int) -> "_Curve":
        """Return the curve differentiated n times more in x, and m times in gamma."""
        return _Curve(self.boundary, self.kernel, self.base, self.n + n, self.m + m)

    def bare(self, n: int = 0, m: int = 0) -> "_Curve":
        """Return the same without base, for coefficients other than the true ones."""
        return _Curve(self.boundary, self.kernel, 0, self.n + n, self.m + m)

    def __call__(self, *tensors: Tensor | None) -> Tensor:
        return ops.kaf(*tensors, self.boundary, self.kernel, self.base, self.n, self.m)

    def backward(self, weight: Tensor, *arguments: Any) -> Gradients:
        """(weight, x, alpha, gamma, dictionary, needs) -> four gradients, None where not needed."""
        *tensors, needs = arguments
        if not needs:
            return (None,) * 4
        rest = (self.kernel, self.base, self.n, self.m)
        return _only(ops.kaf_backward(weight, *tensors, self.boundary, needs, *rest), needs)

    def double_backward(
        self,
        v: Gradients,  # weights of the gradients of x, alpha, gamma and dictionary
        grad: Tensor,
        x: Tensor,
        alpha: Tensor,
        gamma: Tensor,
        dictionary: Tensor | None,
        needs: int,
    ) -> Gradients:
        """Return the gradients of grad, x, alpha, gamma and dictionary of kaf_backward's parts against v."""
        if not torch.is_grad_enabled() and self.kernel == self.n == self.m == 0:
            tensors = (grad, x, alpha, gamma, dictionary)
            gradients = ops.kaf_double_backward(*v, *tensors, self.boundary, needs, self.base)
            return tuple(g if needs & flag else None for g, flag in zip(gradients, _DOUBLE.flags, strict=True))
        return self.composed_double_backward(v, grad, x, alpha, gamma, dictionary, needs)

    def composed_double_backward(
        self,
        v: Gradients,
        grad: Tensor,
        x: Tensor,
        alpha: Tensor,
        gamma: Tensor,
        dictionary: Tensor | None,
        needs: int,
    ) -> Gradients:
        """Return the same by calls of kaf and kaf_backward, for any κ and order, differentiable."""
        tensors = (grad, x, alpha, gamma, dictionary)
        wide = torch.promote_types(x.dtype, torch.float32)  # products and partial sums would be rounded
        if any(t is not None and torch.promote_types(t.dtype, wide) != t.dtype for t in tensors):
            widened: Any = (_widened(v, wide, Tensor.to), *_widened(tensors, wide, Tensor.to), needs)
            gradients = zip(self.composed_double_backward(*widened), tensors, strict=True)
            return tuple(None if g is None or t is None else g.to(t.dtype) for g, t in gradients)
        v_x, v_alpha, v_gamma, v_dictionary = v
        points, needs_grad, needs = (gamma, dictionary), needs & Needs.GRAD, needs & ~Needs.GRAD
        of_grad: list[Tensor | None] = []
        parts: list[Gradients] = [(None,) * 4]
        if v_x is not None:
            if needs_grad:
                of_grad.append(self.backward(v_x, x, alpha, *points, Needs.X)[0])
            parts.append(self.derived(1, 0).backward(grad * v_x, x, alpha, *points, needs))
        if v_alpha is not None:
            if needs_grad:
                of_grad.append(self.bare()(x, v_alpha, *points))
            parts.append(self.bare().backward(grad, x, v_alpha, *points, needs & ~Needs.ALPHA))
        for factor, along in (
            (None if v_gamma is None else v_gamma.unsqueeze(1), self.bare(0, 1)),
            (None if v_dictionary is None else -v_dictionary, self.bare(1, 0)),
        ):
            if factor is None:
                continue
            if needs_grad:
                of_grad.append(along(x, factor * alpha, *points))
            of_x, sums, *rest = along.backward(grad, x, factor * alpha, *points, needs)
            parts.append((of_x, None if sums is None else _like(factor * sums, alpha), *rest))
        return _total(of_grad), *(_total(terms) for terms in zip(*parts, strict=True))


def _differentiable_double_backward(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
    """`kaf_double_backward` for whoever calls it: its derivatives are those of the sum that it stands for."""
    a = _DOUBLE.bind(arguments, named)
    if not transforms_active() and not (torch.is_grad_enabled() and any_requires_grad(*map(a.get, _DOUBLE.tensors))):
        with AutoDispatchBelowAutograd():
            return ops.kaf_double_backward(*a.values())
    return composed_double_backward(*a.values())


def composed_double_backward(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
    """Compute the operator `kaf_double_backward` by calls of the two others."""
    a = _DOUBLE.bind(arguments, named)
    tensors = [a[name] for name in _DOUBLE.tensors]
    curve = _Curve(a["boundary"], 0, a["base"], 0, 0)
    grad, x, alpha, gamma, dictionary = tensors[4:]
    gradients = curve.composed_double_backward(tuple(tensors[:4]), grad, x, alpha, gamma, dictionary, a["needs"])
    return tuple(
        a["x"].new_zeros(0)
        if not a["needs"] & flag or a[name] is None
        else torch.zeros_like(a[name])
        if g is None
        else g
        for name, flag, g in zip(_DOUBLE.outputs, _DOUBLE.flags, gradients, strict=True)
    )


def _needs(ctx: Any, flags: tuple[int, ...] = _FLAGS) -> int:
    """The bits of the gradients that are needed. A graph that is differentiated further is asked for some of them."""
    wanted = gradients_wanted(ctx) if torch.is_grad_enabled() else ctx.needs_input_grad
    return sum([flag for flag, needed in zip(flags, wanted, strict=False) if needed])


def _only(gradients: Sequence[Tensor | None], needs: int) -> Gradients:
    """Drop the gradients that nobody asked for, which the operators return as empty tensors."""
    return tuple([g if needs & flag else None for g, flag in zip(gradients, _FLAGS, strict=True)])


def _total(terms: Sequence[Tensor | None]) -> Tensor | None:
    given = [t for t in terms if t is not None]
    return sum(given[1:], given[0]) if given else None


def _widened(
    tensors: Sequence[Tensor | None], dtype: torch.dtype, cast: Callable[[Tensor, torch.dtype], Tensor]
) -> tuple[Any, ...]:
    """Cast tensors that are narrower than dtype."""
    return tuple(None if t is None else cast(t, torch.promote_types(t.dtype, dtype)) for t in tensors)


def _like(t: Tensor, p: Tensor) -> Tensor:
    """Add over channels where they share one row of p."""
    return t.sum(0, keepdim=True) if p.shape[0] == 1 and t.shape[0] != 1 else t


register("kaf", _Kaf, lambda arguments, named: tuple(_KAF.bind(arguments, named).values()))
register("kaf_backward", _KafBackward, lambda arguments, named: tuple(_BACKWARD.bind(arguments, named).values()))
ops.implement("kaf_double_backward", _differentiable_double_backward, "Autograd")
ops.implement("kaf_double_backward", composed_double_backward, "CompositeExplicitAutograd")  # where there is no kernel
