"""How a tensor's memory is shared among the programs of a Triton kernel."""

import math
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Tiling:
    """How elements are shared among programs and threads.

    Attributes:
        threads: of a program; a multiple of 64, the width of a warp on some GPUs.
        elements: of a tile, for each thread; at least one access of 16 bytes.
        vector: at most so many neighbours go to one thread, at most 16 bytes. In the columns regime every one of them
            has its own constants, and its own sums, in registers.
        tiles: of a program, at most; as many terms a thread adds up, one after the other, in float32.
        programs: no more than these while a program has less than `tiles`: about as many as run at once.
        runs_from: L from which on tiles lie within the runs of one channel: the runs regime.
        columns: that a tile of the columns regime has, at most.
        registers: of a thread, at most; None leaves them to the compiler.
    """

    threads: int
    elements: int
    vector: int
    tiles: int = 32
    programs: int = 512
    runs_from: int = 16
    columns: int = 32
    registers: int | None = None

    def options(self, warp: int) -> dict[str, int]:
        """Return the options of a launch where a warp has so many threads."""
        return {"num_warps": self.threads // warp} | ({"maxnreg": self.registers} if self.registers else {})


SUMS = Tiling(128, 8, 8)  # of the kernel that adds partial sums
_NVIDIA = {
    ("kaf", "runs"): Tiling(128, 8, 8),
    ("kaf", "columns"): Tiling(128, 4, 4),
    ("kaf_backward", "runs"): Tiling(128, 4, 8),
    ("kaf_backward", "columns"): Tiling(128, 2, 2),
    ("kaf_double_backward", "runs"): Tiling(128, 8, 8),
    ("kaf_double_backward", "columns"): Tiling(128, 8, 4),
}
# Left alone, the compiler takes 128 registers for half precision, and two words more on the stack.
_SM_120 = _NVIDIA | {("kaf_backward", "runs"): replace(_NVIDIA["kaf_backward", "runs"], registers=160)}
# Programs of four warps of 64, on up to 304 multiprocessors.
_AMD = {key: replace(t, threads=256, programs=1024) for key, t in _NVIDIA.items()}
# An operation costs the interpreter the same on one element and on thousands.
_INTERPRETED = dict.fromkeys(_NVIDIA, Tiling(1024, 16, 4, tiles=16, programs=1, runs_from=100, columns=256))


def tiling(operator: str, regime: str, architecture: str) -> Tiling:
    """Return the tiling for "kaf", "kaf_backward" or "kaf_double_backward", in the "runs" or the "columns" regime.

    Args:
        operator, regime: as above.
        architecture: "interpreted", "hip", or a CUDA compute capability such as "90".
    """
    tables = {"interpreted": _INTERPRETED, "hip": _AMD, "120": _SM_120, "121": _SM_120}
    return tables.get(architecture, _NVIDIA)[operator, regime]


@dataclass(frozen=True)
class Geometry:
    """Memory as a matrix [B, C L], and how programs share it; see kernels.py.

    Attributes:
        B, C, L: sizes outside the channels, of the channels, and inside them; C = 1 where a curve is shared by all.
        R, W, ALIGN, RUNS, ALONG_L: constants of the kernels.
        tiles: of each program.
        row_chunks, column_chunks: numbers of programs along B, and along L (where RUNS) or M.
        tiling: what it was made from.
    """

    B: int
    C: int
    L: int
    R: int
    W: int
    ALIGN: int
    RUNS: bool
    ALONG_L: bool
    tiles: int
    row_chunks: int
    column_chunks: int
    tiling: Tiling

    @property
    def programs(self) -> int:
        """Their number."""
        return self.row_chunks * self.column_chunks * (self.C if self.RUNS else 1)

    @property
    def partial_sums(self) -> tuple[int, int]:
        """Shape of one sum's partial results: [chunks, columns]."""
        if self.RUNS:
            return self.row_chunks * self.column_chunks, self.C
        return self.row_chunks, self.C * self.L

    @property
    def constants(self) -> dict[str, Any]:
        """What a kernel is compiled for."""
        return {name: getattr(self, name) for name in ("R", "W", "ALIGN", "RUNS", "ALONG_L")}

    @property
    def integers(self) -> dict[str, int]:
        """What a kernel is not compiled for."""
        units = (self.L if self.RUNS else self.C * self.L) // self.ALIGN
        return {
            "B": self.B, "C": self.C, "L": self.L, "units": units, "column_chunks": self.column_chunks,
            "tiles": self.tiles,
        }  # fmt: skip


def geometry(operator: str, architecture: str, B: int, C: int, L: int, itemsize: int, aligned: bool = True) -> Geometry:
    """Share the matrix [B, C L], none of them 0, among programs.

    The constants, which a kernel is compiled for, do not depend on B, but for B = 1 and B ≤ 4; nor, where C > 1, do
    they depend on anything else that differs between batches.

    Args:
        operator, architecture: as for `tiling`.
        B, C, L: sizes outside the channels, of the channels, and inside them.
        itemsize: bytes of an element.
        aligned: whether all tensors begin at a multiple of 16 bytes.
    """
    runs = C == 1 or tiling(operator, "runs", architecture).runs_from <= L
    t = tiling(operator, "runs" if runs else "columns", architecture)
    width, M, full = L if runs else C * L, C * L, max(16 // itemsize, 1)
    vector = math.gcd(width, min(t.vector, full)) if aligned else 1
    tile = t.threads * (max(t.elements, full) if runs else t.elements)
    widths = [2**i for i in range(tile.bit_length()) if i == 0 or 2 ** (i - 1) < width]
    if runs:
        # Few elements beside the end of a row, then long runs.
        W = min((w for w in widths if w >= 16 or w == widths[-1]), key=lambda w: -(-L // w) * w * (1 + 4 / w))
    else:
        W = min(t.columns if B > 4 else tile, widths[-1])
    R = tile // W
    if B <= 4 or architecture == "interpreted":
        R = min(R, 1 if B == 1 else max(4, 1 << (B - 1).bit_length()))
    while R > 1 and R * M >= 2**31:  # offsets within a tile are int32
        R //= 2
    row_tiles, column_tiles = -(-B // R), -(-width // W)
    along_l = runs and (C == 1 or column_tiles >= 8)
    total = row_tiles * column_tiles * (C if runs else 1)
    tiles = min(t.tiles, max(1, total // t.programs))
    along = column_tiles if along_l else row_tiles
    chunks = -(-along // tiles)
    tiles = -(-along // chunks)
    return Geometry(
        B, C, L, R, W,
        ALIGN=vector,
        RUNS=runs,
        ALONG_L=along_l,
        tiles=tiles,
        row_chunks=row_tiles if along_l else chunks,
        column_chunks=chunks if along_l else column_tiles,
        tiling=t,
    )  # fmt: skip
