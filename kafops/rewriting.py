"""Rewriting of one forward: calls of activations become calls of new children, in a subclass of the module's class.

torch.fx traces that forward alone, its children as leaves; module, children, hooks and state stay what they are.
"""

import copyreg
import importlib
import inspect
import itertools
import linecache
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from kafops.sites import Place, Targets

__all__ = ["ByWidth", "Traced", "Untraceable"]

_CONSTANTS = (type(None), bool, int, float, str)
_WITHOUT_SETTINGS = (Tensor, torch.dtype, torch.device, torch.layout, torch.memory_format)
_OF_EVERY_MODULE = vars(nn.Module()).keys() | vars(nn.Module).keys()


class Untraceable(Exception):
    """A forward cannot be replaced by one that is generated; the message says why."""


class Traced:
    """The forward of one module as graphs, one for training and one for evaluation, the same one where they agree.

    Args:
        module: in a model that `kafops.sites.unchanged` keeps.
        owners: the modules that are activations, with their places; calls of others are left alone.
        targets: tell the functions that are.

    Attributes:
        activations: what it calls, in order: places, or names of functions.
        frozen: names of what it reads that can be changed later without an error, and without an effect.

    Raises:
        Untraceable: the forward cannot be traced, or a trace would not say all of what it does.
    """

    def __init__(self, module: nn.Module, owners: Mapping[nn.Module, Place], targets: Targets) -> None:
        if "forward" in vars(module):
            raise Untraceable("its forward is an attribute of the object")
        if hasattr(module, "_rewritten") and "_rewritten" not in vars(type(module)):
            raise Untraceable("its class derives from one that was generated")
        self._module, self._owners, self._targets = module, owners, targets
        self._fixed: dict[str, Any] = {}  # the settings that it reads
        self.frozen: set[str] = set()
        self._graphs = []
        for training in (False, True):
            for m in module.modules():
                m.training = training
            with _watched(module, self._fixed, self.frozen):
                self._graphs.append(_trace(module))
        self._calls = [self._activations(graph) for graph in self._graphs]
        self.activations = [self._name(node) for node in self._calls[0]]
        if self.activations != [self._name(node) for node in self._calls[1]]:
            raise Untraceable("it calls other activations in training than in evaluation")

    def _activations(self, graph: fx.Graph) -> list[fx.Node]:
        return [node for node in graph.nodes if self._name(node)]

    def _name(self, node: fx.Node) -> Place | str | None:
        """Return an activation's place, or the name of its function."""
        if node.op == "call_module":
            return self._owners.get(self._module.get_submodule(str(node.target)))
        functions = {"call_method": self._targets.function_names, "call_function": self._targets.functions}
        if node.target not in functions.get(node.op, ()):
            return None
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return name.rstrip("_")

    def subclass(self, children: Mapping[int, str]) -> type[nn.Module]:
        """Return the class with a forward in which some of the activations, by number, are children of those names."""
        kind: Any = type(self._module)
        parts: dict[str, Any] = {}
        sources = []
        for graph, calls in zip(self._graphs, self._calls, strict=True):
            for index, child in children.items():
                _redirect(graph, calls[index], child)
            graph.lint()
            code = graph.python_code("self")
            sources.append(code.src)
            parts.update({name: code.globals[name] for name in _names_in(code.src) & code.globals.keys()})
        base, fixed = getattr(kind, "_rewritten", kind), getattr(kind, "_fixed", {}) | self._fixed
        return _subclass(base, tuple(dict.fromkeys(sources)), parts, fixed)


class ByWidth(nn.ModuleDict):
    """Modules in the place of one that is called at several widths: each is called where x has its width."""

    def __init__(self, modules: Mapping[int, nn.Module], channel_dim: int) -> None:
        super().__init__({str(width): m for width, m in modules.items()})
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        """Apply the module that belongs to the width of x."""
        width = str(x.shape[self.channel_dim])
        if width not in self:
            there = f"in dimension {self.channel_dim}, where there are curves for {', '.join(self)}"
            raise ValueError(f"x has {width} channels {there}")
        return self[width](x)


class _Tracer(fx.Tracer):
    """Takes every child as a leaf, and refuses blocks under another mode, which a graph does not record."""

    proxy_buffer_attributes = True  # what is done to a buffer is done in the graph, not while it is traced

    def __init__(self) -> None:
        super().__init__()
        self._mode = _mode()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _mode() != self._mode:
            raise Untraceable("it sets a mode, such as no_grad or autocast, for a part of its work")
        return super().create_node(*args, **kwargs)


@contextmanager
def _watched(module: nn.Module, read: dict[str, Any], frozen: set[str]) -> Iterator[None]:
    """Note the settings that a forward reads, and refuse one that changes modules: a graph would not.

    Args:
        module: whose forward runs in the block.
        read: takes its settings, which can be guarded.
        frozen: takes the names of what else it reads: settings of its children, and what can be changed in place.
    """
    prefixes = {m: f"{name}." if name else "" for name, m in module.named_modules()}
    set_attribute = nn.Module.__setattr__

    def get(self: nn.Module, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if self not in prefixes or name.startswith("__") or name in _OF_EVERY_MODULE:
            return value
        if self is module and _is_constant(value):
            read[name] = value
        elif name in vars(self) and not isinstance(value, _WITHOUT_SETTINGS) and not callable(value):
            frozen.add(prefixes[self] + name)
        return value

    def refuse(self: nn.Module, name: str, value: Any) -> None:
        if self not in prefixes:
            return set_attribute(self, name, value)
        made = name.startswith("_tensor_constant")  # by torch.fx
        raise Untraceable("it makes a tensor of numbers" if made else f"it sets {prefixes[self]}{name}")

    # For all modules, as torch.fx does while it traces: a forward that asks for type() must find what it knows.
    nn.Module.__getattribute__, nn.Module.__setattr__ = get, refuse  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del nn.Module.__getattribute__
        nn.Module.__setattr__ = set_attribute  # type: ignore[method-assign]


def _is_constant(value: Any) -> bool:
    return isinstance(value, _CONSTANTS) or (isinstance(value, tuple) and all(_is_constant(v) for v in value))


def _mode() -> tuple[bool, bool, bool]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _random() -> tuple[Any, ...]:
    """Return how often generators were asked, as far as Python and torch on the CPU tell."""
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state().tolist(), random.getstate(), numpy and repr(numpy.random.get_state())


def _trace(module: nn.Module) -> fx.Graph:
    before = _random()
    parameters = inspect.signature(module.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if isinstance(p.default, _CONSTANTS)}
    try:
        graph = _Tracer().trace(module)
        by_default = _Tracer().trace(module, defaults) if defaults else graph
    except Untraceable:
        raise
    except Exception as e:
        raise Untraceable(f"torch.fx cannot trace it ({type(e).__name__}: {str(e).partition(chr(10))[0]})") from e
    if _random() != before:
        raise Untraceable("it draws random numbers in Python, which a graph would keep as they fell")
    if _operations(graph) != _operations(by_default):
        raise Untraceable(f"what it does depends on whether {', '.join(defaults)} are given")
    return graph


def _operations(graph: fx.Graph) -> list[tuple[str, Any]]:
    """Return what is done, without what checks that arguments given to the trace do not change."""
    checks = {n for n in graph.nodes if "_assert" in str(n.target)}
    checks |= {n for n in graph.nodes if n.users and n.users.keys() <= checks}
    return [(n.op, n.target) for n in graph.nodes if n.op != "placeholder" and n not in checks]


def _redirect(graph: fx.Graph, node: fx.Node, child: str) -> None:
    if node.op == "call_module":
        node.target = child
        return
    x = node.args[0] if node.args else node.kwargs["input"]
    with graph.inserting_before(node):
        new = graph.create_node("call_module", child, (x,))
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _names_in(source: str) -> set[str]:
    def names(code: CodeType) -> set[str]:
        return set(code.co_names).union(*(names(c) for c in code.co_consts if isinstance(c, CodeType)))

    return names(compile(source, "forward", "exec"))


_classes: dict[Any, Any] = {}
_numbers = itertools.count()


def _subclass(
    base: Any, sources: tuple[str, ...], parts: Mapping[str, Any], fixed: Mapping[str, Any]
) -> type[nn.Module]:
    """Return the subclass whose forward is the source; of two, for evaluation and for training.

    Args:
        parts: what the names in the source stand for.
        fixed: settings that the source takes to be as they are.
    """
    key = (base, sources, *((name, id(part)) for name, part in parts.items()), *fixed.items())
    if key not in _classes:
        forwards = [_function(source, parts) for source in sources]
        body: dict[str, Any] = {
            "__doc__": base.__doc__,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__reduce_ex__": _reduce,
            "__setattr__": _set,
            "forward": forwards[0] if len(forwards) == 1 else _by_mode(*forwards),
            "_rewritten": base,
            "_sources": sources,
            "_parts": dict(parts),
            "_fixed": dict(fixed),
        }
        _classes[key] = type(base)(base.__name__, (base,), body)
    return _classes[key]


def _function(source: str, parts: Mapping[str, Any]) -> Callable[..., Any]:
    file = f"<kafops: generated forward {next(_numbers)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # for tracebacks
    names = dict(parts)
    exec(compile(source, file, "exec"), names)
    return names["forward"]


def _by_mode(evaluation: Callable[..., Any], training: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return training(self, *args, **kwargs) if self.training else evaluation(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(evaluation)  # type: ignore[attr-defined]
    return forward


def _reduce(self: nn.Module, protocol: int) -> Any:
    """Pickle by class, source and the names it uses: the subclass itself lies in no module."""
    cls = _generated(type(self))
    make, args, *rest = super(cls, self).__reduce_ex__(max(protocol, 2))
    if (make, args) != (copyreg.__newobj__, (cls,)):  # type: ignore[attr-defined]
        return make, args, *rest  # of a subclass, or of a class with a way of its own
    parts = {name: _Module(p.__name__) if isinstance(p, ModuleType) else p for name, p in cls._parts.items()}
    return _new, (cls._rewritten, cls._sources, parts, cls._fixed), *rest


def _set(self: nn.Module, name: str, value: Any) -> None:
    cls = _generated(type(self))
    if name in cls._fixed and cls._fixed[name] != value:
        raise AttributeError(
            f"{name} of this {cls.__name__} stays {cls._fixed[name]!r}: its forward was generated with that, by "
            "kafops.replace_activations; set it before"
        )
    super(cls, self).__setattr__(name, value)


def _generated(kind: type) -> Any:
    return next(c for c in kind.__mro__ if "_rewritten" in vars(c))


def _new(base: Any, sources: tuple[str, ...], parts: Mapping[str, Any], fixed: Mapping[str, Any]) -> nn.Module:
    found = {name: importlib.import_module(p) if isinstance(p, _Module) else p for name, p in parts.items()}
    cls = _subclass(base, sources, found, fixed)
    return cls.__new__(cls)


class _Module(str):
    """The name of a module that stands for it in a pickle."""
