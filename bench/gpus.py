"""What an SM can hold and issue, and four GPUs' peaks, each number with where it is written.

Sources, by the letters below:
    G  CUDA C++ Best Practices Guide 13, "Throughput of Native Arithmetic Instructions", results per clock per SM
       https://docs.nvidia.com/cuda/cuda-c-best-practices-guide/#throughput-of-native-arithmetic-instructions
    C  CUDA Programming Guide 13, "Compute Capabilities": threads, blocks, registers, shared memory of an SM; its four
       warp schedulers, each of which issues one instruction per clock; its 32 banks of shared memory
       https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/compute-capabilities.html
    A  NVIDIA A100 Tensor Core GPU Architecture, whitepaper, table 4; bandwidth from the A100 80GB SXM data sheet
       https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf
    H  NVIDIA H100 Tensor Core GPU Architecture 1.04, whitepaper, table 3; bandwidth from the H100 SXM data sheet
       https://resources.nvidia.com/en-us-hopper-architecture/nvidia-h100-tensor-c
    B  NVIDIA Blackwell Architecture Technical Brief 2.1, table 3; SMs and clock from the B200's entry in TechPowerUp
       https://resources.nvidia.com/en-us-blackwell-architecture, https://www.techpowerup.com/gpu-specs/b200.c4210
    L  NVIDIA Ada GPU Architecture, whitepaper, appendix A
       https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
"""

import math
from dataclasses import dataclass

WARP = 32
ISSUE = 128  # threads' instructions an SM starts per clock: 4 schedulers x 32 threads [C]
REGISTERS = 65536  # 32-bit, of an SM [C]
XU = 16  # exp2, reciprocal and conversions, results per clock per SM [G]
ALU = 64  # integer, logic, compare, select, results per clock per SM; an upper bound of the time where it is 128 [G]
SHARED_WORDS = 32  # of 32 bits, per clock per SM, through the one path of shared and global accesses [C]
_REGISTER_UNIT = 256  # registers are given to a warp in these, and to warps in fours, one for each quarter of an SM
_SHARED_UNIT = 128


@dataclass(frozen=True)
class Architecture:
    """An SM: what fits [C] and how many results per clock it gives [G]."""

    name: str
    fp32: int
    fp64: int
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
        Architecture("sm_75", fp32=64, fp64=2, threads=1024, blocks=16, shared=64 << 10, reserved=0),
        Architecture("sm_80", fp32=64, fp64=32, threads=2048, blocks=32, shared=164 << 10),
        Architecture("sm_86", fp32=128, fp64=2, threads=1536, blocks=16, shared=100 << 10),
        Architecture("sm_89", fp32=128, fp64=2, threads=1536, blocks=24, shared=100 << 10),
        Architecture("sm_90", fp32=128, fp64=64, threads=2048, blocks=32, shared=228 << 10),
        Architecture("sm_100", fp32=128, fp64=64, threads=2048, blocks=32, shared=228 << 10),
        Architecture("sm_120", fp32=128, fp64=2, threads=1536, blocks=24, shared=100 << 10),
    )
}


@dataclass(frozen=True)
class Gpu:
    """A product: SMs, clock in Hz, memory bandwidth in bytes per second, and the letters of their sources."""

    name: str
    architecture: Architecture
    sms: int
    clock: float
    bandwidth: float
    sources: str

    def seconds(self, results: float, per_clock: float) -> float:
        """Return the time of so many results, of which an SM gives `per_clock` each clock."""
        return results / (per_clock * self.sms * self.clock)


GPUS = (
    Gpu("A100 SXM 80 GB", ARCHITECTURES["sm_80"], sms=108, clock=1.410e9, bandwidth=2.039e12, sources="A"),
    Gpu("H100 SXM", ARCHITECTURES["sm_90"], sms=132, clock=1.980e9, bandwidth=3.35e12, sources="H"),
    Gpu("B200", ARCHITECTURES["sm_100"], sms=148, clock=1.965e9, bandwidth=8.0e12, sources="B"),
    Gpu("RTX 4090", ARCHITECTURES["sm_89"], sms=128, clock=2.520e9, bandwidth=1.008e12, sources="L"),
)
