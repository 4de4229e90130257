"""`python -m bench.gpu`: test kafops on a GPU, time it there against named baselines, and write what was found.

Tests come first, and where one fails nothing is timed. Then the kernels of large and small maps, the host's part of a
call, training steps of a ResNet50 eager, as a CUDA graph and compiled, and more kernels, until the time is up. Each
result is written to bench/out/NAME.json as it comes; at the end bench/results/NAME.{json,md} and the README's table. A
part that fails does not keep the others from being measured, unless the device itself has failed.
"""

import argparse
import functools
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kafops
from bench import gpu_device, gpu_report, gpu_table
from bench.gpu_device import Device, Times
from bench.gpu_report import FAILURE, Record, Summary
from bench.gpu_table import ACTIVATIONS, Case, Training
from bench.paired import Work, spread
from models.support.errors import UserError

ROOT = Path(__file__).parent.parent
OUT = Path(__file__).parent / "out"
OUT_OF_MEMORY = "out of memory"
MINUTES, QUICK_MINUTES = 8.0, 3.0
_KERNEL_TESTS = ("tests/kafops/test_kernels.py", "tests/kafops/test_gpu_operators.py")


class Run:
    """One call of the command: what it has found so far, in memory and on disk, and how much time is left."""

    def __init__(
        self, device: Device, quick: bool, minutes: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.device, self.quick, self.clock = device, quick, clock
        self.end = clock() + 60 * minutes
        self.rounds = 10 if quick else 20
        facts = device.facts()
        self.path = OUT / f"{gpu_report.file_stem(facts)}.json"
        self.summary: Summary = {"format": gpu_report.FORMAT, "machine": facts, "quick": quick, "results": []}

    @property
    def left(self) -> float:
        """Seconds until no measurement shall begin."""
        return self.end - self.clock()

    def add(self, record: Record) -> None:
        """Keep a result, on disk too, and print it."""
        record["clocks"] = self.device.clocks()
        self.summary["results"].append(record)
        gpu_report.write_json(self.path, self.summary)
        print(gpu_report.say(record), flush=True)
        self.device.release()

    def part(self, what: str, measurement: Callable[[], None]) -> None:
        """Measure a part; where that fails, keep why, and let the next part begin."""
        try:
            measurement()
        except torch.AcceleratorError:
            raise  # nothing that comes after it could be trusted
        except Exception as error:
            traceback.print_exc()
            self.add({"kind": "failure", "what": what, "failed": {FAILURE: _first_line(error)}})


# ---------------------------------------------------------------------------------------------------------------- tests


def tests(backends: Sequence[str], quick: bool) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Yield what is run before anything is timed: a command, and what it has in its environment."""
    first, *others = ({"KAFOPS_BACKEND": name} for name in backends)
    check, pytest = ["-m", "kafops.check", "--device", "cuda"], ["-m", "pytest", "-q", "--maxfail=5"]
    yield first, check
    if quick:
        return  # no other backend is timed
    yield first | {"KAFOPS_TEST_DEVICE": "cuda"}, [*pytest, "-m", "not slow and not cpu_kernels", *_KERNEL_TESTS]
    yield {}, [*pytest, "tests/gpu"]
    for other in others:
        yield other, check


def test(run: Run) -> None:
    """Run the tests, each for a quarter of the time that is left.

    Raises:
        UserError: one fails.
    """
    for environment, command in tests(run.device.backends(), run.quick):
        start, what = run.clock(), " ".join((*(f"{k}={v}" for k, v in environment.items()), "python", *command))
        print(what, flush=True)
        try:
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=os.environ | environment, timeout=max(run.left / 4, 1)
            )
        except subprocess.TimeoutExpired:
            outcome = "none failed before time was up"
        else:
            outcome = "failed" if done.returncode else "passed"
        run.add({"kind": "test", "what": what, "outcome": outcome, "took": round(run.clock() - start, 1)})
        if outcome == "failed":
            raise UserError(f"nothing is timed, as this fails: {what}")


# -------------------------------------------------------------------------------------------------------------- timing


def attempt(device: Device, name: str, work: Callable[[], Any], failed: dict[str, str]) -> Any:
    """Do something; where it fails, or does not fit into memory, write why into `failed` and return None."""
    try:
        return work()
    except torch.OutOfMemoryError:
        failed[name] = OUT_OF_MEMORY
    except torch.AcceleratorError:
        raise  # nothing that comes after it could be trusted
    except Exception as error:
        failed[name] = _first_line(error)
    device.release()  # not while the error's traceback holds tensors
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def within(backend: str, work: Work) -> Work:
    """Make a call on one backend of kafops."""

    def call() -> object:
        with kafops.backend(backend), torch.no_grad():
            return work()

    return call


def kernels(run: Run, cases: Sequence[Case], backends: Sequence[str]) -> None:
    """Time cases on some backends, beside a copy and F.silu, while there is time."""
    device = run.device
    for case in cases:
        if run.left <= 0:
            return
        failed: dict[str, str] = {}
        works: dict[str, Work] = {}
        made = attempt(device, "inputs", functools.partial(case.works, device.type), failed)
        if made:
            call, others = made
            works = others | {name: within(name, call) for name in backends}
        for name in list(works):  # the first call compiles
            attempt(device, name, works[name], failed)
        device.wait()
        works = {n: w for n, w in works.items() if n not in failed}
        timing = functools.partial(device.time, works, run.rounds, kernels=True)
        times = attempt(device, FAILURE, timing, failed) or {}
        run.add({"kind": "kernel", **asdict(case), "title": case.title, "seconds": spreads(times), "failed": failed})


def spreads(times: Times) -> dict[str, list[float]]:
    """Return the median, 20th and 80th percentile of each."""
    return {name: [s.median, s.p20, s.p80] for name, s in ((n, spread(t)) for n, t in times.items())}


def host(run: Run, calls: int = 50, rounds: int = 9) -> None:
    """Time what the host needs for a call of a layer on a map without much to compute."""
    layers: dict[str, nn.Module] = {name: make(16).to(run.device.type) for name, make in ACTIVATIONS.items()}
    layers["nn.ReLU"] = nn.ReLU()  # not in place: x is a leaf
    x = torch.randn(8, 16, 8, 8, device=run.device.type)
    leaf, grad = x.clone().requires_grad_(), torch.ones_like(x)

    def forward(layer: nn.Module) -> None:
        with torch.no_grad():
            layer(x)

    def both(layer: nn.Module) -> None:
        layer(leaf).backward(grad)

    for what, call in (("forward", forward), ("forward + backward", both)):
        times: Times = {name: [] for name in layers}
        for round_ in range(rounds + 1):
            for name, layer in layers.items():
                run.device.wait()
                start = time.perf_counter()
                for _ in range(calls):
                    call(layer)
                if round_:
                    times[name].append((time.perf_counter() - start) / calls)
        run.add({"kind": "host", "what": what, "seconds": spreads(times)})


def steps(run: Run, training: Training, mode: str, needed: float = 0) -> None:
    """Time training steps, activations in turn; of a mode that takes long to begin, those that time is left for."""
    device, failed = run.device, dict[str, str]()
    works: dict[str, Work] = {}
    peak: dict[str, int] = {}
    for name, activation in ACTIVATIONS.items():
        if run.left <= needed:
            break

        def make(name: str = name, activation: gpu_table.Activation = activation) -> Work:
            work = training.step(activation, device.type, mode == "compiled")
            work()
            work()
            peak[name] = device.peak_bytes(work)
            return device.graph(work) if mode == "CUDA graph" else work

        if work := attempt(device, name, make, failed):
            works[name] = work
    if not works and not failed:
        return
    timing = functools.partial(device.time, works, run.rounds, kernels=False)
    times = attempt(device, FAILURE, timing, failed) or {}
    record = {"kind": "step", "what": mode, "network": "ResNet50", **asdict(training), "seconds": spreads(times)}
    run.add(record | {"peak_bytes": peak, "failed": failed})


def measure(run: Run, training: Training = Training()) -> None:  # noqa: B008
    """Test, then time everything, the most important first."""
    test(run)
    chosen, *others = run.device.backends()
    run.part("kernels", functools.partial(kernels, run, gpu_table.FIRST, [chosen]))
    run.part("the host's part of a call", functools.partial(host, run))
    for mode in ("eager", "CUDA graph"):
        run.part(f"training steps, {mode}", functools.partial(steps, run, training, mode))
    if run.quick:
        return
    run.part("more kernels", functools.partial(kernels, run, gpu_table.REST, [chosen]))
    large = [case for case in gpu_table.FIRST if case.shape == gpu_table.LARGE]
    run.part("kernels of other backends", functools.partial(kernels, run, large, others))
    run.part("training steps, compiled", functools.partial(steps, run, training, "compiled", needed=60))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or do what the options say, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--quick", action="store_true", help=f"the first rows only, in {QUICK_MINUTES:g} minutes")
    parser.add_argument("--minutes", type=float, help=f"begin nothing after so many, usually {MINUTES:g}")
    parser.add_argument("--readme", action="store_true", help="only write the README's table from bench/results")
    options = parser.parse_args(arguments)
    try:
        if options.readme:
            gpu_report.write_readme()
            return 0
        problem = gpu_device.why_not()
        if problem is not None:
            raise UserError(problem)
        minutes = options.minutes or (QUICK_MINUTES if options.quick else MINUTES)
        run = Run(gpu_device.Cuda(), options.quick, minutes)
        try:
            measure(run)
        finally:
            if any(record["kind"] == "kernel" for record in run.summary["results"]):
                for path in gpu_report.write(run.summary):
                    print(f"wrote {path}")
        wrong = gpu_report.failures(run.summary)
        if wrong:
            raise UserError(f"kafops failed: {'; '.join(wrong)}")
    except (UserError, OSError, torch.AcceleratorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
