"""The GPU that is measured: its timer, its memory, its clocks, and the facts that a time depends on.

The timer is `triton.testing.do_bench`. That of Triton 3.8 calls once, then five times to see how long a call takes,
then warms up for `warmup` milliseconds, then repeats for `rep`: each repeated call stands between two CUDA events of
its own, and before the first of these a buffer of 256 MB is set to zero, so that the L2 cache holds nothing of the
inputs. It never waits between calls, so that the host launches a call while the GPU still fills the buffer (0.1 ms at
3 TB/s). What the host needs beyond that counts as the call's time, which matters for the smallest maps under autograd.
"""

import gc
import importlib.util
import subprocess
from collections.abc import Callable
from typing import Any, Protocol

import torch

import kafops
from bench import machine
from bench.paired import Spread, Work

WARMUP_MS, REPEAT_MS = 5, 20
_CLOCKS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "power_w",
    "temperature.gpu": "temperature_c",
}


class Device(Protocol):
    """What the measurements need of a device."""

    type: str  # of its tensors

    def backends(self) -> tuple[str, ...]: ...
    def facts(self) -> dict[str, Any]: ...
    def time(self, work: Work) -> Spread: ...
    def peak_bytes(self, work: Work) -> int: ...
    def clocks(self) -> dict[str, float | None] | None: ...
    def release(self) -> None: ...


def why_not() -> str | None:
    """Say why there is nothing to measure on this machine, or return None."""
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) was built without CUDA; install one that has it"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device (nvidia-smi shows those that the driver knows)"
    if importlib.util.find_spec("triton") is None:
        return "Triton, whose timer is used, is not installed: pip install triton"
    if not _backends():
        return f"kafops has no kernels for this GPU: {kafops.backends.explain(torch.empty(0, device='cuda'))}"
    return None


def _backends() -> tuple[str, ...]:
    return tuple(name for name in kafops.backends.available("cuda") if name != "reference")


class Cuda:
    """PyTorch's current CUDA device."""

    type = "cuda"

    def __init__(self) -> None:
        self._properties = torch.cuda.get_device_properties()

    def backends(self) -> tuple[str, ...]:
        """Return the names of the backends that have kernels for this device, kafops' own choice first."""
        return _backends()

    def facts(self) -> dict[str, Any]:
        """Return GPU, driver, versions, processor, git commit and date."""
        import triton

        driver = self._ask("driver_version")
        properties = self._properties
        return machine.describe() | {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": driver[0] if driver else "unknown",
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "backend": kafops.backends.explain(torch.empty(0, device="cuda")),
            "backends": list(self.backends()),
        }

    def time(self, work: Work) -> Spread:
        """Return the seconds that a call takes: median, 20th and 80th percentile of about REPEAT_MS of calls."""
        from triton import testing

        do_bench: Callable[..., list[float]] = testing.do_bench
        taken = do_bench(work, warmup=WARMUP_MS, rep=REPEAT_MS, quantiles=[0.5, 0.2, 0.8])
        return Spread(*(milliseconds / 1e3 for milliseconds in taken))

    def peak_bytes(self, work: Work) -> int:
        """Return by how much a call's memory exceeds, at its largest, what was allocated before it."""
        work()  # the first call compiles, and allocates what stays
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before

    def clocks(self) -> dict[str, float | None] | None:
        """Return clocks, power and temperature, each None where it is not told; None where nvidia-smi fails."""
        answers = self._ask(*_CLOCKS)
        return None if answers is None else dict(zip(_CLOCKS.values(), map(_number, answers), strict=True))

    def release(self) -> None:
        """Return unused memory to the device."""
        gc.collect()
        torch.cuda.empty_cache()

    def _ask(self, *fields: str) -> list[str] | None:
        which = f"--id=GPU-{self._properties.uuid}"  # nvidia-smi does not count as CUDA_VISIBLE_DEVICES does
        command = ["nvidia-smi", which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        answers = [answer.strip() for answer in done.stdout.strip().split(",")]
        return answers if len(answers) == len(fields) else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None
