"""Activations by name. Each is a factory: number of channels -> module."""

import difflib
from collections.abc import Callable

from torch import nn

import kafops

ActivationFactory = Callable[[int], nn.Module]

ACTIVATIONS: dict[str, ActivationFactory] = {
    "relu": lambda channels: nn.ReLU(),
    "silu": lambda channels: nn.SiLU(),
    "kaf": lambda channels: kafops.KAF2d(channels),
    "kaf_isometric": lambda channels: kafops.KAF2d(channels, init="isometric"),
}


def activation(name: str) -> ActivationFactory:
    """Return the factory called `name`, or raise a ValueError that names the near ones."""
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(name, ACTIVATIONS)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"unknown activation {name!r}, there are {', '.join(ACTIVATIONS)}{hint}")
    return ACTIVATIONS[name]
