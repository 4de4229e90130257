"""The compiled CUDA kernels: loads kafops._C_cuda, and keeps the reason where it cannot."""

import functools
import importlib
import re
import warnings
from collections.abc import Sequence

import torch

from kafops.backends import gpus
from kafops.backends.record import OPERATORS, Backend
from kafops.kernels import KERNELS
from kafops.torch_private import assumed_constant


def reason(error: ImportError, cuda: str | None) -> str:
    """Say why the module cannot be loaded: often because torch, of CUDA version `cuda`, has another than it."""
    if cuda is None:
        return "this torch was built without CUDA"
    wanted = re.search(r"libcudart\.so\.(\d+)", str(error))
    if wanted is None:
        return str(error)
    return (
        f"the compiled CUDA kernels were built for CUDA {wanted[1]}, and this torch for CUDA {cuda}; build them for it "
        "(in the environment of this torch, with an nvcc of its CUDA: pip install --no-build-isolation .)"
    )


load_error: str | None = None
try:
    _C_cuda = importlib.import_module("kafops._C_cuda")  # registers the kernels of the operators of kafops.ops
except ModuleNotFoundError:
    load_error = "kafops was installed without CUDA kernels; reinstall it where there is nvcc"
except ImportError as error:
    load_error = reason(error, torch.version.cuda)
    if torch.version.cuda is not None:  # there may be a GPU, which Triton's kernels would serve, and nobody be told
        warnings.warn(f"kafops cannot load its CUDA kernels, so Triton's serve: {load_error}", stacklevel=2)


@assumed_constant
def unfit(device_type: str) -> str | None:
    """Say why the compiled kernels cannot serve this machine's GPUs, or return None. Looks at every visible GPU."""
    return gpus.too_old() or _not_built_for()


@functools.cache
def _not_built_for() -> str | None:
    built = _C_cuda.architectures().split()
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not covers(built, capability):
            return (
                f"the compiled CUDA kernels were built for compute capabilities {', '.join(built)}, and GPU {index} "
                f"({torch.cuda.get_device_name(index)}) has {capability[0]}.{capability[1]}; reinstall kafops with "
                f"TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}"
            )
    return None


def covers(built: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code built for `built` ("8.0", "12.0+PTX", "9.0a", ...) runs on a GPU.

    Machine code runs on later minor versions of its own major version; PTX on every later GPU.
    """
    for name in built:
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if found is None:
            continue
        own = int(found[1]), int(found[2])
        if found[3] == "a":
            if own == capability:
                return True
        elif own <= capability and (own[0] == capability[0] or (found[4] and not found[3])):
            return True
    return False


BACKEND = Backend(
    name="cuda",
    title="compiled CUDA kernels",
    devices=frozenset({"cuda"}),
    default_devices=frozenset({"cuda"}),
    kernels=frozenset(KERNELS),
    operators=OPERATORS,
    describe=lambda device_type: "compiled CUDA kernels",
    load_error=lambda: load_error,
    unfit=unfit,
)
