"""The CUDA emulator on kernels that are right, and on kernels with one known fault each (faults.cpp)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emulator_build import compile_module, compiler, load, sanitizer_environment

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

ORDERS = ("forward", "reverse", "1", "2", "3")
SHUFFLED = ORDERS[2:]
SOURCE = Path(__file__).with_name("faults.cpp")
BLOCK = 256
GUARD = 1024  # elements on each side of y
SANITIZE = "KAFOPS_TEST_EMULATOR_SANITIZE"  # set in the process that repeats these tests under the sanitizers


@pytest.fixture(scope="session")
def sanitized_library():
    return compile_module("faults", [SOURCE], sanitize=True)


@pytest.fixture(scope="session")
def faults(request):
    if os.environ.get(SANITIZE):
        return load(request.getfixturevalue("sanitized_library"))
    return load(compile_module("faults", [SOURCE]))


@pytest.fixture(params=ORDERS)
def order(request, monkeypatch):
    monkeypatch.setenv("KAFOPS_EMULATOR_ORDER", request.param)
    return request.param


def guarded(size):
    """Memory full of a value that no kernel writes, and y, its middle."""
    memory = np.full(size + 2 * GUARD, -12345, np.float32)
    return memory, memory[GUARD : GUARD + size]


def run(faults, kernel, x=(), size=BLOCK, n=BLOCK, grid=(1, 1, 1), block=(BLOCK, 1, 1), shared=0):
    memory, y = guarded(size)
    faults.run(kernel, np.asarray(x, np.float32), y, n, grid, block, shared)
    assert np.all(memory[:GUARD] == -12345)
    assert np.all(memory[GUARD + size :] == -12345)
    return y


def integers(*shape):
    """Numbers whose sums and products are exact in float32, 0 not among them."""
    return np.random.default_rng(0).integers(1, 100, shape).astype(np.float32)


X = integers(BLOCK)


# Right kernels: the same in every order.


@pytest.mark.parametrize(
    ("kernel", "shared"), [("block_sum", 0), ("block_sum_double", 0), ("block_sum_dynamic", BLOCK * 8)]
)
def test_block_sum(faults, order, kernel, shared):
    x = integers(40, 999)
    y = run(faults, kernel, x, size=40, n=999, grid=(40, 1, 1), shared=shared)
    np.testing.assert_array_equal(y, x.sum(axis=1))


def test_tiled_transpose(faults, order):
    x = integers(57, 57)
    y = run(faults, "transpose", x, size=57 * 57, n=57, grid=(4, 4, 1), block=(16, 16, 1))
    np.testing.assert_array_equal(y.reshape(57, 57), x.T)


def test_indices(faults, order):
    grid, block = (3, 4, 2), (5, 7, 3)
    y = run(faults, "indices", size=24 * 105, grid=grid, block=block)
    expected = 1e6 * np.arange(24, dtype=np.float32)[:, None] + np.arange(105, dtype=np.float32)
    np.testing.assert_array_equal(y, expected.ravel())


@pytest.mark.parametrize("dtype", ["int", "unsigned", "int64", "uint64"])
def test_shuffles(faults, order, dtype):
    y = run(faults, f"shuffles_{dtype}", size=8 * 64, block=(64, 1, 1)).reshape(2, 32, 8)
    lane = np.arange(32)
    group, within = lane // 8 * 8, lane % 8
    expected = [
        np.full(32, 5),
        group + (lane + 1) % 8,
        np.where(lane < 3, lane, lane - 3),
        np.where(within < 3, lane, lane - 3),
        np.where(lane > 28, lane, lane + 3),
        np.where(within > 4, lane, lane + 3),
        lane ^ 6,
        np.where((lane ^ 9) > group + 7, lane, lane ^ 9),  # a group sees those before it, but none after it
    ]
    for warp in range(2):
        np.testing.assert_array_equal(y[warp], np.stack(expected, axis=1) + 32 * warp)


def test_shuffle_of_doubles_keeps_all_bits(faults, order):
    y = run(faults, "shuffles_double", size=64, block=(64, 1, 1))
    np.testing.assert_array_equal(y, np.arange(64) ^ 1)


@pytest.mark.parametrize(
    "positive", [np.arange(64) % 3 == 0, np.ones(64, bool), np.zeros(64, bool), np.arange(64) < 16]
)
def test_votes(faults, order, positive):
    y = run(faults, "votes", np.where(positive, 1, -1), size=7 * 64, block=(64, 1, 1)).reshape(4, 16, 7)
    for half, bits in zip(y, positive.reshape(4, 16), strict=True):
        ballot = sum(1 << lane for lane in range(16) if bits[lane])
        block = [positive.sum(), positive.any(), positive.all(), 1]
        np.testing.assert_array_equal(half, np.tile([ballot, bits.any(), bits.all(), *block], (16, 1)))


NEIGHBOUR = {
    "next": np.append(X[1:], X[-1]),
    "previous": np.append(X[0], X[:-1]),
    "mirrored": X[::-1],
    "write_again": 11 * X[::-1],
    "warp": X.reshape(-1, 2)[:, ::-1].ravel(),
}


@pytest.mark.parametrize("kernel", NEIGHBOUR)
def test_waiting_where_it_must(faults, order, kernel):
    np.testing.assert_array_equal(run(faults, kernel, X), NEIGHBOUR[kernel])


def test_orders_of_threads_and_blocks(faults, monkeypatch):
    def arrivals(name):
        monkeypatch.setenv("KAFOPS_EMULATOR_ORDER", name)
        y = run(faults, "arrivals", size=1 + 64 * 8, grid=(8, 1, 1), block=(64, 1, 1))[1:].reshape(8, 64)
        np.testing.assert_array_equal(y // 64, np.repeat(y[:, :1] // 64, 64, axis=1))  # one block after another
        return y[:, 0] // 64, y % 64

    in_order = np.arange(8), np.tile(np.arange(64), (8, 1))
    for got, expected in zip(arrivals("forward"), in_order, strict=True):
        np.testing.assert_array_equal(got, expected)
    for got, expected in zip(arrivals("reverse"), in_order, strict=True):
        np.testing.assert_array_equal(got, expected[..., ::-1])
    shuffled = [arrivals(seed) for seed in SHUFFLED]
    for blocks, threads in shuffled:
        np.testing.assert_array_equal(np.sort(blocks), in_order[0])
        np.testing.assert_array_equal(np.sort(threads), in_order[1])
    assert len({tuple(blocks) for blocks, _ in shuffled} | {tuple(range(8))}) == 4
    assert len({tuple(order) for _, threads in shuffled for order in threads}) == 3 * 8
    for first, again in zip(shuffled, [arrivals(seed) for seed in SHUFFLED], strict=True):
        np.testing.assert_array_equal(first[1], again[1])


# A missing barrier shows in the orders in which somebody reads what is not there yet, or no longer.

SHOWS = {
    "next_at_once": ("next", {"forward", *SHUFFLED}),
    "previous_at_once": ("previous", {"reverse", *SHUFFLED}),
    "mirrored_at_once": ("mirrored", set(ORDERS)),
    "write_again_at_once": ("write_again", set(ORDERS)),
    "warp_in_step": ("warp", set(ORDERS)),
}


@pytest.mark.parametrize("kernel", SHOWS)
def test_missing_barrier(faults, order, kernel):
    right, orders = SHOWS[kernel]
    wrong = run(faults, kernel, X) != NEIGHBOUR[right]
    assert wrong.any() == (order in orders)


@pytest.mark.parametrize("kernel", ["last_thread_wins", "last_block_wins"])
def test_result_that_depends_on_the_order(faults, monkeypatch, kernel):
    results = []
    for name in ORDERS:
        monkeypatch.setenv("KAFOPS_EMULATOR_ORDER", name)
        results.append(run(faults, kernel, np.arange(BLOCK), grid=(BLOCK, 1, 1))[0])
    assert results[:2] == [BLOCK - 1, 0]
    assert not set(results[2:]) & {0, BLOCK - 1}


# Shared memory that nobody wrote is NaN.


@pytest.mark.parametrize("kernel", ["unwritten_static", "unwritten_static_double", "unwritten_dynamic"])
def test_shared_memory_is_not_initialised(faults, order, kernel):
    run(faults, "mirrored", X)  # leaves its own shared memory written
    assert np.isnan(run(faults, kernel, shared=4 * BLOCK)).all()


def test_shared_memory_does_not_outlive_its_block(faults, order):
    y = run(faults, "written_by_one_block", X, size=3 * BLOCK, n=1, grid=(3, 1, 1), shared=4 * BLOCK).reshape(3, BLOCK)
    np.testing.assert_array_equal(y[1], 2 * X)
    assert np.isnan(y[[0, 2]]).all()


def test_shuffle_from_outside_of_the_mask(faults, order):
    y = run(faults, "lane_outside_mask", X)
    np.testing.assert_array_equal(y[:2], X[1:3])
    assert np.isnan(y[2])


# What is refused, with the place and the reason; and the next launch is none the worse for it.

REFUSED = {
    "barrier_after_exit": (
        100,
        "divergent: others exited",
        r"divergent __syncthreads\(\): 100 of 256 .* 156 have exited",
    ),
    "barrier_in_loop": (
        100,
        "divergent: other number of turns",
        r"divergent __syncthreads\(\): 156 of 256 .* 100 have exited",
    ),
    "barriers_of_branches": (100, "", r"divergent __syncthreads\(\): thread \(\d+, 0, 0\) waits in another, at "),
    "barrier_and_shuffle": (
        100,
        "divergent: others in a shuffle",
        r"divergent __syncthreads\(\): 100 .*, 28 wait for lanes of their warp",
    ),
    "exited_lane": (20, "names exited lanes", "the mask 0xffffffff names (exited lanes|lane .*, which exited)"),
    "mask_without_caller": (BLOCK, "lacks lane 4", "the mask 0xffffffef lacks the calling lane 4"),
    "masks_disagree": (BLOCK, "never meet", "deadlock: the lanes of the mask 0x[0-9a-f]{8} never meet"),
    "shuffles_of_branches": (BLOCK, "", r"lane \d+ of the mask 0xffffffff is in another call, at "),
    "width_of_twelve": (BLOCK, "no power of two", "the width of a shuffle is a power of two up to 32, got 12"),
    "throws": (100, None, "thrown by the kernel"),
}


def line_of(comment):
    lines = [i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if line.endswith(f"// {comment}")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("kernel", REFUSED)
def test_refused(faults, order, kernel):
    n, comment, reason = REFUSED[kernel]
    with pytest.raises(RuntimeError, match=reason) as refusal:
        run(faults, kernel, X, n=n, grid=(2, 1, 1))
    if comment is not None:
        block = "0" if order == "forward" else "1" if order == "reverse" else "[01]"
        place = line_of(comment) if comment else r"\d+"
        refusal.match(rf"^CUDA emulator: .*faults\.cpp:{place}: block \({block}, 0, 0\), thread \(\d+, 0, 0\): ")
    np.testing.assert_array_equal(run(faults, "mirrored", X), X[::-1])


def test_mask_of_a_block_smaller_than_a_warp(faults, order):
    with pytest.raises(RuntimeError, match="the mask 0xffffffff names lanes that the block does not have"):
        run(faults, "missing_lanes", X, block=(16, 1, 1))


@pytest.mark.parametrize(
    ("grid", "block", "shared", "reason"),
    [
        ((0, 1, 1), (32, 1, 1), 0, r"a grid has .*; got grid \(0, 1, 1\)"),
        ((1, 1, 0), (32, 1, 1), 0, "a grid has"),
        ((2**31, 1, 1), (32, 1, 1), 0, "a grid has"),
        ((1, 65536, 1), (32, 1, 1), 0, "a grid has"),
        ((1, 1, 65536), (32, 1, 1), 0, "a grid has"),
        ((1, 1, 1), (0, 1, 1), 0, r"a block has .*block \(0, 1, 1\)"),
        ((1, 1, 1), (1025, 1, 1), 0, "a block has"),
        ((1, 1, 1), (64, 32, 1), 0, "a block has"),
        ((1, 1, 1), (1, 1, 65), 0, "a block has"),
        ((1, 1, 1), (32, 1, 1), 232449, "at most 232448 bytes of shared memory; got .* 232449 bytes"),
    ],
)
def test_impossible_configuration(faults, grid, block, shared, reason):
    with pytest.raises(RuntimeError, match=f"invalid configuration: .*{reason}"):
        run(faults, "mirrored", X, grid=grid, block=block, shared=shared)


def test_largest_configurations(faults):
    run(faults, "indices", size=1024, block=(16, 1, 64), shared=49152)
    y = run(faults, "indices", size=65535, grid=(1, 65535, 1), block=(1, 1, 1))
    np.testing.assert_array_equal(y, np.float32(1e6) * np.arange(65535, dtype=np.float32))


@pytest.mark.parametrize("name", ["backward", "-1", "1.5", "9" * 40])
def test_unknown_order(faults, monkeypatch, name):
    monkeypatch.setenv("KAFOPS_EMULATOR_ORDER", name)
    with pytest.raises(RuntimeError, match="KAFOPS_EMULATOR_ORDER is forward, reverse or a seed, got "):
        run(faults, "mirrored", X)


# Bounds: seen by guard bands, and by the sanitizers, who name the line.


@pytest.mark.parametrize(("kernel", "where"), [("write_past_end", GUARD + 300), ("write_before_start", GUARD - 1)])
def test_guard_bands_of_global_memory(faults, order, kernel, where):
    memory, y = guarded(300)
    faults.run(kernel, X, y, 300, (2, 1, 1), (BLOCK, 1, 1), 0)
    assert memory[where] == X[0]


def test_guard_band_of_dynamic_shared_memory(faults, order):
    assert run(faults, "past_dynamic", X, n=BLOCK, shared=4 * BLOCK)[0] == -12345
    with pytest.raises(RuntimeError, match=r"block \(0, 0, 0\) wrote byte 1020 of 1020 bytes of dynamic shared memory"):
        run(faults, "past_dynamic", X, n=BLOCK, shared=4 * BLOCK - 4)


def in_sanitized_process(*arguments, **environment):
    try:
        merged = sanitizer_environment() | environment
    except RuntimeError as missing:
        pytest.skip(str(missing))
    return subprocess.run([sys.executable, *arguments], env=merged, capture_output=True, text=True)


SANITIZED = {
    "write_past_end": ("heap-buffer-overflow", "past the end of y"),
    "write_before_start": ("heap-buffer-overflow", "before the start of y"),
    "read_past_end": ("heap-buffer-overflow", "past the end of x"),
    "past_dynamic": ("heap-buffer-overflow", "past the end of dynamic shared memory"),
    "past_static": ("index 256 out of bounds for type 'float [256]'", "past the end of static shared memory"),
    "misaligned": ("misaligned address", "not at a multiple of 16 bytes"),
}


@pytest.mark.parametrize("kernel", SANITIZED)
def test_sanitizers_name_the_line(sanitized_library, kernel):
    if os.environ.get(SANITIZE):
        pytest.skip("in the process that repeats the tests")
    fault, comment = SANITIZED[kernel]
    script = f"""
import faults, numpy
x, y = (numpy.ones(300, numpy.float32) for _ in "xy")
faults.run({kernel!r}, x, y, 300, (2, 1, 1), (300, 1, 1), 4 * 299)
"""
    done = in_sanitized_process("-c", script, PYTHONPATH=str(sanitized_library.parent))
    assert done.returncode != 0
    assert fault in done.stderr
    assert f"faults.cpp:{line_of(comment)}" in done.stderr


def test_sanitizers_find_nothing_else(sanitized_library):
    if os.environ.get(SANITIZE):
        pytest.skip("in the process that repeats the tests")
    options = ("-q", "-p", "no:cacheprovider", "-k", "not guard and not sanitizers")
    done = in_sanitized_process("-m", "pytest", *options, __file__, **{SANITIZE: "1"})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]


# The approximate instructions err as much as documented, and no more.

SPECIAL = np.array([-np.inf, -1e-38, -0.0, 0.0, 1e-38, np.inf, np.nan], np.float32)


def ulps(got, wanted):
    """Difference in units of the last place that float32 has at the value wanted."""
    return (got - wanted) / np.exp2(np.frexp(wanted)[1] - 24.0)


def inputs(count=1_000_000):
    rng = np.random.default_rng(0)
    return np.concatenate([rng.uniform(-126, 127.9, count), rng.uniform(-2, 2, count), np.arange(-126, 128)]).astype(
        np.float32
    )


def test_ex2_approx(faults):
    x = inputs()
    exact = np.exp2(x.astype(np.float64))
    got = faults.ex2_approx(x)
    relative = got / exact - 1
    assert 2**-22 / 10 < np.abs(relative).max() <= 2**-22
    assert np.abs(ulps(got, exact.astype(np.float32).astype(np.float64))).max() == 2
    assert abs(ulps(got, exact).mean()) < 0.01
    np.testing.assert_array_equal(got, faults.ex2_approx(x))
    np.testing.assert_array_equal(faults.ex2_approx(SPECIAL), np.float32([0, 1, 1, 1, 1, np.inf, np.nan]))
    assert not np.signbit(faults.ex2_approx(SPECIAL)[:6]).any()
    edges = np.float32([-126, np.nextafter(np.float32(-126), np.float32(-127)), -149, -150, 128])
    np.testing.assert_array_equal(faults.ex2_approx(edges)[1:], np.float32([0, 0, 0, np.inf]))
    assert 1 <= faults.ex2_approx(edges)[0] / 2**-126 <= 1 + 2**-22


def test_rcp_approx(faults):
    rng = np.random.default_rng(1)
    bits = rng.integers(0x00800000, 0x7E800000, 1_000_000).astype(np.int32)  # normal, and 1/x too
    x = np.concatenate([bits.view(np.float32), -bits.view(np.float32), inputs(1000)])
    x = x[x != 0]
    exact = 1 / x.astype(np.float64)
    got = faults.rcp_approx(x)
    assert 0.1 < np.abs(ulps(got, exact)).max() <= 1
    assert np.abs(ulps(got, exact.astype(np.float32).astype(np.float64))).max() == 1
    assert abs(ulps(got, exact).mean()) < 0.01
    got = faults.rcp_approx(SPECIAL)
    np.testing.assert_array_equal(got, np.float32([0, -np.inf, -np.inf, np.inf, np.inf, 0, np.nan]))
    np.testing.assert_array_equal(np.signbit(got[:6]), np.signbit(SPECIAL[:6]))
    large = np.float32([2**126, -(2**126), 1.5 * 2**126, -1.5 * 2**126])
    got = faults.rcp_approx(large)
    np.testing.assert_array_equal(got[2:], np.float32([0, 0]))
    assert np.signbit(got[3])
    np.testing.assert_allclose(got[:2], np.float32([2**-126, -(2**-126)]), rtol=2**-23)
