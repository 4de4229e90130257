"""The compiled CPU kernels, as a backend."""

from kafops.backends.record import OPERATORS, Backend
from kafops.compiled import capability as capability
from kafops.compiled import load_error as load_error
from kafops.kernels import KERNELS

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
