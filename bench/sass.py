"""Reads the assembly that nvdisasm prints (SASS): instructions, loops, and what one turn of a loop costs.

A loop is a natural one: a branch to a block that dominates it, and all blocks between. A turn follows a path through
the loop that stores most, see `Code.path`; all of a path's instructions take an issue slot, whether their predicate
holds or not. Only NOPs are left out.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

PIPES = ("fma", "alu", "mufu", "convert", "fp64", "global", "shared", "local", "other")

_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+),")
_LABEL = re.compile(r"^([.$\w]+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\(([^)]+)\)")
_INDIRECT = re.compile(r'BRANCH_TARGETS ([^"]+)"')

_FMA = re.compile(r"(FFMA|FMUL|FADD|IMAD|HFMA|HADD|HMUL|IMUL|IDP)(2|32I)?")
_FP64 = re.compile(r"D(FMA|ADD|MUL|SETP|MNMX)")
_CONVERT = re.compile(r"F2F|F2FP|F2I|I2F|I2I|FRND|F2IP|I2IP|POPC|FLO|BREV")
_GLOBAL = re.compile(r"LDG|STG|LD|ST|ATOM|ATOMG|RED|REDG|LDGSTS")
_SHARED = re.compile(r"LDS|STS|ATOMS|LDSM|STSM|SHFL|MATCH")
_LOCAL = re.compile(r"LDL|STL")
_OTHER = re.compile(  # branches, barriers, special registers, constants, and all that is done once for a warp (U...)
    r"BRA|BRX|BRXU|JMP|JMX|EXIT|RET|CALL|BSSY|BSYNC|BREAK|BMOV|WARPSYNC|YIELD|BAR|B2R|R2B|DEPBAR|LDGDEPBAR|MEMBAR"
    r"|ERRBAR|CCTL|CCTLL|NANOSLEEP|S2R|S2UR|CS2R|VOTE|R2UR|REDUX|ELECT|ACQBULK|PREEXIT|KILL|SYNCS|LDC|LDCU|U[A-Z]\w*"
)
_PIPES = (
    ("mufu", re.compile("MUFU")),
    ("fma", _FMA),
    ("fp64", _FP64),
    ("convert", _CONVERT),
    ("global", _GLOBAL),
    ("shared", _SHARED),
    ("local", _LOCAL),
    ("other", _OTHER),
)
_BRANCHES = ("BRA", "BRX", "BRXU", "JMP", "JMX")
_ENDS = ("EXIT", "RET", "KILL")


@dataclass(frozen=True)
class Instruction:
    """One line: `@P0 LDG.E.128 R4, desc[UR4][R2.64] ;` has opcode LDG, modifiers E and 128, and is predicated."""

    address: int
    opcode: str
    modifiers: tuple[str, ...] = ()
    operands: str = ""
    predicated: bool = False
    targets: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes that a memory access moves for each thread; 0 of any other instruction."""
        if not self.opcode.startswith(("LD", "ST", "ATOM", "RED")):
            return 0
        widths = {"128": 16, "64": 8, "ENL2": 32, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
        return next((widths[m] for m in self.modifiers if m in widths), 4)

    @cached_property
    def registers(self) -> frozenset[int]:
        """Those that the operands name: of `R2.64` two, of what an access moves all."""
        wide = self.filled if self.bytes else frozenset[int]()
        pairs = re.findall(r"\bR(\d+)(\.64)?", self.operands)
        return wide | {int(n) + k for n, two in pairs for k in range(2 if two else 1)}

    @cached_property
    def filled(self) -> frozenset[int]:
        """The registers of a load's result, the first operand."""
        first = re.match(r"R(\d+)\b", self.operands)
        return frozenset(int(first[1]) + k for k in range(max(self.bytes // 4, 1))) if first else frozenset()

    @property
    def branches(self) -> bool:
        """Whether control may go to a target. A subroutine's name is none; a call of a local label is a far branch."""
        return self.opcode in _BRANCHES or (self.opcode == "CALL" and self.operands.startswith("`(.L"))

    @property
    def ends(self) -> bool:
        """Whether control does not go on to the next instruction, if the predicate holds."""
        if self.opcode in ("BRA", "JMP"):
            return self.operands.startswith("`(")  # others have a condition: `BRA.U !UP0, ...`
        return self.branches or self.opcode in _ENDS

    @property
    def pipe(self) -> str:
        """What executes it. An unknown one counts as ALU, the narrowest of the pipes of common instructions."""
        return next((pipe for pipe, opcodes in _PIPES if opcodes.fullmatch(self.opcode)), "alu")


@dataclass
class Cost:
    """What some instructions take of a thread: issue slots, of them by pipe, and bytes moved to and from memory."""

    pipes: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PIPES, 0.0))
    packed: float = 0.0  # instructions of the FMA pipe that do two elements' work, and take twice its time
    shared_words: float = 0.0  # of 4 bytes, to and from shared memory; a shuffle is one
    shared_stored: float = 0.0  # bytes of them
    loaded: float = 0.0
    stored: float = 0.0
    loaded_wide: float = 0.0  # of them by accesses of 128 bits
    stored_wide: float = 0.0

    @property
    def slots(self) -> float:
        return sum(self.pipes.values())

    def __add__(self, other: "Cost") -> "Cost":
        return self.plus(other, 1.0)

    def plus(self, other: "Cost", times: float) -> "Cost":
        """Return self + times · other."""
        pipes = {p: self.pipes[p] + times * other.pipes[p] for p in PIPES}
        rest = {n: getattr(self, n) + times * getattr(other, n) for n in vars(self) if n != "pipes"}
        return Cost(pipes, **rest)

    def per(self, elements: float) -> "Cost":
        return Cost().plus(self, 1 / elements)


def cost(instructions: Iterable[Instruction]) -> Cost:
    """Add up instructions, each once."""
    total = Cost()
    for i in instructions:
        if i.opcode == "NOP":
            continue
        total.pipes[i.pipe] += 1
        total.packed += i.opcode in ("FFMA2", "FADD2", "FMUL2")
        if i.pipe == "shared":
            total.shared_words += max(i.bytes, 4) / 4
            total.shared_stored += i.bytes * (i.opcode == "STS")
        if i.pipe == "global":
            for name, opcodes in (("loaded", ("LDG", "LD")), ("stored", ("STG", "ST"))):
                if i.opcode in opcodes:
                    setattr(total, name, getattr(total, name) + i.bytes)
                    if i.bytes >= 16:
                        setattr(total, f"{name}_wide", getattr(total, f"{name}_wide") + i.bytes)
    return total


@dataclass
class Block:
    """Instructions that are always executed together, and where control goes after them."""

    start: int
    instructions: list[Instruction]
    successors: tuple[int, ...] = ()

    @cached_property
    def cost(self) -> Cost:
        return cost(self.instructions)


@dataclass(frozen=True)
class Path:
    """Blocks in the order of their execution, each with how often it is executed, and what they cost together."""

    cost: Cost = field(default_factory=Cost)
    blocks: tuple[tuple[Block, float], ...] = ()

    def __add__(self, after: "Path") -> "Path":
        return Path(self.cost + after.cost, self.blocks + after.blocks)

    def times(self, n: float) -> "Path":
        return Path(Cost().plus(self.cost, n), tuple((block, n * often) for block, often in self.blocks))

    @property
    def in_flight(self) -> int:
        """The most bytes a thread has under way from global memory at once, where this is a turn of a loop.

        A load is under way until an instruction names one of the registers that it fills, in this turn or the next.
        """
        once = [i for block, often in self.blocks if often for i in block.instructions]
        waiting: dict[frozenset[int], int] = {}
        most = 0
        for i in once * 2:
            waiting = {filled: n for filled, n in waiting.items() if not filled & i.registers}
            if i.opcode in ("LDG", "LD"):
                waiting[i.filled] = i.bytes
                most = max(most, sum(waiting.values()))
        return most


@dataclass(frozen=True)
class Loop:
    """A natural loop: its header, and the starts of all its blocks."""

    header: int
    blocks: frozenset[int]


class Code:
    """A kernel's instructions, with labels resolved."""

    def __init__(self, name: str, instructions: list[Instruction], labels: dict[str, int]) -> None:
        self.name, self.instructions, self.labels = name, instructions, labels

    @cached_property
    def blocks(self) -> dict[int, Block]:
        """Basic blocks by the index of their first instruction, reachable ones only."""
        n = len(self.instructions)
        starts = {0, *(at for at in self.labels.values() if at < n)}
        lines = enumerate(self.instructions)
        starts.update(i + 1 for i, line in lines if (line.branches or line.opcode in _ENDS) and i + 1 < n)
        order = sorted(starts)
        blocks = {}
        for start, end in zip(order, [*order[1:], n], strict=True):
            inside = self.instructions[start:end]
            blocks[start] = Block(start, inside, self._successors(inside[-1], end if end < n else None))
        reached, waiting = set[int](), [0]
        while waiting:
            start = waiting.pop()
            if start not in reached:
                reached.add(start)
                waiting.extend(blocks[start].successors)
        return {start: block for start, block in blocks.items() if start in reached}

    def _successors(self, last: Instruction, following: int | None) -> tuple[int, ...]:
        targets = [self.labels[t] for t in last.targets if t in self.labels] if last.branches else []
        if following is not None and (last.predicated or not last.ends):
            targets.append(following)
        return tuple(dict.fromkeys(targets))

    @cached_property
    def loops(self) -> list[Loop]:
        """All natural loops, those that share a header as one."""
        above = _dominators(self.blocks)
        before: dict[int, list[int]] = {start: [] for start in self.blocks}
        for start, block in self.blocks.items():
            for successor in block.successors:
                before[successor].append(start)
        bodies: dict[int, set[int]] = {}
        for start, block in self.blocks.items():
            for header in block.successors:
                if header in above[start]:
                    body = bodies.setdefault(header, {header})
                    waiting = [start]
                    while waiting:
                        at = waiting.pop()
                        if at not in body:
                            body.add(at)
                            waiting.extend(before[at])
        return [Loop(header, frozenset(body)) for header, body in sorted(bodies.items())]

    def inner(self, loop: Loop | None) -> list[Loop]:
        """Return the loops directly inside a loop, or the outermost ones."""
        inside = [x for x in self.loops if loop is None or x.blocks < loop.blocks]
        return [x for x in inside if not any(x.blocks < y.blocks for y in inside)]

    @property
    def leaves(self) -> list[Loop]:
        return [loop for loop in self.loops if not self.inner(loop)]

    def path(
        self,
        loop: Loop | None,
        turns: Callable[[Loop], float] = lambda _: 0.0,
        words: float | None = None,
        known: Mapping[Loop, "Path"] = MappingProxyType({}),
    ) -> "Path":
        """Return one turn of a loop, or with None the whole program, once through; loops inside turn as often as told.

        Of all paths it is one that stores most. Of those it is the longest; or with `words` the shortest of those that
        move so many 4-byte words to and from shared memory, or most. Of loops in `known` the turn is as given.
        """
        blocks = loop.blocks if loop else frozenset(self.blocks)
        header = loop.header if loop else 0
        inner = {x.header: x for x in self.inner(loop)}
        home = {start: x.header for x in inner.values() for start in x.blocks}
        sign = 1 if words is None else -1

        def own(start: int) -> Path:
            if x := inner.get(start):
                return (known.get(x) or self.path(x, turns, words, known)).times(turns(x))
            return Path(self.blocks[start].cost, ((self.blocks[start], 1.0),))

        def following(start: int) -> Iterator[int]:
            """Yield where control goes, but not back; an inner loop is one place."""
            for at in inner[start].blocks if start in inner else (start,):
                for successor in self.blocks[at].successors:
                    to = home.get(successor, successor)
                    if successor in blocks and to != start and (loop is None or successor != header):
                        yield to

        best: dict[int, dict[tuple[float, float], Path]] = {}  # from a block on, by what is stored and moved
        for start in _post_order(header, following):
            first, best[start] = own(start), {}
            for rest in [p for to in set(following(start)) for p in best.get(to, {}).values()] or [Path()]:
                found = first + rest
                key = found.cost.stored, min(found.cost.shared_words, words or 0)
                before = best[start].setdefault(key, found)
                if sign * found.cost.slots > sign * before.cost.slots:
                    best[start][key] = found
        return best[header][max(best[header])]


def _dominators(blocks: dict[int, Block]) -> dict[int, set[int]]:
    order = list(reversed(_post_order(0, lambda s: blocks[s].successors)))
    before: dict[int, list[int]] = {start: [] for start in blocks}
    for start, block in blocks.items():
        for successor in block.successors:
            before[successor].append(start)
    above = {start: set(blocks) for start in blocks} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for start in order[1:]:
            new = set.intersection(*(above[b] for b in before[start])) | {start}
            if new != above[start]:
                above[start], changed = new, True
    return above


def _post_order(entry: int, successors: Callable[[int], Iterable[int]]) -> list[int]:
    order, seen = [], {entry}
    stack = [(entry, iter(list(successors(entry))))]
    while stack:
        at, rest = stack[-1]
        following = next((s for s in rest if s not in seen), None)
        if following is None:
            order.append(at)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(list(successors(following)))))
    return order


def parse(text: str) -> dict[str, Code]:
    """Read what `nvdisasm -c` prints: the code of every kernel, by its (mangled) name."""
    codes: dict[str, Code] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if section := _SECTION.match(line):
            instructions, labels = [], {}
            codes[section[1]] = Code(section[1], instructions, labels)
        elif label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            address, predicate, name, operands = found.groups()
            opcode, *modifiers = name.split(".")
            targets = _TARGET.findall(operands)
            if indirect := _INDIRECT.search(operands):
                targets = [t.strip() for t in indirect[1].split(",")]
            always = predicate is None or predicate.strip() in ("@PT", "@UPT")
            instructions.append(
                Instruction(int(address, 16), opcode, tuple(modifiers), operands.strip(), not always, tuple(targets))
            )
    return {name: code for name, code in codes.items() if code.instructions}
