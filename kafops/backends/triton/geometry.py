"""How a tensor's memory is shared among the programs of a Triton kernel."""

import functools
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tiling:
    """How elements are shared among programs and threads.

    Attributes:
        threads: of a program; a multiple of 64, the width of a warp on some GPUs.
        elements: of a tile, for each thread, and half as many of float64; in runs at least one access of 16 bytes.
        tiles: of a program, at most: as many terms a thread adds up, one after the other, in float32.
        programs: no more than these while a program has less than `tiles`: about as many as run at once.
    """

    threads: int
    elements: int
    tiles: int
    programs: int

    def options(self, warp: int) -> dict[str, int]:
        """Return the options of a launch where a warp has so many threads."""
        return {"num_warps": self.threads // warp}


SUMS = Tiling(128, 8, 1, 1)  # of the kernel that adds partial sums
TABLES = Tiling(128, 4, 1, 1)  # of the one that makes tables
RUNS_FROM = 16  # L from which on tiles lie within the runs of one channel: the runs regime
LANES = 32  # columns of a tile of the columns regime, of 4 bytes each: a warp's access is 128 bytes
_NVIDIA = {
    "kaf": Tiling(128, 8, 8, 2048),
    "kaf_backward": Tiling(128, 4, 32, 1024),
    "kaf_double_backward": Tiling(128, 8, 32, 1024),
}
# Four elements of columns would spill there.
_DATACENTER_BLACKWELL = _NVIDIA | {"kaf_backward": Tiling(128, 2, 32, 1024)}
# Programs of four warps of 64, on up to 304 multiprocessors.
_AMD = {key: Tiling(256, t.elements, t.tiles, 2 * t.programs) for key, t in _NVIDIA.items()}
# An operation costs the interpreter the same on one element and on thousands.
_INTERPRETED = dict.fromkeys(_NVIDIA, Tiling(1024, 16, 16, 1))


def tiling(operator: str, architecture: str) -> Tiling:
    """Return the tiling for "kaf", "kaf_backward" or "kaf_double_backward".

    Args:
        operator: as above.
        architecture: "interpreted", "hip", or a CUDA compute capability such as "90".
    """
    others = {"interpreted": _INTERPRETED, "hip": _AMD, "100": _DATACENTER_BLACKWELL, "103": _DATACENTER_BLACKWELL}
    return others.get(architecture, _NVIDIA)[operator]


@dataclass(frozen=True)
class Geometry:
    """Memory as a matrix [B, C L], and how programs share it; see kernels.py.

    Attributes:
        constants: R, W, ALIGN and RUNS of a kernel, which it is compiled for.
        WRAPS: rows of a tile that a thread has; a constant of kernels that sum.
        integers: what a kernel is not compiled for: B, C and L, the sizes outside the channels, of the channels (1
            where a curve is shared by all), and inside them; units of ALIGN elements, in a run or a row; gap, in units,
            between two runs of a channel; parts, of a run or a row, and part, the units of one of a run; rows_each, the
            rows (or runs) of a program; magic and shift: q // units = q magic >> shift for what a program has.
        programs: their number.
        chunks, columns: how many partial sums there are, [chunks, columns].
        tiling: what it was made from.
    """

    constants: dict[str, Any]
    WRAPS: int
    integers: tuple[int, ...]
    programs: int
    chunks: int
    columns: int
    tiling: Tiling


@functools.lru_cache(1024)
def geometry(operator: str, architecture: str, B: int, C: int, L: int, itemsize: int, aligned: bool = True) -> Geometry:
    """Share the matrix [B, C L], none of them 0, among programs.

    The constants depend on nothing that differs between batches.

    Args:
        operator, architecture: as for `tiling`.
        B, C, L: sizes outside the channels, of the channels, and inside them.
        itemsize: bytes of an element.
        aligned: whether all tensors begin at a multiple of 16 bytes.
    """
    t = tiling(operator, architecture)
    runs_from = 100 if architecture == "interpreted" else RUNS_FROM
    runs, M = C == 1 or runs_from <= L, C * L
    full = max(16 // itemsize, 1)  # elements of one access
    elements = max(1, t.elements * 4 // max(4, itemsize))
    tile = t.threads * (max(elements, full) if runs else elements)
    if runs:
        W = align = math.gcd(L, full) if aligned else 1
        units, gap, rows = L // align, (C - 1) * (L // align), B * (L // align)
        R, wraps = tile // W, tile // W // t.threads
    else:
        vector = max(4 // itemsize, 1) if operator == "kaf" else 1  # every column of a thread has sums of its own
        align = math.gcd(M, vector) if aligned else 1
        W = min(256 if architecture == "interpreted" else LANES * vector, max(8, _power_of_two(M)))
        units, gap, rows = M // align, 0, B
        R, wraps = tile // W, max(1, tile // t.threads // align)
    if architecture == "interpreted":
        R, wraps = min(R, _power_of_two(rows)), 1
    groups = C if runs else -(-M // W)
    tiles = min(t.tiles, max(1, groups * -(-rows // R) // t.programs))
    parts, part, magic, shift = groups, 0, 0, 0
    if not runs:
        rows_each = -(-_even_part(B, R * tiles) // R) * R
    elif units >= R * tiles:  # parts of a run, as large as each other
        part, rows_each = _even_part(units, R * tiles), 1
        parts = -(-units // part)
    else:
        parts, part, rows_each = 1, units, _even_part(B, R * tiles // units)
        shift = 31 + (units - 1).bit_length()
        magic = -(-(1 << shift) // units)
    row_chunks = -(-B // rows_each)
    return Geometry(
        {"R": R, "W": W, "ALIGN": align, "RUNS": runs},
        wraps,
        (B, C, L, units, gap, parts, part, rows_each, magic - (1 << 32) if magic >> 31 else magic, shift),
        programs=row_chunks * parts * (C if runs else 1),
        chunks=row_chunks * (parts if runs else 1),
        columns=C if runs else M,
        tiling=t,
    )


def _even_part(n: int, most: int) -> int:
    """Return the size of the parts of n that are as many as those of `most`, and about as large as each other."""
    return -(-n // -(-n // most))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
