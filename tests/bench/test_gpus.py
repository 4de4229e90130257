import pytest

from bench.gpus import ARCHITECTURES, INSTRUCTIONS_PER_BYTE


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "resident"),
    [
        # 65536 / (72 · 32) = 28.4 warps, 7 blocks of 4.
        ("sm_80", 128, 72, 0, 28 / 64),
        # 128 registers: 16 warps, 4 blocks; 13312 + 1024 bytes each would leave room for 15.
        ("sm_90", 128, 128, 13312, 16 / 64),
        # 65 registers are given as 72: 28 warps, which are 3 blocks of 8.
        ("sm_90", 256, 65, 0, 24 / 64),
        # 32 registers: 64 warps would fit, an SM holds 48.
        ("sm_86", 128, 32, 0, 48 / 48),
        ("sm_120", 256, 32, 0, 48 / 48),
        # 16 blocks at most, of 1 warp.
        ("sm_86", 32, 32, 0, 16 / 48),
        # 100 KB / (26112 + 1024) = 3 blocks.
        ("sm_120", 128, 96, 26112, 12 / 48),
        ("sm_80", 128, 32, 20 << 10, 28 / 64),
        # Turing reserves nothing: 64 KB / 16 KB = 4 blocks of 4 warps, of 32.
        ("sm_75", 128, 32, 16 << 10, 16 / 32),
        # One block that does not fit.
        ("sm_80", 1024, 128, 0, 0),
    ],
)
def test_occupancy(architecture, threads, registers, shared, resident):
    assert ARCHITECTURES[architecture].occupancy(threads, registers, shared) == pytest.approx(resident)


def test_an_h100_issues_10_instructions_while_memory_moves_a_byte():
    assert pytest.approx(132 * 128 * 1.98e9 / 3.35e12, rel=0.01) == INSTRUCTIONS_PER_BYTE
