"""`python -m bench.gpu`: time kafops on a GPU against named baselines, and write what was found.

Every row of `bench.gpu_table` that is finished is appended to bench/out/gpu-NAME.jsonl, and a call goes on where the
last one stopped. At its end, or where it is interrupted, it writes bench/results/NAME.{json,md} and the GPU table of
the README; before the table's first rows are there, which are the most important, only bench/out/NAME.{json,md}.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

import kafops
from bench import gpu_device, gpu_report, gpu_table, report
from bench.gpu_device import Device
from bench.gpu_report import COPY, OUT_OF_MEMORY, Record
from bench.gpu_table import Row
from bench.paired import Work
from models.errors import UserError
from models.interrupts import StopRequest

OUT = Path(__file__).parent / "out"
ROUNDS = 5
# Rows of runs that differ in one of these do not belong into one table.
IDENTITY = ("gpu", "driver", "cuda", "torch", "triton", "kafops", "commit", "backends")


@dataclass(frozen=True)
class Subject:
    """What is timed, and the kafops backend that is in force meanwhile."""

    work: Work
    backend: str | None = None

    def within(self) -> AbstractContextManager[None]:
        return kafops.backend(self.backend) if self.backend else nullcontext()


def subjects(row: Row, device: Device) -> dict[str, Subject]:
    """Return what takes turns on a row: a copy, the baselines, and kafops on each of its backends."""
    p = row.case.problem(device.type)
    mode = gpu_table.MODES[row.case.mode]
    x, to = p.x.detach(), torch.empty_like(p.x)
    return {
        COPY: Subject(lambda: to.copy_(x)),
        **{b.name: Subject(b.call(mode, p)) for b in gpu_table.GROUPS[row.group]},
        **{name: Subject(mode.call(kafops.kaf, p), name) for name in device.backends()},
    }


def measure(row: Row, device: Device, rounds: int = ROUNDS) -> Record:
    """Measure a row: of every subject its peak memory, and in each round its times.

    What does not fit into memory is recorded as such. So is a baseline that fails; kafops must not.

    Raises:
        RuntimeError: kafops failed, or the device did.
    """
    torch._dynamo.reset()  # PyTorch stops compiling a function that it has compiled for 8 shapes
    failed: dict[str, str] = {}
    names = [COPY, *(b.name for b in gpu_table.GROUPS[row.group]), *device.backends()]

    def attempt(name: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except torch.OutOfMemoryError:
            failed[name] = OUT_OF_MEMORY
        except Exception as error:
            if name in device.backends() or isinstance(error, torch.AcceleratorError):
                raise RuntimeError(f"{name} failed on {row.case}: {error}") from error
            failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        device.release()  # not while the error's traceback holds tensors
        return None

    times: dict[str, list[list[float]]] = {}
    peak: dict[str, int] = {}
    every = attempt("inputs", lambda: subjects(row, device))
    if every is None:
        failed = dict.fromkeys(names, failed["inputs"])
        every = {}
    for name, subject in every.items():
        with subject.within():
            peak[name] = attempt(name, functools.partial(device.peak_bytes, subject.work))
    for _ in range(rounds):
        for name, subject in every.items():
            if name not in failed:
                with subject.within():
                    taken = attempt(name, functools.partial(device.time, subject.work))
                times.setdefault(name, []).append(list(astuple(taken)) if taken else [])
    case = row.case
    return {
        "key": row.key,
        **{field: getattr(case, field) for field in case.__dataclass_fields__},
        "group": row.group,
        "bytes_moved": case.bytes_moved,
        "copy_bytes": 2 * case.bytes_of_x,
        "baselines": [b.name for b in gpu_table.GROUPS[row.group]],
        "backends": list(device.backends()),
        "times": {name: rounds for name, rounds in times.items() if name not in failed},
        "peak_bytes": {name: n for name, n in peak.items() if name not in failed},
        "failed": failed,
        "clocks": device.clocks(),
    }


class Log:
    """The rows measured so far, as lines of JSON, each after the facts of the call that measured it."""

    def __init__(self, path: Path, facts: dict[str, Any], fresh: bool = False) -> None:
        """Read the file and add the facts, or with `fresh` begin it anew.

        Raises:
            UserError: its rows were measured on another device, with other versions or of another commit.
        """
        self.path = path
        self.records: list[Record] = []
        self.facts: dict[str, Any] = {}  # of the call that began the file
        whole = b"" if fresh or not path.exists() else path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]  # a line that was interrupted is measured again
        for line in map(json.loads, whole.splitlines()):
            if "facts" in line:
                self._check(line["facts"], facts)
                self.facts = self.facts or line["facts"]
            else:
                self.records.append(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(len(whole))
        self._append({"facts": facts})
        self.facts = self.facts or facts

    def _check(self, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
        def same(a: Any, b: Any) -> bool:
            # A report changes files, so that what was commit abc is abc+ from then on.
            return a == b or (isinstance(a, str) and isinstance(b, str) and a.rstrip("+") == b.rstrip("+"))

        differences = [
            f"{name} is {theirs.get(name)} there and {ours.get(name)} here"
            for name in IDENTITY
            if not same(theirs.get(name), ours.get(name))
        ]
        if differences:
            raise UserError(
                f"{self.path} holds rows of another run: {'; '.join(differences)}. --fresh discards them, or move the "
                "file away to keep them"
            )

    def add(self, record: Record) -> None:
        self._append(record)
        self.records.append(record)

    def done(self) -> set[str]:
        """Return the keys of the rows that need no other attempt: a baseline that failed gets one."""
        return {r["key"] for r in self.records if all(reason == OUT_OF_MEMORY for reason in r["failed"].values())}

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def run(
    device: Device,
    quick: bool = False,
    fresh: bool = False,
    minutes: float | None = None,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Measure the rows that are missing until there are none or time is up, write the report, return the status."""
    start = clock()
    facts = device.facts()
    console = console or Console(soft_wrap=True, highlight=False, markup=False)
    log = Log(OUT / f"gpu-{gpu_report.file_stem(facts)}.jsonl", facts, fresh)
    rows = gpu_table.FIRST_ROWS if quick else gpu_table.ROWS
    done = log.done()
    missing = [row for row in rows if row.key not in done]
    console.print(f"{facts['gpu']}: {len(missing)} of {len(rows)} rows to measure; {log.path}")
    reason = ""
    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with StopRequest() as stop, Progress(*columns, console=console) as progress:
        task = progress.add_task("rows", total=len(rows), completed=len(rows) - len(missing))
        for row in missing:
            if stop.requested:
                reason = "interrupted"
            elif minutes is not None and clock() - start >= 60 * minutes:
                reason = f"{minutes:g} minutes are over"
            if reason:
                break
            log.add(measure(row, device))
            progress.console.print(say(log.records[-1]))
            progress.advance(task)
            device.release()
    if log.records:
        for path in gpu_report.write(log.facts, log.records, OUT):
            console.print(f"wrote {path}")
    if reason:
        console.print(f"stopped: {reason}; the same command goes on from here")
    return 130 if reason == "interrupted" else 0


def say(record: Record) -> str:
    """Describe a record in a line: kafops' times and shares of the copy, and its ratios."""
    (entry,) = gpu_report.analyse([record])
    parts = []
    for backend, ours in entry["backends"].items():
        if "failed" in ours:
            parts.append(f"{backend} {ours['failed']}")
            continue
        share = f" ({ours['share_of_copy'].median:.0%} of copy)" if "share_of_copy" in ours else ""
        against = (f"{gpu_report.ratio(entry, backend, name)} against {name}" for name in record["baselines"])
        parts.append(f"{backend} {report.quantity(ours['seconds'].median, 's')}{share}: {', '.join(against)}")
    return f"{record['key']}\n  " + "\n  ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or do what the options say, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--quick", action="store_true", help="measure the first, most important rows only")
    parser.add_argument("--fresh", action="store_true", help="discard what an earlier call measured")
    parser.add_argument("--minutes", type=float, help="start no row after so many minutes")
    parser.add_argument("--check", action="store_true", help="only print the device's backends, one a line")
    parser.add_argument("--readme", action="store_true", help="only write the README's table from bench/results")
    options = parser.parse_args(arguments)
    try:
        if options.readme:
            gpu_report.write_readme()
            return 0
        problem = gpu_device.why_not()
        if problem is not None:
            raise UserError(problem)
        device = gpu_device.Cuda()
        if options.check:
            print("\n".join(device.backends()))
            return 0
        return run(device, options.quick, options.fresh, options.minutes)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
