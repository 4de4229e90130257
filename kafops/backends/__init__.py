"""Which implementation serves a tensor, and why.

`choose` decides, `explain` says what it would decide and why not otherwise; both read the one table `_reasons`.
"""

import functools
import warnings

import torch
from torch import Tensor

from kafops.backends import cpu

__all__ = ["choose", "explain"]


def choose(x: Tensor) -> str:
    """Return the name of the backend that computes on x's device: "cpu" or "reference"."""
    if x.device.type == "cpu" and cpu.load_error is None:
        return "cpu"
    if not torch.compiler.is_compiling():
        _warn_once(x.device.type)
    return "reference"


def explain(x: Tensor) -> str:
    """Say in one sentence which backend would serve x, and why no faster one does."""
    reason = _why_reference(x.device.type)
    if reason is None:
        return f"cpu: compiled kernels, instruction set {cpu.capability()}"
    return f"reference: plain PyTorch, because {reason}"


def _why_reference(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"kafops has no compiled kernels for device type {device_type!r}"
    if cpu.load_error is not None:
        return f"the compiled CPU kernels could not be loaded ({cpu.load_error})"
    return None


@functools.cache
def _warn_once(device_type: str) -> None:
    if device_type == "meta":
        return
    warnings.warn(
        f"kafops computes through the plain PyTorch reference, which is slow and keeps D times the memory of x: "
        f"{_why_reference(device_type)}",
        stacklevel=4,
    )
