"""Which implementation serves a tensor, and why.

CPU tensors go to the compiled kernels; CUDA tensors to the compiled CUDA kernels, else to the Triton kernels; whatever
is left to the plain PyTorch reference, with one warning. KAFOPS_BACKEND, or `with kafops.backend(name):`, forces one.

`choose` decides, `explain` says what it would decide and why not otherwise; both read the one function `_why_not`.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from kafops.backends import cpu, cuda, triton

__all__ = ["available", "backend", "choose", "explain"]

NAMES = ("cpu", "cuda", "triton", "reference")
_OPERATORS = ("kaf", "kaf_backward", "kaf_double_backward")

_forced: str | None = None
_overrides: list[torch.library.Library] = []  # that put the forced backend's kernels before the others
_default: torch.library.Library | None = None  # of the Triton kernels, where the compiled ones cannot serve


def choose(x: Tensor) -> str:
    """Return the name of the backend that computes on x's device: "cpu", "cuda", "triton" or "reference".

    Raises:
        RuntimeError: the backend that is forced cannot serve x.
    """
    device_type = x.device.type
    if device_type == "cpu" and _forced is None and cpu.load_error is None:
        return "cpu"
    name = _decide(device_type)
    if name == "reference" and _forced is None and not torch.compiler.is_compiling():
        _warn_once(device_type)
    return name


def choose_for(kernel: str, x: Tensor) -> str:
    """Return "cpu" or "reference", whichever computes a kernel other than the Gaussian on x's device.

    Raises:
        RuntimeError: the backend that is forced cannot serve x.
    """
    name = choose(x)
    if name in ("cpu", "reference"):
        return name
    if not torch.compiler.is_compiling():
        _warn_of_kernel(kernel, name)
    return "reference"


def explain(x: Tensor) -> str:
    """Say in a few sentences which backend would serve x, and why not each of the faster ones."""
    device_type = x.device.type
    name = "reference" if _forced == "reference" else _decide(device_type)
    what = {
        "cpu": lambda: f"compiled kernels, instruction set {cpu.capability()}",
        "cuda": lambda: "compiled CUDA kernels",
        "triton": lambda: "Triton kernels" + (", run by Triton's interpreter" if device_type == "cpu" else ""),
        "reference": lambda: "plain PyTorch",
    }[name]()
    if _forced is not None and device_type != "meta":
        return f"{name}: {what}, because {_who_forces()}"
    made_for_x = ("cpu",) if device_type == "cpu" else ("cuda", "triton") if device_type == "cuda" else ()
    faster = (_why_not(other, device_type) for other in made_for_x if NAMES.index(other) < NAMES.index(name))
    reasons = [why for why in faster if why is not None]
    if name == "reference" and not reasons:
        reasons = [f"kafops has no compiled kernels for device type {device_type!r}"]
    return f"{name}: {what}" + (f", because {'; '.join(reasons)}" if reasons else "")


def available(device_type: str) -> tuple[str, ...]:
    """Return the names of the backends that can serve tensors on a device type, the fastest first."""
    return tuple(name for name in NAMES if _why_not(name, device_type) is None)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend within the context, for all threads: "cpu", "cuda", "triton" or "reference".

    A backward pass runs on the backend that is in force when it runs; that of a forward pass by the reference, whose
    derivatives are PyTorch's own, stays with it.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: on entry, the backend cannot be used on this machine; on a call, not for that tensor.

    Example:
        >>> with kafops.backend("reference"):
        ...     y = layer(x)
    """
    before = _forced
    _force(name)
    try:
        yield
    finally:
        _force(before)


def _force(name: str | None) -> None:
    global _forced
    if name is not None and name not in NAMES:
        raise ValueError(f"there is no backend {name!r}; kafops has {', '.join(map(repr, NAMES))}")
    serves = [device for device in ("cpu", "cuda") if name is not None and _why_not(name, device) is None]
    if name is not None and not serves:
        device = "cpu" if name == "cpu" else "cuda"
        raise RuntimeError(f"backend {name!r} cannot be used here: {_why_not(name, device)}")
    while _overrides:
        _overrides.pop()._destroy()
    _forced = name
    if name == "triton":
        _overrides.extend(_register(triton, device) for device in serves)


def _register(module: ModuleType, device_type: str) -> torch.library.Library:
    """Put a module's functions before whatever serves the operators on a device type."""
    library = torch.library.Library("kafops", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators|.*[Oo]verriding a previously")
        for name in _OPERATORS:
            library.impl(name, getattr(module, name), device_type.upper(), allow_override=True)
    return library


def _decide(device_type: str) -> str:
    if _forced is None or device_type == "meta":
        for name in NAMES:
            made_for_it = name != "triton" or device_type == "cuda"  # an interpreter is asked for by name only
            if made_for_it and _why_not(name, device_type) is None:
                return name
    assert _forced is not None
    reason = _why_not(_forced, device_type)
    if reason is not None:
        raise RuntimeError(f"{_who_forces()}, which cannot serve a tensor on {device_type!r}: {reason}")
    return _forced


def _why_not(name: str, device_type: str) -> str | None:
    """Say why a backend cannot serve tensors on a device type, or return None."""
    if name == "reference":
        return None
    if name == "cpu":
        if device_type != "cpu":
            return "the CPU kernels serve CPU tensors only"
        return f"the compiled CPU kernels could not be loaded ({cpu.load_error})" if cpu.load_error else None
    if name == "triton" and triton.interpreted:
        return None if device_type in ("cpu", "cuda") else "Triton's interpreter serves CPU and CUDA tensors only"
    if device_type != "cuda":
        return f"the {'CUDA' if name == 'cuda' else 'Triton'} kernels serve CUDA tensors only"
    return _why_not_on_gpu(name)


def _why_not_on_gpu(name: str) -> str | None:
    return _asked_once(name)


# torch.compiler.assume_constant_result, without importing all of torch._dynamo
_why_not_on_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _asked_once(name: str) -> str | None:
    for index in range(torch.cuda.device_count() if torch.version.cuda else 0):
        capability = torch.cuda.get_device_capability(index)
        if capability < cuda.MINIMUM:
            return (
                f"kafops' GPU kernels need compute capability {cuda.MINIMUM[0]}.{cuda.MINIMUM[1]}, and GPU {index} "
                f"({torch.cuda.get_device_name(index)}) has {capability[0]}.{capability[1]}"
            )
    if name == "triton":
        return f"the Triton kernels could not be loaded ({triton.load_error})" if triton.load_error else None
    reason = cuda.why_not()
    if reason is not None:
        _serve_by_triton()  # also where the compiled kernels are loaded, but for other GPUs
    return reason


def _serve_by_triton() -> None:
    global _default
    if _default is None and triton.load_error is None:
        _default = _register(triton, "cuda")


def _who_forces() -> str:
    if _forced == os.environ.get("KAFOPS_BACKEND"):
        return f"KAFOPS_BACKEND={_forced} asks for backend {_forced!r}"
    return f"kafops.backend({_forced!r}) is in force"


@functools.cache
def _warn_once(device_type: str) -> None:
    if device_type == "meta":
        return
    warnings.warn(
        f"kafops computes through the plain PyTorch reference, which is slow and keeps D times the memory of x: "
        f"{explain(torch.empty(0, device=device_type)).partition('because ')[2]}",
        stacklevel=4,
    )


@functools.cache
def _warn_of_kernel(kernel: str, name: str) -> None:
    warnings.warn(
        f"kafops computes kernel {kernel!r} through the plain PyTorch reference, which is slow and keeps D times the "
        f"memory of x, because backend {name!r} has the kernel 'gaussian' only",
        stacklevel=5,
    )


if cuda.load_error is not None:
    _serve_by_triton()
if os.environ.get("KAFOPS_BACKEND"):
    _force(os.environ["KAFOPS_BACKEND"])
