"""What says where a curve is a polynomial, and of which degree: the numbers of csrc/cuda/tables.cuh and call.h.

With 1/√γ as the unit, a cell of width 0.52, at most 0.58, and degree 7 leave 2e-8 of a Gaussian's peak, a third of a
rounding. `tests/kafops/test_triton.py` sees to it that both backends have the same numbers.
"""

import math
import struct

NODES = (0.49039264, 0.41573481, 0.27778512, 0.09754516)  # ±: Chebyshev's on [−½, ½], float32 once rounded
COEFFICIENTS = 8  # of a polynomial
POINTS = 512  # D; larger dictionaries have no tables
WIDTH, WIDEST = 0.52, 1.12  # of a cell in 1/√γ; times that where room is short
TAIL, UNDERFLOW = 4.4721360, 9.4868  # in 1/√γ: exp(−u²) is 2e-9 there, and below float32
LEAST_T, MOST_T = 1 / 1024, 0.51  # γΔ², for sums over even points by powers
ROWS = 32  # channels whose tables lie side by side where channels do


def cells_for(size: int) -> int:
    """Return the cells that D points need whose bandwidth is at most γΔ² = 0.51 in the mean."""
    return int((0.714 * (size - 1) + 2 * TAIL + 0.0057) / (WIDTH * WIDEST)) + 4


def capacity(size: int) -> int:
    """Return the cells that there is room for: few different numbers, as they are constants of the kernels."""
    return max(64, 1 << (cells_for(size) - 1).bit_length())


def coefficients() -> list[list[float]]:
    """[m][i]: of v^m, in the polynomial that is 1 at node i and 0 at the others; nodes ascend."""
    nodes = [math.copysign(_float32(n), sign) for sign, half in ((-1, NODES), (1, NODES[::-1])) for n in half]
    rows = []
    for i, node in enumerate(nodes):
        c = [1.0]
        for j, other in enumerate(nodes):
            if j != i:
                scale = 1 / (node - other)
                c = [((c[m - 1] if m > 0 else 0.0) - other * (c[m] if m < len(c) else 0.0)) * scale
                     for m in range(len(c) + 1)]  # fmt: skip
        rows.append(c)
    return [list(column) for column in zip(*rows, strict=True)]


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]
