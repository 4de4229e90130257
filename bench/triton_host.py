"""`python -m bench.triton_host`: the host's part of a small call of the Triton kernels, without a GPU.

A driver stands in for CUDA's that launches nothing, so that the tensors may be the CPU's. Prints processor time.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

CALLS = 200


class _Utilities:
    def load_binary(self, *arguments: Any) -> tuple[int, ...]:
        return 0, 0, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "warpSize": 32, "multiprocessor_count": 132}


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None: ...

    def __call__(self, *arguments: Any, **options: Any) -> None: ...


class _Driver:
    utils, launcher_cls = _Utilities(), _Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def microseconds(call: Callable[[], Any]) -> float:
    """Return the least mean processor time of a call."""
    call()  # compiles
    means = []
    for _ in range(7):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        means.append((time.process_time() - start) / CALLS)
    return min(means) * 1e6


def main() -> None:
    """Time forward, and backward of x and alpha, with and without tables."""
    from triton.runtime import driver

    from kafops.backends import triton

    driver.set_active(_Driver())
    triton._architecture = lambda device: "90"
    alpha, gamma = torch.randn(16, 20), torch.ones(16)
    for shape in (8, 16, 4, 4), (64, 16, 8, 8):
        x = torch.zeros(shape)
        forward = microseconds(functools.partial(triton.kaf, x, alpha, gamma, None, 3.0))
        backward = microseconds(functools.partial(triton.kaf_backward, x, x, alpha, gamma, None, 3.0, 3))
        print(f"{shape}: forward {forward:.0f} us, backward {backward:.0f} us")


if __name__ == "__main__":
    main()
