"""Writes what `bench.gpu_static` counted and predicted as a Markdown page."""

from collections.abc import Iterable, Sequence

from bench import gpus
from bench.gpu_compile import AMD, NVIDIA, Binary
from bench.gpu_costs import BACKENDS, H100, POINTS, Row
from bench.gpus import ARCHITECTURES, GPUS

_PIPES = {
    "fma": "FMA",
    "alu": "ALU",
    "mufu": "MUFU",
    "convert": "convert",
    "fp64": "FP64",
    "global": "global",
    "shared": "shared",
    "other": "other",
}
_METHOD = f"""\
- *Instructions* are those of one thread per element in the hot loop, from the disassembled machine code (SASS). Every
  instruction on the loop's longest path counts as one issue slot, also where its predicate is false; only NOPs do not
  count. What a block does once, before and after the loop, is not counted.
- The hot loop is the innermost loop that loads and stores elements. Where a kernel has several, as one with and one
  without sums, it is the one with most elements a turn, then the one with most instructions. Elements a turn are the
  bytes stored, by the size of an element.
- *Free dictionary* and *double backward* take an exponential for every point: their loop over points, within the loop
  over elements, is counted for D = {POINTS}.
- *FMA* is the pipe of float32 and integer multiply-adds, *ALU* that of comparisons, selections, integers and logic,
  *MUFU* exponentials and reciprocals; *other* are branches, barriers, constants, and what is done once for a warp.
- A prediction is the longest of these times, as if all others were hidden behind it: the bytes that must be moved, by
  the memory's bandwidth; all instructions, by the {gpus.ISSUE} that an SM issues per clock; those of the FMA pipe, the
  ALU pipe, FP64, and MUFU with conversions (XU), by the rates of these; and the 4-byte words of all shared and global
  accesses, by the {gpus.SHARED_WORDS} that L1 delivers per clock (L1). A ratio of 1 is the memory's own time.
  Latencies, caches, and clocks below the boost clock are not in it.
- *Double backward* is, of CUDA C++, for gradients of all first gradients; of Triton, for the gradient of x alone, as a
  gradient penalty takes it. *Backward, free dictionary* is for the gradients of x and of all parameters.
- *In flight* are the elements' bytes that the resident threads of an SM load in one turn each: what hides the latency
  of memory. An H100's memory moves {H100.bandwidth / H100.sms / H100.clock:.1f} bytes per clock and SM: so many must be
  in flight for each clock of latency.
"""


def markdown(binaries: Sequence[Binary], rows: Sequence[Row], faults: Sequence[str]) -> str:
    """Render the page."""
    parts = [
        "# GPU kernels: compiled, not run",
        "`make gpu-static` compiled every GPU kernel, disassembled it and counted. No GPU was used: nothing here was "
        "timed, and a time is a prediction from counts and data sheets.",
        "An H100 took longer than predicted, forward and backward in CUDA C++ and float32 1.6 and 1.7 times the time "
        "of memory where 1.00 stands below: latency bounds them, which is not in the count "
        "([gpu-kernels.md](gpu-kernels.md#on-an-h100)).",
        _summary(binaries, faults),
        "![Predicted share of the memory's bandwidth](gpu-static.png)",
        f"## Limits\n\nfloat32, D = {POINTS}, {H100.name}.",
        _limits(rows),
        f"## Predicted time, as a multiple of the memory-bound time\n\nD = {POINTS}; behind each, what bounds it.",
        _predictions(rows),
        f"## What an element costs\n\nInstructions of a thread per element, {H100.architecture.name}, D = {POINTS}.",
        _costs(rows),
        f"## Architectures\n\nInstructions per element, registers, occupancy, D = {POINTS}.",
        _architectures(rows),
        "## How it is counted\n\n" + _METHOD.rstrip(),
        "## Peaks\n\nPer SM and clock: results of each pipe. Sources: the letters, below.",
        _peaks(),
        "\n".join(_sources()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _summary(binaries: Sequence[Binary], faults: Sequence[str]) -> str:
    lines = []
    for backend, title in BACKENDS.items():
        ours = [b for b in binaries if b.backend == backend]
        names = [a for a in (*NVIDIA, *AMD) if any(b.architecture == a for b in ours)]
        if ours:
            most = max(b.registers for b in ours if b.architecture in NVIDIA)
            lines.append(f"- {title}: {len(ours)} kernels for {', '.join(names)}; at most {most} registers on NVIDIA's")
    if faults:
        lines += [f"- **fault**: {fault}" for fault in faults]
    else:
        lines.append(
            "- no kernel spills a register or uses local memory; every access of contiguous elements is of 128 bits"
        )
    return "\n".join(lines)


def _limits(rows: Sequence[Row]) -> str:
    lines = [
        (row.work.title, BACKENDS[row.backend], name, f"{value:.3g}", f"{most:g}", "yes" if value <= most else "**no**")
        for row in rows
        for name, value, most in row.limits
    ]
    return _table(("kernel", "backend", "what", "counted", "at most", "met"), lines) if lines else "Not compiled."


def _predictions(rows: Sequence[Row]) -> str:
    cells = {(_key(row), row.binary.architecture): row for row in rows}
    lines = []
    for key, row in {_key(row): row for row in rows}.items():
        compiled = [cells.get((key, gpu.architecture.name)) for gpu in GPUS]
        predicted = [same.on(gpu) if same else None for same, gpu in zip(compiled, GPUS, strict=True)]
        ratios = [f"{p.ratio:.2f} {p.bound}" if p else "" for p in predicted]
        lines.append((*_headings(row), str(row.work.moved(row.dtype)), *ratios))
    headings = ("kernel", "x", "backend", "bytes moved", *(gpu.name for gpu in GPUS))
    return _table(headings, lines)


def _costs(rows: Sequence[Row]) -> str:
    rows = _on(rows, H100.architecture.name)
    pipes = [p for p in _PIPES if any(row.cost.pipes[p] for row in rows)]
    lines = [
        (
            *_headings(row),
            f"**{_number(row.cost.slots)}**",
            *(_number(row.cost.pipes[p]) for p in pipes),
            str(row.binary.registers),
            f"{row.occupancy:.0%}",
            f"{row.elements:g}",
            f"{row.in_flight / 1024:.0f}",
        )
        for row in rows
    ]
    headings = (
        "kernel", "x", "backend", "instructions", *(_PIPES[p] for p in pipes), "registers", "occupancy",
        "elements a turn", "KiB in flight",
    )  # fmt: skip
    return _table(headings, lines)


def _architectures(rows: Sequence[Row]) -> str:
    names = [a for a in ARCHITECTURES if any(row.binary.architecture == a for row in rows)]
    cells = {(_key(row), row.binary.architecture): row for row in rows}
    lines = []
    for key, row in {_key(row): row for row in rows}.items():
        compiled = [cells.get((key, name)) for name in names]
        lines.append((*_headings(row), *(_summary_of(same) if same else "" for same in compiled)))
    return _table(("kernel", "x", "backend", *names), lines)


def _peaks() -> str:
    lines = [
        (
            f"{gpu.name} [{gpu.sources}]",
            gpu.architecture.name,
            f"{gpu.bandwidth / 1e12:.4g} TB/s",
            str(gpu.sms),
            f"{gpu.clock / 1e6:.0f} MHz",
            f"{gpus.ISSUE}",
            f"{gpu.architecture.fp32}",
            f"{gpus.ALU}",
            f"{gpus.XU}",
            f"{gpu.architecture.fp64}",
            f"{gpus.SHARED_WORDS}",
            f"{gpus.REGISTERS}",
            f"{gpu.architecture.threads}",
        )
        for gpu in GPUS
    ]
    headings = (
        "GPU", "architecture", "memory", "SMs", "boost clock", "issue [C]", "FMA [G]", "ALU [G]", "XU [G]", "FP64 [G]",
        "L1, words [C]", "registers [C]", "threads [C]",
    )  # fmt: skip
    return _table(headings, lines)


def _sources() -> Iterable[str]:
    """Take the list of sources from where the numbers are."""
    for line in (gpus.__doc__ or "").split("below:\n")[1].splitlines():
        text = line.strip()
        yield f"- [{text[0]}] {text[1:].strip()}" if text[1:3] == "  " else f"  {text}"


def _on(rows: Sequence[Row], architecture: str) -> list[Row]:
    return [row for row in rows if row.binary.architecture == architecture]


def _key(row: Row) -> tuple[str, str, str]:
    return row.work.title, row.dtype, row.backend


def _headings(row: Row) -> tuple[str, str, str]:
    return row.work.title, row.dtype, BACKENDS[row.backend]


def _summary_of(row: Row) -> str:
    return f"{_number(row.cost.slots)}, {row.binary.registers}, {row.occupancy:.0%}"


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
