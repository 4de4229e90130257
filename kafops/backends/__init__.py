"""Which implementation serves a tensor, and why.

CPU tensors go to the compiled kernels; CUDA tensors to the compiled CUDA kernels, else to the Triton kernels; whatever
is left to the plain PyTorch reference, with one warning. KAFOPS_BACKEND, or `with kafops.backend(name):`, forces one.

Each backend is a file with a record of what it is, and a row of `ORDER`, which `choose`, `explain` and `available` go
through.
"""

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kafops import ops, plain
from kafops.backends import cpu, cuda, reference, triton
from kafops.backends.record import Backend
from kafops.torch_private import assumed_constant, unregister

__all__ = ["ORDER", "Backend", "available", "backend", "choose", "choose_for", "explain"]

ORDER = (cpu.BACKEND, cuda.BACKEND, triton.BACKEND, reference.BACKEND)  # the fastest first
_NAMED = {b.name: b for b in ORDER}
_LAST = ORDER[-1]  # serves whatever the others leave

_lock = threading.RLock()  # of all that follows, for writing
_forced: str | None = None  # the name of the last of these; a plain global, so that torch.compile guards it
_tokens: list["_Token"] = []  # one for each context that is entered, in this order
_overrides: list[torch.library.Library] = []  # that put the forced backend's functions before the others
_active: dict[tuple[str, str], torch.library.Library] = {}  # that serve a device type by default, by (backend, type)
_environment = os.environ.get("KAFOPS_BACKEND") or None


class _Token:
    """Stands for one entry of a context that forces a backend."""

    def __init__(self, name: str) -> None:
        self.name = name


def choose(x: Tensor) -> str:
    """Return the name of the backend that computes on x's device: "cpu", "cuda", "triton" or "reference".

    Raises:
        RuntimeError: the backend that is forced cannot serve x.
    """
    device_type = "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type  # .type takes longer than all the rest
    chosen = None if _forced is None else _demanded(device_type)
    if chosen is None:
        chosen = _preferred(device_type)
        if chosen.activate is not None:
            _activate(chosen.name, device_type)
        elif chosen is _LAST and not torch.compiler.is_compiling():
            _warn_once(device_type)
    return chosen.name


def choose_for(kernel: str, x: Tensor) -> str:
    """Return what `choose` does, with one warning where that backend has a kernel κ in plain PyTorch only.

    Raises:
        RuntimeError: the backend that is forced cannot serve x.
    """
    name = choose(x)
    if kernel not in _NAMED[name].kernels and not torch.compiler.is_compiling():
        _warn_of_kernel(kernel, name)
    return name


def explain(x: Tensor | torch.device | str) -> str:
    """Say in a few sentences which backend serves a tensor or a device, and why not each of the faster ones.

    Args:
        x: a tensor, a torch.device, or the name of one: "cpu", "cuda", "cuda:1", ...

    Raises:
        RuntimeError: the backend that is forced cannot serve x, or no device has that name.

    Example:
        >>> kafops.backends.explain("cpu")
        'cpu: compiled kernels, instruction set ...'
    """
    device_type = (x.device if isinstance(x, Tensor) else torch.device(x)).type
    chosen = _demanded(device_type)
    if chosen is not None:
        return f"{chosen.name}: {chosen.describe(device_type)}, because {_who_forces(chosen.name)}"
    chosen = _preferred(device_type)
    faster = ORDER[: ORDER.index(chosen)]
    reasons = _distinct(b.why_not(device_type) for b in faster if b.by_default(device_type))
    if chosen is _LAST and not reasons:
        reasons = [f"kafops has no compiled kernels for device type {device_type!r}"]
    return f"{chosen.name}: {chosen.describe(device_type)}" + (f", because {'; '.join(reasons)}" if reasons else "")


def available(device_type: str) -> tuple[str, ...]:
    """Return the names of the backends that can serve tensors on a device type, the fastest first."""
    return tuple(b.name for b in ORDER if b.why_not(device_type) is None)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend within the context, for all threads: "cpu", "cuda", "triton" or "reference".

    Of contexts that overlap, nested or in several threads, the one entered last is in force; leaving one, in whatever
    order, ends that one alone. A backward pass runs on the backend that is in force when it runs; that of a forward
    pass by the reference, whose derivatives are PyTorch's own, stays with it.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: on entry, the backend cannot be used on this machine; on a call, not for that tensor.

    Example:
        >>> with kafops.backend("reference"):
        ...     y = layer(x)
    """
    global _forced
    if torch.compiler.is_compiling() and not _overrides and _usable(name).activate is None:
        before, _forced = _forced, name  # all that tracing needs, which cannot take a lock
        try:
            yield
        finally:
            _forced = before
        return
    token = _enter(name)
    try:
        yield
    finally:
        _leave(token)


def _enter(name: str) -> _Token:
    _usable(name)
    token = _Token(name)
    with _lock:
        _tokens.append(token)
        try:
            _force_the_last()
        except BaseException:
            _tokens.remove(token)
            raise
    return token


def _leave(token: _Token) -> None:
    with _lock:
        _tokens.remove(token)
        _force_the_last()


def _force_the_last() -> None:
    """Put the last token's backend in force. An error leaves everything as it was."""
    global _forced, _overrides
    name = _tokens[-1].name if _tokens else None
    libraries: list[torch.library.Library] = []
    try:
        if name is not None and (activate := _NAMED[name].activate) is not None:
            libraries.extend(map(activate, _devices(_NAMED[name])))
    except BaseException:
        _drop(libraries)
        raise
    before, _overrides, _forced = _overrides, libraries, name
    _drop(before)


def _drop(libraries: list[torch.library.Library]) -> None:
    while libraries:
        unregister(libraries.pop())


def _usable(name: str) -> Backend:
    """Return the backend of that name.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it can serve no device of this machine.
    """
    if name not in _NAMED:
        raise ValueError(f"there is no backend {name!r}; kafops has {', '.join(map(repr, _NAMED))}")
    found = _NAMED[name]
    if found.devices is not None and not _devices(found):
        reasons = _distinct(map(found.why_not, sorted(found.default_devices or found.devices)))
        raise RuntimeError(f"backend {name!r} cannot be used here: {'; '.join(reasons)}")
    return found


def _devices(b: Backend) -> list[str]:
    """The device types that a backend that does not serve all of them can serve here."""
    return [device_type for device_type in sorted(b.devices or ()) if b.why_not(device_type) is None]


def _demanded(device_type: str) -> Backend | None:
    """Return the backend that is forced, or None. Tensors on meta have no values that one could compute."""
    name = _forced
    if name is None or device_type == "meta":
        return None
    reason = _NAMED[name].why_not(device_type)
    if reason is not None:
        raise RuntimeError(f"{_who_forces(name)}, which cannot serve a tensor on {device_type!r}: {reason}")
    return _NAMED[name]


def _distinct(reasons: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(filter(None, reasons)))


def _preferred(device_type: str) -> Backend:
    """Return the first backend that serves a device type by default."""
    for b in ORDER:
        if b.by_default(device_type) and b.why_not(device_type) is None:
            break
    return b


@assumed_constant
def _activate(name: str, device_type: str) -> None:
    """Register a backend's functions for a device type for good, once."""
    activate = _NAMED[name].activate
    with _lock:
        if activate is not None and (name, device_type) not in _active:
            _active[name, device_type] = activate(device_type)


def _in_plain_pytorch(function: Callable[..., Any]) -> Callable[..., Any]:
    def computed(*arguments: Any, **named: Any) -> Any:
        x = next(t for t in (*arguments, *named.values()) if isinstance(t, Tensor))
        _warn_of_operator(x.device.type)
        return function(*arguments, **named)

    return computed


def _activate_in_place_of_what_is_not_there() -> None:
    """Register functions for device types whose own kernels could not be loaded; operators may be called directly.

    Exported programs do so. Whether kernels that were loaded fit this machine's GPUs is not asked before a tensor is on
    one. On devices that no kernels are for, plain PyTorch serves.
    """
    for name, function in (("kaf", plain.kaf), ("kaf_backward", plain.kaf_backward)):
        ops.implement(name, _in_plain_pytorch(function), "CompositeExplicitAutograd")
    for device_type in sorted(set[str]().union(*(b.default_devices or () for b in ORDER))):
        first = next(b for b in ORDER if b.by_default(device_type) and b.load_error() is None)
        _activate(first.name, device_type)


def _who_forces(name: str) -> str:
    if name == _environment and len(_tokens) == 1:
        return f"KAFOPS_BACKEND={name} asks for backend {name!r}"
    return f"kafops.backend({name!r}) is in force"


@functools.cache
def _warn_once(device_type: str) -> None:
    if device_type == "meta":
        return
    warnings.warn(
        f"kafops computes through the plain PyTorch reference, which is slow and keeps D times the memory of x: "
        f"{explain(device_type).partition('because ')[2]}",
        stacklevel=4,
    )


@functools.cache
def _warn_of_operator(device_type: str) -> None:
    warnings.warn(
        f"kafops computes an operator in plain PyTorch, a point of the dictionary at a time, which is slow: "
        f"{explain(device_type).partition('because ')[2]}",
        stacklevel=4,
    )


@functools.cache
def _warn_of_kernel(kernel: str, name: str) -> None:
    warnings.warn(
        f"kafops computes kernel {kernel!r} in plain PyTorch, a point of the dictionary at a time, which is slow, "
        f"because backend {name!r} has {', '.join(map(repr, sorted(_NAMED[name].kernels)))} only",
        stacklevel=5,
    )


_activate_in_place_of_what_is_not_there()
if _environment is not None:
    _enter(_environment)
