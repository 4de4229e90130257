"""What each backend says of itself."""

from collections.abc import Callable
from dataclasses import dataclass

from torch.library import Library

OPERATORS = ("kaf", "kaf_backward", "kaf_double_backward")


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators of `kafops.ops`.

    Attributes:
        name: by which it is chosen and forced.
        title: what it is, in words.
        devices: types of the devices that it can serve, None for every type.
        default_devices: types of those that it serves without being asked for, None for every type.
        kernels: the kernels κ that it computes, by their names in `kafops.kernels`.
        operators: those that it has functions for.
        describe: (device type) -> what computes there, in a few words.
        load_error: () -> why its code could not be loaded, or None.
        unfit: (device type) -> why it cannot serve this machine's devices of one of its types, or None. None where it
            serves all of them.
        activate: (device type) -> a library that puts its functions before all others there for as long as the library
            is kept. None where loading the code registers them, or there are none.
    """

    name: str
    title: str
    devices: frozenset[str] | None
    default_devices: frozenset[str] | None
    kernels: frozenset[str]
    operators: tuple[str, ...]
    describe: Callable[[str], str]
    load_error: Callable[[], str | None]
    unfit: Callable[[str], str | None] | None = None
    activate: Callable[[str], Library] | None = None

    def why_not(self, device_type: str) -> str | None:
        """Say why this backend cannot serve tensors on a device type, or return None. Nothing is registered by it."""
        if self.devices is not None and device_type not in self.devices:
            served = " and ".join(name.upper() for name in sorted(self.devices))
            return f"the {self.title} serve {served} tensors only"
        error = self.load_error()
        if error is not None:
            return f"the {self.title} could not be loaded ({error})"
        return None if self.unfit is None else self.unfit(device_type)

    def by_default(self, device_type: str) -> bool:
        """Whether this backend may serve a device type without being asked for by name."""
        return self.default_devices is None or device_type in self.default_devices
