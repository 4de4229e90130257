"""What an SM can hold, and what has to be in flight on it.

Threads, blocks, registers and shared memory of an SM: CUDA Programming Guide 13, "Compute Capabilities",
https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/compute-capabilities.html
"""

import math
from dataclasses import dataclass

WARP = 32
REGISTERS = 65536  # 32-bit, of an SM
# Bytes of loads on an SM. Measured on an H100 (prototypes/measured.json), kernels that need no more instructions than
# their memory's time leaves: with 8 KiB 0.6 of a copy's speed, with 24 KiB and more 0.77 to 1.03. On Blackwell nothing
# was measured: its memory is 2.4 times as fast, and CUB's tunings ask for twice the bytes of Hopper's there.
IN_FLIGHT = {"sm_90": 24 << 10, "sm_100": 48 << 10}
# What an H100 SXM issues while its memory moves a byte: 132 SMs x 128 threads x 1.98 GHz / 3.35 TB/s (its whitepaper,
# table 3, and data sheet).
INSTRUCTIONS_PER_BYTE = 10
_REGISTER_UNIT = 256  # registers are given to a warp in these, and to warps in fours, one for each quarter of an SM
_SHARED_UNIT = 128


@dataclass(frozen=True)
class Architecture:
    """An SM: what fits."""

    name: str
    threads: int
    blocks: int
    shared: int  # bytes
    reserved: int = 1024  # bytes of shared memory that each block loses to the system

    def occupancy(self, threads: int, registers: int, shared: int) -> float:
        """Return the share of the SM's warps that are resident, for blocks of so many threads, registers and bytes."""
        warps = math.ceil(threads / WARP)
        per_warp = _ceil(registers * WARP, _REGISTER_UNIT)
        by_registers = REGISTERS // per_warp // 4 * 4 // warps
        by_shared = self.shared // max(_ceil(shared + self.reserved, _SHARED_UNIT), 1)
        limit = self.threads // WARP
        return min(self.blocks, by_registers, by_shared, limit // warps) * warps / limit


def _ceil(n: int, unit: int) -> int:
    return -(-n // unit) * unit


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("sm_75", threads=1024, blocks=16, shared=64 << 10, reserved=0),
        Architecture("sm_80", threads=2048, blocks=32, shared=164 << 10),
        Architecture("sm_86", threads=1536, blocks=16, shared=100 << 10),
        Architecture("sm_89", threads=1536, blocks=24, shared=100 << 10),
        Architecture("sm_90", threads=2048, blocks=32, shared=228 << 10),
        Architecture("sm_100", threads=2048, blocks=32, shared=228 << 10),
        Architecture("sm_120", threads=1536, blocks=24, shared=100 << 10),
    )
}
