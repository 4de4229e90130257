"""Derivatives of operators by one route for all transforms, and sums and products for use within it.

`register` puts a function on an operator's Autograd key: eager calls, torch.func to any nesting, forward mode and
torch.compile all come by there. In a jvp, PyTorch silently drops the outer tangents of its own operators, so a jvp is
made of `add`, `product` and `cast`, which are operators with such derivatives themselves.

Below all that knows of KAFs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, library

from kafops.torch_private import (
    AutoDispatchBelowAutograd,
    SingleLevelFunction,
    enable_forward_mode,
    enable_single_level_functions,
)

__all__ = ["add", "below", "cast", "product", "register"]

_library = library.Library("kafops", "FRAGMENT")


@contextmanager
def below() -> Iterator[None]:
    """One level of derivatives further down, and recording there: else derivatives of derivatives would be wrong."""
    with torch.enable_grad(), enable_forward_mode(True), AutoDispatchBelowAutograd():
        yield


def register(name: str, function: type[Any], filled: Callable[..., tuple[Any, ...]]) -> None:
    """Give an operator of kafops the derivatives of a `SingleLevelFunction`, whose forward calls it `below` itself.

    Args:
        name: of the operator.
        function: of all its arguments.
        filled: (positional arguments, named arguments) -> all arguments in order.
    """

    def kernel(*arguments: Any, **named: Any) -> Any:
        with enable_single_level_functions():
            return function.apply(*filled(arguments, named))

    _library.impl(name, kernel, "Autograd")


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return a + b, of one shape and dtype; None stands for 0."""
    if a is None or b is None:
        return b if a is None else a
    return _sum(a, b)


def product(a: Tensor, b: Tensor, factor: float = 1.0, total: bool = False) -> Tensor:
    """Return factor · a · b, where b has one number for each index of the first dimensions of a.

    Args:
        a, b: tensors; dimensions of size 1 fit any.
        factor: a number.
        total: whether to add over the first dimension, which stays with size 1.
    """
    return _product(a, b, factor, total)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return t in another dtype, or itself."""
    return t if t.dtype == dtype else _cast(t, dtype)


_library.define("jvp_sum(Tensor a, Tensor b) -> Tensor")
_library.define("jvp_product(Tensor a, Tensor b, float factor, bool total) -> Tensor")
_library.define("jvp_cast(Tensor t, ScalarType dtype) -> Tensor")
_sum = torch.ops.kafops.jvp_sum.default
_product = torch.ops.kafops.jvp_product.default
_cast = torch.ops.kafops.jvp_cast.default


def _compute_product(a: Tensor, b: Tensor, factor: float, total: bool) -> Tensor:
    y = a * _along(b, a) * factor
    return y.sum(0, keepdim=True) if total else y


def _along(b: Tensor, a: Tensor) -> Tensor:
    return b.reshape(b.shape + (1,) * (a.dim() - b.dim()))


# For all devices, and for fake tensors.
_library.impl("jvp_sum", torch.add, "CompositeExplicitAutograd")
_library.impl("jvp_product", _compute_product, "CompositeExplicitAutograd")
_library.impl("jvp_cast", lambda t, dtype: t.to(dtype, copy=True), "CompositeExplicitAutograd")


class _Sum(SingleLevelFunction):
    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with below():
            return _sum(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return grad, grad

    @staticmethod
    def jvp(ctx: Any, v_a: Tensor | None, v_b: Tensor | None) -> Tensor | None:
        return add(v_a, v_b)


class _Product(SingleLevelFunction):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        with below():
            return _product(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, ctx.factor, ctx.total = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        if grad is None:
            return (None,) * 4
        a, b = ctx.saved_tensors
        weight = ctx.factor * grad
        of_a = (weight * _along(b, a)).sum_to_size(a.shape) if ctx.needs_input_grad[0] else None
        of_b = (weight * a).sum_to_size(_along(b, a).shape).reshape(b.shape) if ctx.needs_input_grad[1] else None
        return of_a, of_b, None, None

    @staticmethod
    def jvp(ctx: Any, v_a: Tensor | None, v_b: Tensor | None, *_: None) -> Tensor | None:
        a, b = ctx.saved_tensors
        rest = ctx.factor, ctx.total
        return add(None if v_a is None else product(v_a, b, *rest), None if v_b is None else product(a, v_b, *rest))


class _Cast(SingleLevelFunction):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        with below():
            return _cast(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        t, ctx.to = inputs
        ctx.of = t.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        return None if grad is None else cast(grad, ctx.of), None

    @staticmethod
    def jvp(ctx: Any, v: Tensor | None, _: None) -> Tensor | None:
        return None if v is None else cast(v, ctx.to)


register("jvp_sum", _Sum, lambda arguments, named: arguments)
register("jvp_product", _Product, lambda arguments, named: arguments)
register("jvp_cast", _Cast, lambda arguments, named: arguments)


@library.register_vmap("kafops::jvp_sum")
def _sum_vmap(info: Any, dims: tuple[int | None, ...], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    return _sum(_samples(info, a, dims[0]), _samples(info, b, dims[1])), 0


@library.register_vmap("kafops::jvp_product")
def _product_vmap(info: Any, dims: Any, a: Tensor, b: Tensor, factor: float, total: bool) -> tuple[Tensor, int]:
    a, b = _samples(info, a, dims[0]), _samples(info, b, dims[1])
    if not total:
        return _product(a, b, factor, False), 0
    return _product(a.movedim(1, 0), b.movedim(1, 0), factor, True), 1


@library.register_vmap("kafops::jvp_cast")
def _cast_vmap(info: Any, dims: Any, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    return _cast(t, dtype), dims[0]


def _samples(info: Any, t: Tensor, dim: int | None) -> Tensor:  # [B, ...]
    return t.unsqueeze(0).expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
