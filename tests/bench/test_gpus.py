import pytest

from bench import gpus
from bench.gpus import ARCHITECTURES, Gpu
from bench.roofline import predict
from bench.sass import Cost


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


# 10 SMs at 1 GHz, 1 TB/s.
GPU = Gpu("toy", ARCHITECTURES["sm_80"], sms=10, clock=1e9, bandwidth=1e12, sources="")


def cost(**pipes):
    return Cost(pipes=dict.fromkeys(Cost().pipes, 0.0) | pipes)


def test_each_limit():
    work = cost(fma=40, alu=8, mufu=3, convert=1, fp64=2, shared=10)
    work.words, work.packed = 12, 10
    prediction = predict(work, moved=8, gpu=GPU)
    assert prediction.seconds == pytest.approx(
        {
            "memory": 8 / 1e12,
            "issue": 64 / 128 / 1e10,
            "FMA": 50 / 64 / 1e10,  # a packed instruction takes the pipe twice
            "ALU": 8 / 64 / 1e10,
            "XU": 4 / 16 / 1e10,
            "FP64": 2 / 32 / 1e10,
            "L1": 12 / 32 / 1e10,
        }
    )
    assert prediction.bound == "FMA"
    assert prediction.ratio == pytest.approx(50 / 64 * 100 / 8)


def test_within_the_memory_bound_time():
    prediction = predict(cost(fma=2), moved=8, gpu=GPU)
    assert (prediction.bound, prediction.ratio) == ("memory", 1)


def test_an_h100_issues_80_instructions_while_memory_moves_8_bytes():
    h100 = next(gpu for gpu in gpus.GPUS if gpu.name == "H100 SXM")
    assert predict(cost(alu=0, other=79), 8, h100).ratio == 1
    assert predict(cost(alu=0, other=88), 8, h100).ratio == pytest.approx(88 / 128 / 132 / 1.98e9 * 3.35e12 / 8)
    assert predict(cost(mufu=12), 8, h100).bound == "XU"


def test_every_source_is_listed():
    for gpu in gpus.GPUS:
        assert f"\n    {gpu.sources}  " in gpus.__doc__
