"""The compiled CPU kernels: finds the library beside this file and loads it, which defines the operators.

The lowest module: it knows nothing of the rest of the package. `torch.ops.load_library(kafops.library())` does as much
for a Python that has never imported kafops, and dlopen for a C++ program.
"""

import ctypes
from pathlib import Path

import torch

__all__ = ["capability", "library", "load_error"]

load_error: str | None = None  # why there are no compiled kernels

_path = next(iter(sorted(Path(__file__).parent.glob("_C.*so"))), None)
_loaded: ctypes.CDLL | None = None
if _path is None:
    load_error = "kafops was installed without compiled kernels; reinstall it where there is a C++ compiler"
else:
    try:
        torch.ops.load_library(_path)
        _loaded = ctypes.CDLL(str(_path))
    except OSError as error:
        load_error = str(error)


def library() -> str:
    """Return the path of the compiled library, for `torch.ops.load_library`.

    Raises:
        FileNotFoundError: kafops was installed without it.
        RuntimeError: it cannot be loaded here; the message says why.

    Example:
        >>> torch.ops.load_library(kafops.library())
    """
    if _path is None:
        raise FileNotFoundError(load_error)
    if load_error is not None:
        raise RuntimeError(f"{_path} cannot be loaded: {load_error}")
    return str(_path)


def capability() -> str:
    """Return the instruction set in use: "avx512", "avx2" or "portable" (KAFOPS_CPU_CAPABILITY forces one).

    Raises:
        RuntimeError: there are no compiled kernels.
        ValueError: KAFOPS_CPU_CAPABILITY asks for what this machine does not have.
    """
    if _loaded is None:
        raise RuntimeError(load_error)
    for name in ("kafops_capability", "kafops_capability_error"):
        getattr(_loaded, name).restype = ctypes.c_char_p
    chosen = _loaded.kafops_capability()
    if chosen is None:
        raise ValueError(_loaded.kafops_capability_error().decode())
    return chosen.decode()


if load_error is None:
    capability()
