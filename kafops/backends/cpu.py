"""The compiled CPU kernels: loads kafops._C, and keeps the reason where it cannot."""

import torch

load_error: str | None = None
try:
    import kafops._C  # noqa: F401  (registers the CPU kernels of kafops.ops)
except ImportError as error:
    load_error = str(error)


def capability() -> str:
    """Return the instruction set in use: "avx512", "avx2" or "portable" (KAFOPS_CPU_CAPABILITY forces one)."""
    return ("portable", "avx2", "avx512")[torch.ops.kafops.cpu_capability()]
