"""The compiled CPU kernels: loads kafops._C, and keeps the reason where it cannot."""

import importlib

load_error: str | None = None
try:
    _C = importlib.import_module("kafops._C")  # registers the kernels of the operators that kafops.ops declares
except ModuleNotFoundError:
    load_error = "kafops was installed without compiled kernels; reinstall it where there is a C++ compiler"
except ImportError as error:
    load_error = str(error)
else:
    _C.capability()  # raises where KAFOPS_CPU_CAPABILITY asks for what this machine does not have


def capability() -> str:
    """Return the instruction set in use: "avx512", "avx2" or "portable" (KAFOPS_CPU_CAPABILITY forces one)."""
    return _C.capability()
