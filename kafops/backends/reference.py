"""The plain PyTorch of `kafops.reference`: serves every device, by functions in the operators' place."""

from kafops.backends.record import Backend
from kafops.kernels import KERNELS

BACKEND = Backend(
    name="reference",
    title="plain PyTorch",
    devices=None,
    default_devices=None,
    kernels=frozenset(KERNELS),
    operators=(),
    describe=lambda device_type: "plain PyTorch",
    load_error=lambda: None,
)
