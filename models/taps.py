"""What goes into the activations of a network and comes out, seen while it runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

import kafops
from models.activations import KWinners, SmoothReLU
from models.activations.smooth import PSSiLU

See = Callable[[str, Tensor, Tensor], None]
"""Gets the name of a module, its input and its output."""

_OURS = (kafops.KAF, KWinners, PSSiLU, SmoothReLU)
_NO_ACTIVATIONS = ("MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "LogSoftmax")


def activations(model: nn.Module) -> dict[str, nn.Module]:
    """Return the activations of a network by the names of their modules, in the order in which it defines them.

    They are all that `models.activations` makes, and all that torch.nn has; functions such as F.relu cannot be seen.
    """
    return {name: module for name, module in model.named_modules() if _is_activation(module)}


def elementwise(activation: nn.Module) -> bool:
    """Whether an activation works on each element by itself, so that each channel has a curve; k-WTA does not."""
    return not isinstance(activation, (KWinners, nn.GLU))


def _is_activation(module: nn.Module) -> bool:
    kind = type(module)
    torchs = kind.__module__ == "torch.nn.modules.activation" and kind.__name__ not in _NO_ACTIVATIONS
    return torchs or isinstance(module, _OURS)


@contextmanager
def tapped(modules: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Within the block, call `see(name, input, output)` after every call of one of the modules.

    What is seen is the tensors themselves: do not change them, and do not keep them longer than needed.

    Example:
        >>> with torch.no_grad(), tapped(activations(model), lambda name, x, y: print(name, x.shape)):
        ...     model(images)
    """

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda module, arguments, output: see(name, arguments[0], output)

    hooks = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
