"""`python -m bench.gpu_static`: gates for the GPU kernels that need no GPU; nothing is run, and no time predicted.

Compiles all kernels for all architectures and fails, with a list, where one spills registers, uses local memory, or
lacks accesses of 16 bytes where they are due; and, of those that large maps take, where too little is in flight on an
SM or an element needs too many instructions. Says which equal a prototype that was measured (docs/gpu-static.md).
"""

import argparse
import sys
from collections.abc import Sequence

from bench import gpu_compile, gpu_gates
from bench.gpu_compile import BACKENDS, Binary, CannotProve
from bench.gpu_gates import Counted, Measured, Work

HEADINGS = ("regs", "warps", "KiB", "instr", "FMA", "ALU", "XU", "shared")  # KiB in flight on an SM


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, count, compare; return 1 where anything is not as it must be, or could not be proved."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_static", description=__doc__)
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="only this one, or these")
    parser.add_argument("--architecture", action="append", help="only this one, or these")
    parser.add_argument("--record", action="store_true", help="write prototypes' counts to prototypes/measured.json")
    options = parser.parse_args(arguments)
    architectures = options.architecture or (*gpu_compile.NVIDIA, *gpu_compile.AMD)
    try:
        work = gpu_compile.jobs(options.backend or BACKENDS, architectures)
        binaries = gpu_compile.compile_all(work, lambda line: print(line, flush=True))
        wrong = [f"{b.backend}, {b.architecture}, {b.name}: {spill}" for b in binaries for spill in gpu_gates.spills(b)]
        if any(b.backend == "prototype" for b in binaries):
            record(binaries, options.record)
        if any(b.backend == "cuda" for b in binaries):
            wrong += judge([b for b in binaries if b.backend == "cuda"])
    except CannotProve as error:
        print(f"error: cannot prove anything: {error}", file=sys.stderr)
        return 1
    for fault in wrong:
        print(f"FAULT: {fault}", file=sys.stderr)
    print(f"{len(binaries)} kernels compiled, {len(wrong)} faults")
    return 1 if wrong else 0


def judge(binaries: Sequence[Binary]) -> list[str]:
    """Print what the kernels of large maps have and cost on Hopper, and return where a gate says what is not known."""
    kernels = gpu_gates.measured()
    wrong: list[str] = []
    short: list[str] = []
    print(f"\n{'an element of a large map, sm_90':40}", *(f"{heading:>6}" for heading in HEADINGS), " expected")
    for work in gpu_gates.works():
        for binary in gpu_gates.find(work, binaries):
            counted = gpu_gates.count(work, binary)
            faults = gpu_gates.faults(work, counted, binary.architecture)
            known = gpu_gates.known_short(work, binary.architecture)
            told = [f"{binary.architecture}, {work.title}: {fault}" for fault in faults]
            if known and not told:
                wrong.append(f"{binary.architecture}, {work.title}: passes, and is named as one that does not")
            (short if known else wrong).extend(told)
            if binary.architecture == "sm_90":
                print(row(work, counted, gpu_gates.expected(work, counted, kernels)))
    print("\n".join(["", *(f"known to fall short: {fault}" for fault in short), ""]))
    return wrong


def row(work: Work, c: Counted, like: Measured | None) -> str:
    """Describe a kernel in a line."""
    numbers = (c.registers, c.warps, c.in_flight / 1024, c.instructions, c.fma, c.alu, c.xu, c.shared)
    expected = f"{like.share:.2f} of a copy on an H100, as {like.work.title}" if like else "-"
    return " ".join((f"{work.title:40}", *(f"{n:6.4g}" for n in numbers), "", expected))


def record(binaries: Sequence[Binary], write: bool) -> None:
    """Count the prototypes anew, which shows that they still compile to what can be counted, and keep that."""
    ours = [b for b in binaries if b.backend == "prototype" and b.architecture == "sm_90"]
    counts = {
        m.work.title: gpu_gates.count(m.work, next(gpu_gates.find(m.work, ours)))
        for m in gpu_gates.measured()
        if ours and m.source.startswith("bench/")
    }
    if write:
        gpu_gates.write_counts(counts)
        print(f"wrote {gpu_gates.MEASURED}")


if __name__ == "__main__":
    sys.exit(main())
