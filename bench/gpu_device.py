"""The GPU that is measured: its timer, its memory, its clocks, and the facts that a time depends on."""

import gc
import subprocess
from collections.abc import Mapping
from typing import Any, Protocol

import torch

import kafops
from bench import machine
from bench.paired import Work

_FLUSH = 256 << 20  # bytes, more than any L2 cache
_SPIN = 2_000_000  # clocks, about a millisecond
_CLOCKS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "power_w",
    "temperature.gpu": "temperature_c",
}
Times = dict[str, list[float]]  # by name, the seconds of each round


class Device(Protocol):
    """What the measurements need of a device."""

    type: str  # of its tensors

    def backends(self) -> tuple[str, ...]: ...
    def facts(self) -> dict[str, Any]: ...
    def time(self, works: Mapping[str, Work], rounds: int, kernels: bool) -> Times: ...
    def peak_bytes(self, work: Work) -> int: ...
    def graph(self, work: Work) -> Work: ...
    def wait(self) -> None: ...
    def clocks(self) -> dict[str, float | None] | None: ...
    def release(self) -> None: ...


def why_not() -> str | None:
    """Say why there is nothing to measure on this machine, or return None."""
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) was built without CUDA; install one that has it"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device (nvidia-smi shows those that the driver knows)"
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
        self._flush = torch.empty(_FLUSH, dtype=torch.uint8, device="cuda")

    def backends(self) -> tuple[str, ...]:
        """Return the names of the backends that have kernels for this device, kafops' own choice first."""
        return _backends()

    def facts(self) -> dict[str, Any]:
        """Return GPU, driver, versions, processor, git commit and date."""
        try:
            from triton import __version__ as triton
        except ImportError:
            triton = "none"
        driver = self._ask("driver_version")
        properties = self._properties
        return machine.describe() | {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": driver[0] if driver else "unknown",
            "cuda": torch.version.cuda,
            "triton": triton,
            "backend": kafops.backends.explain(torch.empty(0, device="cuda")),
            "backends": list(self.backends()),
        }

    def time(self, works: Mapping[str, Work], rounds: int, kernels: bool) -> Times:
        """Return the seconds between events around each call, as the framework launches it; in each round all in turn.

        With `kernels` the L2 cache holds nothing of the inputs, and the GPU is kept busy until the host has launched
        the call: its own time is then not in it.
        """
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                if kernels:
                    self._flush.zero_()
                    torch.cuda._sleep(_SPIN)
                start.record()
                work()
                end.record()
                events[name].append((start, end))
            torch.cuda.synchronize()
        return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}

    def peak_bytes(self, work: Work) -> int:
        """Return by how much a call's memory exceeds, at its largest, what was allocated before it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before

    def graph(self, work: Work) -> Work:
        """Return the replay of a call, which has to have been made before."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def wait(self) -> None:
        """Wait for all that was launched."""
        torch.cuda.synchronize()

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
