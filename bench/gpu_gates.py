"""What machine code can show of a GPU kernel: gates that it passes or not, and whether it equals one that was measured.

A time is not predicted. A count of instructions alone was wrong by two on an H100 (docs/gpu-static.md): what is in
flight decides too. `MEASURED` holds kernels with the share of a copy's speed they reached there; a kernel that equals
or beats one of these in every number that is counted here, within 10 %, may be expected at its time, on that GPU.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import sass
from bench.gpu_compile import Binary, CannotProve
from bench.gpus import ARCHITECTURES, IN_FLIGHT, INSTRUCTIONS_PER_BYTE
from bench.sass import Code, Loop

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MEASURED = Path(__file__).parent / "prototypes" / "measured.json"
SLACK = 1.1
CELL = 8 * 32 * 4  # bytes of a cell in a block of the product: 8 coefficients, a copy for each lane
TABLE, ROOM = 35 * CELL, 42 * CELL  # of a table for D = 20, and what its launch asks for
ANSWERS = 2 * (27 * 128 + 2) * 4  # bytes of a table of all answers


# Works of the product that are known to fall short of a gate of time, docs/gpu-static.md says why: none must join them,
# and none that no longer does may stay. On Blackwell all do.
SHORT = frozenset(
    f"{what}{layout}, {dtype}"
    for dtype in ("bfloat16", "float16")
    for layout, works in (
        ("", ("backward of x and alpha",)),
        (", channels_last", ("forward", "backward of x and alpha")),
    )
    for what in works
)


@dataclass(frozen=True)
class Work:
    """One path through a kernel, on a large map.

    Attributes:
        title: what is computed.
        kernel: a regular expression of the kernel's name.
        dtype: of x.
        loads, stores: tensors of x's shape that are read and written.
        elements: of x, of a block.
        shared: bytes of shared memory that its launch asks for.
        table: bytes that a block copies to shared memory before it begins.
        lookups: words of 4 bytes that an element takes from there.
        wide: whether accesses of 16 bytes are due.
        instructions: of an element, at most; None: what is issued while an H100's memory moves its bytes.
        like: titles of measured kernels that it is compared with.
    """

    title: str
    kernel: str
    dtype: str
    loads: int
    stores: int
    elements: int
    shared: int = 0
    table: int = 0
    lookups: int = 0
    wide: bool = True
    instructions: float | None = None
    like: tuple[str, ...] = ()

    @property
    def most_instructions(self) -> float:
        moved = (self.loads + self.stores) * BYTES[self.dtype]
        return self.instructions or INSTRUCTIONS_PER_BYTE * moved


@dataclass(frozen=True)
class Counted:
    """What a kernel has on an SM, and what an element costs a thread of it, all that a block does once included."""

    registers: int
    warps: int  # on an SM
    in_flight: int  # bytes of loads, of an SM
    instructions: float
    fma: float
    alu: float
    xu: float  # exponentials, reciprocals, conversions
    fp64: float
    shared: float  # words of 4 bytes to and from shared memory
    narrow: float = 0  # bytes loaded and stored by accesses of less than 16 bytes

    def worse_than(self, other: "Counted") -> list[str]:
        """Name the numbers that fall short of another kernel's by more than a tenth."""
        more = ("instructions", "fma", "alu", "xu", "fp64", "shared")
        less = ("warps", "in_flight")
        return [
            *(n for n in more if getattr(self, n) > SLACK * getattr(other, n)),
            *(n for n in less if getattr(self, n) * SLACK < getattr(other, n)),
        ]


@dataclass(frozen=True)
class Measured:
    """A kernel that was timed on a GPU: what a copy of as many bytes takes, as a share of its time; and its counts."""

    work: Work
    source: str
    share: float
    counted: Counted


def works() -> Iterator[Work]:
    """Yield what the product has on a large map, (64, 256, 56, 56) with D = 20."""
    prototypes = [m.work.title for m in measured() if m.source.startswith("bench/")]
    for dtype, name in {"float32": "float", "bfloat16": "kaf::bfloat16", "float16": "kaf::float16"}.items():
        for layout, vectors, evenly in (("", "true", "false"), (", channels_last", "false", "true")):
            answers = dtype == "bfloat16" and not layout
            table, room, lookups = (ANSWERS, ANSWERS, 1) if answers else (TABLE, ROOM, 8)
            more = 2 if answers or layout else 1  # elements of a thread: 64 of these, see set_tiling() of ops.cpp
            for title, kernel, loads, elements in (
                ("forward", f"forward_kernel<{{}}, {evenly}, {{}}, false>", 1, 32768),
                ("backward of x", r"backward_kernel<{}, \(kaf::Sums\)0, {}, false>", 2, 16384),
                ("backward of x and alpha", r"backward_kernel<{}, \(kaf::Sums\)1, {}, false>", 2, 16384),
            ):
                what = f"{title}{layout}, {dtype}"
                like = tuple(t for t in prototypes if t.startswith(f"{what},"))
                symbol = rf"\bkaf::{kernel.format(f'{name}, {vectors}', str(answers).lower())}\("
                yield Work(what, symbol, dtype, loads, 1, more * elements, room, table, lookups,
                           wide=not layout, like=like)  # fmt: skip


def measured(path: Path = MEASURED) -> list[Measured]:
    """Read the kernels that were measured."""
    found = []
    for entry in json.loads(path.read_text())["kernels"]:
        fields = {name: value for name, value in entry.items() if name in Work.__dataclass_fields__}
        found.append(Measured(Work(**fields), entry["source"], entry["share"], Counted(**entry["counted"])))
    return found


def write_counts(counts: dict[str, Counted], path: Path = MEASURED) -> None:
    """Replace the counts of measured kernels, given by title, one kernel a line."""
    content = json.loads(path.read_text())
    for entry in content["kernels"]:
        if entry["title"] in counts:
            entry["counted"] = {name: round(value, 2) for name, value in asdict(counts[entry["title"]]).items()}
    head = json.dumps({name: value for name, value in content.items() if name != "kernels"}, indent=1)
    lines = ",\n".join(json.dumps(entry) for entry in content["kernels"])
    path.write_text(f'{head[:-2]},\n "kernels": [\n{lines}\n]}}\n')


def find(work: Work, binaries: Iterable[Binary]) -> Iterator[Binary]:
    """Yield a work's kernel, of each architecture.

    Raises:
        CannotProve: there is none.
    """
    found = [b for b in binaries if re.search(work.kernel, b.name)]
    if not found:
        raise CannotProve(f"no kernel for {work.title}: {work.kernel}")
    yield from found


def count(work: Work, binary: Binary) -> Counted:
    """Count a kernel's costs.

    Its hot loop is the one that loads and stores most, in float32: what blocks leave is added in float64. It turns as
    often as the block's elements want, by the shortest path that looks up what it has to; longer ones are for what has
    no table. Of the loops that fill shared memory the widest turns until the table is there. All else is passed once.

    Raises:
        CannotProve: it has no such loop.
    """
    code = sass.parse(binary.assembly)[binary.symbol]
    hot = _hot_loop(code)
    threads = work.elements / binary.threads  # elements of a thread
    per_turn = code.path(hot).cost.stored / (BYTES[work.dtype] * work.stores)
    turn = code.path(hot, words=work.lookups * per_turn)
    fill = _fill_loop(code, hot)

    def turns(loop: Loop) -> float:
        if loop == hot:
            return threads / per_turn
        if loop == fill:
            return max(work.table / binary.threads / code.path(loop).cost.shared_stored, 1)
        inside = code.path(loop, turns).cost
        return 0 if inside.stored or inside.shared_stored else 1

    whole = code.path(None, turns, known={hot: turn}).cost.per(threads)
    sm = ARCHITECTURES[binary.architecture]
    warps = round(sm.occupancy(binary.threads, binary.registers, binary.shared + work.shared) * sm.threads / 32)
    return Counted(
        registers=binary.registers,
        warps=warps,
        in_flight=warps * 32 * turn.in_flight,
        instructions=whole.slots,
        fma=whole.pipes["fma"] + whole.packed,
        alu=whole.pipes["alu"],
        xu=whole.pipes["mufu"] + whole.pipes["convert"],
        fp64=whole.pipes["fp64"],
        shared=whole.shared_words,
        narrow=(turn.cost.loaded - turn.cost.loaded_wide + turn.cost.stored - turn.cost.stored_wide) / per_turn,
    )


def _hot_loop(code: Code) -> Loop:
    turns = []
    for loop in code.loops:
        turn = code.path(loop).cost
        if turn.loaded and turn.stored and not any(code.blocks[at].cost.pipes["fp64"] for at in loop.blocks):
            turns.append((turn.stored, turn.slots, loop))
    if not turns:
        raise CannotProve(f"{code.name}: no loop that loads and stores elements")
    return max(turns, key=lambda t: t[:2])[2]


def _fill_loop(code: Code, hot: Loop) -> Loop | None:
    fills = [(cost.shared_stored, loop.header, loop) for loop in code.leaves if loop != hot
             if (cost := code.path(loop).cost).loaded and cost.shared_stored and not cost.stored]  # fmt: skip
    return max(fills)[2] if fills else None


def faults(work: Work, counted: Counted, architecture: str) -> list[str]:
    """List the gates that a kernel does not pass. Only Hopper and Blackwell have gates of time."""
    wrong = []
    if work.wide and counted.narrow:
        wrong.append(f"{counted.narrow:g} bytes of an element are moved by accesses of less than 16 bytes")
    if counted.in_flight < IN_FLIGHT.get(architecture, 0):
        wrong.append(
            f"{counted.in_flight / 1024:g} KiB of loads in flight on an SM ({counted.registers} registers, "
            f"{counted.warps} warps), {IN_FLIGHT[architecture] // 1024} are needed"
        )
    if architecture == "sm_90" and counted.instructions > work.most_instructions:
        wrong.append(f"{counted.instructions:.1f} instructions for an element, more than {work.most_instructions:g}")
    return wrong


def known_short(work: Work, architecture: str) -> bool:
    """Whether a work is known to fall short of a gate of time there."""
    return architecture == "sm_100" or (architecture == "sm_90" and work.title in SHORT)


def spills(b: Binary) -> list[str]:
    """List what no kernel may have: spilled registers, local memory, in Triton's narrow accesses."""
    return [f"{amount} {kind}" for kind, amount in b.spills.items()] + ([b.narrow] if b.narrow else [])


def expected(work: Work, counted: Counted, kernels: Sequence[Measured]) -> Measured | None:
    """Return the fastest of the measured kernels a work is compared with that it equals or beats in every number."""
    equals = [m for m in kernels if m.work.title in work.like and not counted.worse_than(m.counted)]
    return max(equals, key=lambda m: m.share, default=None)
