"""What is to be proved of the GPU kernels: the paths through them, what each costs an element, and what must not be."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from bench import sass
from bench.gpu_compile import Binary, CannotProve
from bench.gpus import ARCHITECTURES, GPUS, Gpu
from bench.roofline import Prediction, predict
from bench.sass import Code, Cost, Instruction, Loop

H100 = next(gpu for gpu in GPUS if gpu.architecture.name == "sm_90")
POINTS = 20  # D
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_CUDA_TYPES = {"float32": "float", "bfloat16": "kaf::bfloat16", "float16": "kaf::float16", "float64": "double"}
BACKENDS = {"cuda": "CUDA C++", "triton": "Triton"}


@dataclass(frozen=True)
class Limit:
    """What an element may cost on an H100."""

    slots: float
    mufu: float | None
    ratio: float = 1.1  # of the predicted time to that of the memory


@dataclass(frozen=True)
class Work:
    """A row of the tables: one path through a kernel.

    Attributes:
        title: what is computed.
        kernel: regular expressions of the kernel's name, by backend; {T} is the type of x.
        loads, stores: tensors of x's shape that are read and written.
        direct: whether it is the path with an exponential for each point.
        dtypes: of which tables are made.
        wide: whether accesses of 128 bits are due.
        dynamic: bytes of shared memory that the launcher of the CUDA C++ kernel asks for.
        limit: for float32 on an H100.
    """

    title: str
    kernel: dict[str, str]
    loads: int
    stores: int
    direct: bool = False
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    wide: bool = True
    dynamic: int = 0
    limit: Limit | None = None

    def moved(self, dtype: str) -> int:
        """Bytes of memory per element."""
        return (self.loads + self.stores) * BYTES[dtype]


def _names(operation: str, vectors: bool = True, free: bool = False) -> dict[str, str]:
    """Return what the kernels of an operation are called, contiguous ones with vectors, channels_last ones without."""
    operator = "kaf" if operation == "forward" else f"kaf_{operation}"
    layout = "contiguous" if vectors else "channels_last"
    return {
        "cuda": rf"\bkaf::{operation}_kernel<{{T}}, {str(vectors).lower()}>\(",
        "triton": f"^{operator} {layout}{' free' * free}, {{T}}$",
    }


TABLE = (
    Work("forward", _names("forward"), 1, 1, dynamic=3072, limit=Limit(64, 6)),
    Work("backward", _names("backward"), 2, 1, dynamic=13312, limit=Limit(130, None)),
    Work("forward, channels_last", _names("forward", vectors=False), 1, 1, wide=False, dynamic=6144),
    Work("backward, channels_last", _names("backward", vectors=False), 2, 1, wide=False, dynamic=16384),
    Work("forward, free dictionary", _names("forward", free=True), 1, 1, direct=True, dynamic=3072),
    Work("backward, free dictionary", _names("backward", free=True), 2, 1, direct=True, dynamic=24064),
    Work("double backward", _names("double_backward"), 3, 2, direct=True, dynamic=26112),
)


@dataclass(frozen=True)
class Row:
    """A path as compiled for one architecture, its cost per element."""

    work: Work
    backend: str
    dtype: str
    binary: Binary
    cost: Cost
    elements: float  # of a thread, in one turn of the loop

    @property
    def occupancy(self) -> float:
        shared = self.binary.shared + (self.work.dynamic if self.backend == "cuda" else 0)
        sm = ARCHITECTURES[self.binary.architecture]
        return sm.occupancy(self.binary.threads, self.binary.registers, shared)

    @property
    def in_flight(self) -> float:
        """Bytes of elements that the threads of an SM load in one turn each: what can be under way at once."""
        threads = self.occupancy * ARCHITECTURES[self.binary.architecture].threads
        return threads * self.elements * self.work.loads * BYTES[self.dtype]

    def on(self, gpu: Gpu) -> Prediction:
        return predict(self.cost, self.work.moved(self.dtype), gpu)

    @property
    def limits(self) -> list[tuple[str, float, float]]:
        """What must not be more than what: name, value, limit."""
        limit = self.work.limit
        if limit is None or self.dtype != "float32" or self.binary.architecture != H100.architecture.name:
            return []
        values = [
            ("instructions per element", self.cost.slots, limit.slots),
            ("MUFU per element", self.cost.pipes["mufu"], limit.mufu),
            ("predicted time / memory-bound time", self.on(H100).ratio, limit.ratio),
        ]
        return [(name, value, most) for name, value, most in values if most is not None]


def measure(work: Work, dtype: str, code: Code) -> tuple[Cost, float]:
    """Return what an element costs in a kernel's hot loop, and how many elements a turn of it does.

    Raises:
        CannotProve: the kernel has no such loop.
    """
    size = BYTES[dtype] * work.stores
    if work.direct:
        turns = [turn for x in code.loops if (turn := _nest(code, x, lambda turn: turn.stored / size))]
    else:
        turns = [code.turn(loop) for loop in code.leaves] if code.loops else [code.turn(None)]
    turns = [turn for turn in turns if turn.loaded and turn.stored]
    if not turns:
        raise CannotProve(f"{code.name}: no loop that loads and stores elements")
    turn = max(turns, key=lambda t: (t.stored, t.slots))
    return turn.per(turn.stored / size), turn.stored / size


def _nest(code: Code, outer: Loop, elements: Callable[[Cost], float]) -> Cost | None:
    """Return the cost of a turn of a loop over elements with one over points inside, or None if it is none.

    The loops inside that compute exponentials turn until there are POINTS for each element, with those that were
    unrolled out of them. So few points are staged in shared memory once for all elements: the other innermost loops,
    and paths with a barrier, are left out.
    """
    inside = {x: code.turn(x).exp2 for x in code.leaves if x.blocks < outer.blocks}
    most = max(inside.values(), default=0)
    once = code.turn(outer, lambda loop: loop not in inside, _is_barrier)
    if not most or not once.stored or code.turn(outer).reciprocals:  # the fast path's nest has a reciprocal
        return None
    turns = (POINTS * elements(once) - once.exp2) / most
    return code.turn(outer, lambda loop: turns if inside.get(loop) == most else loop not in inside, _is_barrier)


def _is_barrier(instruction: Instruction) -> bool:
    return instruction.opcode == "BAR"


def rows(binaries: Iterable[Binary]) -> list[Row]:
    """Measure all paths of the table in the kernels that were compiled for NVIDIA's GPUs.

    Raises:
        CannotProve: a kernel of the table was not compiled, or has no loop as it should.
    """
    sets: dict[tuple[str, str], list[Binary]] = {}
    for b in binaries:
        if b.architecture in ARCHITECTURES:
            sets.setdefault((b.backend, b.architecture), []).append(b)
    return [
        row
        for work in TABLE
        for dtype in work.dtypes
        for together in sets.values()
        for row in _rows(work, dtype, together)
    ]


def _rows(work: Work, dtype: str, together: list[Binary]) -> Iterator[Row]:
    backend, architecture = together[0].backend, together[0].architecture
    name = re.escape(_CUDA_TYPES[dtype]) if backend == "cuda" else dtype
    found = [b for b in together if re.search(work.kernel[backend].replace("{T}", name), b.name)]
    if not found:
        raise CannotProve(f"{BACKENDS[backend]} has no kernel for {work.title}, {dtype}, {architecture}")
    for binary in found:
        code = sass.parse(binary.assembly)[binary.symbol]
        yield Row(work, backend, dtype, binary, *measure(work, dtype, code))


def faults(binaries: Iterable[Binary], measured: Iterable[Row]) -> list[str]:
    """List all that must not be: spills, local memory, narrow accesses, costs above the limits."""
    wrong = []
    for b in binaries:
        all_wrong = ", ".join(
            [f"{amount} {kind}" for kind, amount in b.spills.items()] + ([b.narrow] if b.narrow else [])
        )
        if all_wrong:
            wrong.append(f"{BACKENDS[b.backend]}, {b.architecture}, {b.name}: {all_wrong}")
    for row in measured:
        what = f"{BACKENDS[row.backend]}, {row.binary.architecture}, {row.work.title}, {row.dtype}"
        if row.work.wide:
            for kind, count in (("loaded", row.work.loads), ("stored", row.work.stores)):
                due, wide = count * BYTES[row.dtype], getattr(row.cost, f"{kind}_wide")
                if wide < due:
                    wrong.append(f"{what}: {wide:g} of {due} bytes per element are {kind} by accesses of 128 bits")
        wrong += [
            f"{what}: {name} {value:.4g}, more than {limit:g}" for name, value, limit in row.limits if value > limit
        ]
    return wrong
