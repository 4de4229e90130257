"""What torch.func transforms and forward mode need: to be noticed, and sums and products that they differentiate.

The lowest module: it knows nothing of KAFs.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["Product", "Sum", "add", "refuse_compiled_forward_mode", "transforms_active"]


def transforms_active() -> bool:
    """Whether a torch.func transform or a forward-mode level is active (PyTorch has no public name for either)."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def refuse_compiled_forward_mode() -> None:
    """Raise where forward mode is active; for code that torch.compile traces.

    Raises:
        RuntimeError: a forward-mode level is active.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        raise RuntimeError(
            "kafops cannot be differentiated in forward mode inside torch.compile, where PyTorch would return a zero "
            "tangent; call torch.func.jvp, jacfwd or hessian outside torch.compile"
        )


class Sum(torch.autograd.Function):
    """a + b, of one shape, for use inside a jvp, where PyTorch silently drops the tangents of its own operators."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        """Compute a + b."""
        return a + b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Hand the gradient on to both."""
        return grad, grad

    @staticmethod
    def jvp(ctx: Any, v_a: Tensor, v_b: Tensor) -> Tensor:
        """Add the tangents."""
        return Sum.apply(v_a, v_b)


class Product(torch.autograd.Function):
    """a · b, of one shape, for use inside a jvp, where PyTorch silently drops the tangents of its own operators."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        """Compute a · b."""
        return a * b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep both factors."""
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Compute grad · b and grad · a."""
        a, b = ctx.saved_tensors
        return grad * b, grad * a

    @staticmethod
    def jvp(ctx: Any, v_a: Tensor | None, v_b: Tensor | None) -> Tensor | None:
        """Compute v_a · b + a · v_b, which has tangents itself."""
        a, b = ctx.saved_tensors
        return add(
            None if v_a is None else Product.apply(v_a, b),
            None if v_b is None else Product.apply(a, v_b),
        )


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return a + b for use inside a jvp, where None stands for a tangent of zero."""
    if a is None or b is None:
        return b if a is None else a
    return Sum.apply(a, b)
