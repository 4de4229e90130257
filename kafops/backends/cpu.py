"""The compiled CPU kernels: loads kafops._C, and keeps the reason where it cannot."""

import importlib

from kafops.backends.record import OPERATORS, Backend
from kafops.kernels import KERNELS

load_error: str | None = None
try:
    _C = importlib.import_module("kafops._C")  # registers the kernels of the operators that kafops.ops declares
except ModuleNotFoundError:
    load_error = "kafops was installed without compiled kernels; reinstall it where there is a C++ compiler"
except ImportError as error:
    load_error = str(error)
else:
    # Asked once: the kernels choose once, whatever becomes of the environment. Raises where KAFOPS_CPU_CAPABILITY asks
    # for what this machine does not have.
    _instruction_set = _C.capability()


def capability() -> str:
    """Return the instruction set in use: "avx512", "avx2" or "portable" (KAFOPS_CPU_CAPABILITY forces one)."""
    return _instruction_set


BACKEND = Backend(
    name="cpu",
    title="compiled CPU kernels",
    devices=frozenset({"cpu"}),
    default_devices=frozenset({"cpu"}),
    kernels=frozenset(KERNELS),
    operators=OPERATORS,
    describe=lambda device_type: f"compiled kernels, instruction set {capability()}",
    load_error=lambda: load_error,
)
