"""Where a model uses its activations: what is recorded of each use, and how to look without leaving a trace."""

import copy
import inspect
import os
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


class Targets:
    """The classes of activations to replace, and the functions that compute what they do.

    Args:
        kinds: classes, or their qualified names, so that none has to be imported.
    """

    def __init__(self, kinds: Iterable[type[nn.Module] | str]) -> None:
        kinds = tuple(kinds)
        self.classes = tuple(k for k in kinds if isinstance(k, type))
        self.names = {k for k in kinds if isinstance(k, str)}
        names = {t.__name__.lower() for t in self.classes if t.__module__.startswith("torch.nn")}
        names = {"leaky_relu" if n == "leakyrelu" else n for n in names}
        self.function_names = names | {n + "_" for n in names}
        self.functions = {
            getattr(holder, n) for holder in (F, torch, Tensor) for n in self.function_names if hasattr(holder, n)
        }

    def match(self, module: nn.Module) -> bool:
        """Whether the module is to be replaced: subclasses are not."""
        return type(module) in self.classes or qualified_name(type(module)) in self.names

    def cover(self, module: nn.Module) -> bool:
        """Whether the module is an activation itself, so that functional calls in its forward are its own business."""
        kind = type(module)
        return self.match(module) or isinstance(module, self.classes) or kind.__module__ == _ACTIVATIONS

    def __str__(self) -> str:
        names = sorted(self.names) if len(self.names) < 4 else [f"{len(self.names)} classes by name"]
        return ", ".join([*(t.__name__ for t in self.classes), *names])


_ACTIVATIONS = "torch.nn.modules.activation"


def qualified_name(kind: type) -> str:
    """Return module and name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


@dataclass(frozen=True, eq=False)
class Place:
    """A module that holds an activation, and the name it has there; several qualified names where it is shared."""

    parent: nn.Module
    child: str
    names: tuple[str, ...]
    module: nn.Module


@dataclass(frozen=True)
class FunctionCall:
    """An activation that is a function, with what its calls are given besides x."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the activation of x."""
        return self.function(x, *self.args, **self.kwargs)

    def __str__(self) -> str:
        return f"{self.function.__name__}()"


def read_call(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, FunctionCall, bool]:
    """Split the call of a function or method of that name: its input, the rest, out of place, and was it in place?"""
    in_place, function = name.endswith("_"), getattr(F, name.rstrip("_"))
    try:
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # one of C++, or one that is called as a method
        first, *rest = (*args, *(kwargs[k] for k in ("input", "self") if k in kwargs))
        return first, FunctionCall(function, tuple(rest), {k: v for k, v in kwargs.items() if k != "input"}), in_place
    x = arguments.pop("input")
    in_place |= bool(arguments.pop("inplace", False))
    return x, FunctionCall(function, (), dict(arguments)), in_place


@dataclass(frozen=True)
class Use:
    """One call of an activation within a forward pass."""

    activation: nn.Module | FunctionCall
    place: Place | None  # of a module
    holder: nn.Module  # whose forward makes the call
    index: int  # among the activations of that forward
    where: str  # the holder, and its source line
    shape: tuple[int, ...] = ()  # of the input; 0 stands for what does not matter
    channel_dim: int | None = None  # from 0 on
    device: torch.device = _CPU
    dtype: torch.dtype = torch.float32
    problem: str = ""  # why it cannot be replaced

    @property
    def name(self) -> str:
        """The name of the function, or of the module's class."""
        if isinstance(self.activation, FunctionCall):
            return self.activation.function.__name__
        return type(self.activation).__name__

    @property
    def rank(self) -> int:
        """The number of dimensions of the input."""
        return len(self.shape)

    @property
    def channels(self) -> int:
        """The size of its channel dimension."""
        return self.shape[self.channel_dim] if self.channel_dim is not None else 0


@dataclass
class Findings:
    """All uses of activations in a forward pass, and what came out of it."""

    uses: list[Use] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    not_run_in_training: str = ""  # why not


def separate(places: Iterable[Place]) -> dict[nn.Module, Place]:
    """Give each place an object of its own, by copies of those held in several, and return whose is which."""
    owners: dict[nn.Module, Place] = {}
    for place in places:
        module = place.module
        if module in owners:
            module = copy.copy(module)
            for name, value in vars(module).items():
                if type(value) in (dict, OrderedDict):
                    vars(module)[name] = value.copy()
            place.parent._modules[place.child] = module
        owners[module] = place
    return owners


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


def compiled_functions_in_eager() -> AbstractContextManager[Any]:
    """Let calls be seen inside functions decorated with torch.compile; where dynamo is not loaded, there are none."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def unchanged(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Put the model in eval (or training) mode within the block, and bring it and the random generators back after it.

    Attributes, registered parameters, buffers and modules, hooks and training flags all return, whether or not the
    block raises. Buffers are cloned meanwhile. A parameter changed in place by a forward pass is not brought back.
    """
    kept = (vars(m).get("old") for m in model.modules())  # beneath curves, no submodules
    modules = [*model.modules(), *(m for old in kept if isinstance(old, nn.Module) for m in old.modules())]
    saved = [_snapshot(m) for m in modules]
    python_random = random.getstate()
    with torch.random.fork_rng(devices=_cuda_devices(model)):
        try:
            _lend_buffers(modules)
            for m in modules:
                m.training = training
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
