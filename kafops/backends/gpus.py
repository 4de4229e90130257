"""What every GPU backend asks of this machine's GPUs."""

import functools

import torch

MINIMUM = (7, 5)  # compute capability that the kernels are written for


@functools.cache
def too_old() -> str | None:
    """Name a visible GPU of NVIDIA that no kernels of kafops were written for, or return None. Asks once."""
    for index in range(torch.cuda.device_count() if torch.version.cuda else 0):
        capability = torch.cuda.get_device_capability(index)
        if capability < MINIMUM:
            return (
                f"kafops' GPU kernels need compute capability {MINIMUM[0]}.{MINIMUM[1]}, and GPU {index} "
                f"({torch.cuda.get_device_name(index)}) has {capability[0]}.{capability[1]}"
            )
    return None
