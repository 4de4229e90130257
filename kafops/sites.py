"""Where a model uses its activations: what is recorded of each use, and how to look without leaving a trace."""

import os
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CPU = torch.device("cpu")
_PACKAGE = os.path.dirname(__file__) + os.sep
_TORCH = os.path.dirname(torch.__file__) + os.sep
_TORCH_LAYERS = os.path.join(_TORCH, "nn", "modules") + os.sep
_CALL_MACHINERY = (_TORCH_LAYERS + "module.py", _TORCH_LAYERS + "container.py")


@dataclass(frozen=True)
class Use:
    """One call of an activation module within a forward pass."""

    module: nn.Module
    where: str  # the module whose forward makes the call, and its source line
    channels: int = 0
    rank: int = 0
    device: torch.device = _CPU
    dtype: torch.dtype = torch.float32
    problem: str = ""  # why channels and rank could not be told; empty where they could


@dataclass
class Findings:
    """All uses of the target modules in one forward pass, and the functional calls that no swap can reach."""

    uses: list[Use] = field(default_factory=list)
    functional_calls: list[str] = field(default_factory=list)


def functional_names(targets: tuple[type[nn.Module], ...]) -> set[str]:
    """Return the names of the functions and methods that compute what the targets compute: nn.ReLU -> relu, relu_."""
    names = {t.__name__.lower() for t in targets if t.__module__.startswith("torch.nn")}
    names = {"leaky_relu" if n == "leakyrelu" else n for n in names}
    return names | {n + "_" for n in names}


def functional_forms(targets: tuple[type[nn.Module], ...]) -> set[Any]:
    """Return the functions and methods that compute what the targets compute, as PyTorch passes them to overrides."""
    names = functional_names(targets)
    return {getattr(holder, n) for holder in (F, torch, Tensor) for n in names if hasattr(holder, n)}


def is_activation(module: nn.Module, targets: tuple[type[nn.Module], ...]) -> bool:
    """Whether the module is an activation itself, so that functional calls in its forward are its own business."""
    return isinstance(module, targets) or type(module).__module__ == "torch.nn.modules.activation"


def describe_caller(name: str) -> str:
    """Name the module that is running and the source line of its forward, found on the Python stack."""
    name = name or "the model itself"
    left_package = False
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        in_package = path.startswith(_PACKAGE)
        if in_package and left_package:
            break
        left_package |= not in_package
        in_torch = path.startswith(_TORCH) and (not path.startswith(_TORCH_LAYERS) or path in _CALL_MACHINERY)
        if not in_package and not in_torch:
            return f"{name} ({os.path.basename(path)}:{frame.f_lineno})"
        frame = frame.f_back  # type: ignore[assignment]
    return name


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode within the block, and bring its state and the random generators' back after it.

    Attributes, registered parameters, buffers and modules, hooks and training flags all return, whether or not the
    block raises. Buffers are cloned meanwhile. A parameter changed in place by a forward pass is not brought back.
    """
    modules = list(model.modules())
    saved = [_snapshot(m) for m in modules]
    python_random = random.getstate()
    with torch.random.fork_rng(devices=_cuda_devices(model)):
        try:
            _lend_buffers(modules)
            for m in modules:
                m.training = False
            yield
        finally:
            random.setstate(python_random)
            for m, (attributes, containers) in zip(modules, saved, strict=True):
                _restore(m, attributes, containers)


def _snapshot(module: nn.Module) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """Return the module's attributes, and each built-in container among them with a shallow copy of its contents."""
    attributes = dict(vars(module))
    containers = [(v, v.copy()) for v in attributes.values() if type(v) in (dict, OrderedDict, list, set)]
    return attributes, containers


def _restore(module: nn.Module, attributes: dict[str, Any], containers: list[tuple[Any, Any]]) -> None:
    vars(module).clear()
    vars(module).update(attributes)
    for container, contents in containers:
        container.clear()
        container.extend(contents) if isinstance(container, list) else container.update(contents)


def _lend_buffers(modules: list[nn.Module]) -> None:
    """Put clones in the place of all buffers, one clone where several modules share a buffer."""
    clones: dict[int, Tensor] = {}
    for m in modules:
        for name, b in m._buffers.items():
            if b is not None:
                m._buffers[name] = clones.setdefault(id(b), b.detach().clone())


def _cuda_devices(model: nn.Module) -> list[int]:
    tensors = (*model.parameters(), *model.buffers())
    devices = {t.device.index for t in tensors if t.device.type == "cuda"}
    if torch.cuda.is_initialized():
        devices.add(torch.cuda.current_device())
    return sorted(devices)
