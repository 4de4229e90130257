"""The private names of PyTorch that kafops uses: why each is needed, and a release from which on it is there.

PyTorch has no public name for any of these. No other module uses a private one.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._functorch import utils as _functorch_utils
from torch._subclasses import fake_tensor as _fake_tensor
from torch.autograd import forward_ad as _forward_ad
from torch.autograd import function as _function
from torch.overrides import has_torch_function

__all__ = [
    "AutoDispatchBelowAutograd",
    "SingleLevelFunction",
    "any_requires_grad",
    "assumed_constant",
    "enable_forward_mode",
    "enable_single_level_functions",
    "function_of",
    "get_tracing_state",
    "gradients_wanted",
    "is_fake",
    "real_tensors",
    "transforms_active",
    "unregister",
    "watched",
]

_F = TypeVar("_F", bound=Callable)

# An eager call that needs no derivative goes below PyTorch's registered ones, which spares half of a small call. 2.0
AutoDispatchBelowAutograd = torch._C._AutoDispatchBelowAutograd


def function_of(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Return what an operator calls: an eager call of it spares 0.4 µs; torch.compile knows operators only. 2.0."""
    return operator._op  # type: ignore[attr-defined]


# Whether it needs one: one call in place of a loop in Python. 2.4
any_requires_grad = torch._C._any_requires_grad

# Not None while torch.jit.trace records operators, which a call below autograd would hide from it. 2.0
get_tracing_state = torch._C._get_tracing_state
_functorch_transforms_active = torch._C._are_functorch_transforms_active

# An autograd.Function of one level of derivatives: a kernel on the Autograd key may apply it under any transform. 2.0
SingleLevelFunction = _function._SingleLevelFunction
enable_single_level_functions = _functorch_utils.enable_single_level_autograd_function

# Forward mode is off within a kernel on the Autograd key; one that is differentiated further needs it. 2.0
enable_forward_mode = _forward_ad._set_fwd_grad_enabled

# Tensors without values, under a FakeTensorMode, and a context that leaves it, for constants. 2.4
is_fake = _fake_tensor.is_fake
real_tensors = _fake_tensor.unset_fake_temporarily


def transforms_active() -> bool:
    """Whether a torch.func transform or a forward-mode level is active, which need derivatives of their own. 2.0."""
    return _functorch_transforms_active() or _forward_ad._current_level >= 0


def watched(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether something above autograd handles operators: a transform, or __torch_function__, its modes, make_fx or
    torch.jit.trace. One call, as every call of a curve asks. 2.0.
    """
    return (
        _functorch_transforms_active()
        or _forward_ad._current_level >= 0
        or has_torch_function(tensors)
        or get_tracing_state() is not None
    )


def gradients_wanted(ctx: Any) -> tuple[bool, ...]:
    """Which of a function's first inputs, tensors all, the backward pass that is running differentiates in. 2.1.

    ctx.needs_input_grad has every input that requires a gradient, also where torch.autograd.grad was asked for others.
    """
    edges = zip(ctx.needs_input_grad, ctx.next_functions, strict=False)
    return tuple(needed and node is not None and _executes(node) for needed, (node, _) in edges)


def _executes(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # said of a leaf that torch.autograd.grad was asked for
        return True


def assumed_constant(function: _F) -> _F:
    """Let torch.compile call a function while it traces: torch.compiler.assume_constant_result, which imports all of
    torch._dynamo. 2.0.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def unregister(library: torch.library.Library) -> None:
    """Take back what a library has registered, now: references that others keep would put it off. 2.1."""
    library._destroy()
