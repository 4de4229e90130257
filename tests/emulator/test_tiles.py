"""How the CUDA kernels divide memory among blocks, run by the emulator, and what tables take of it."""

from pathlib import Path

import pytest
from emulator_build import compile_module, compiler, load

from bench import gpu_gates

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="session")
def tiles():
    return load(compile_module("tiles", [Path(__file__).with_name("tiles.cpp")]))


@pytest.mark.parametrize("columns_at_once", [1, 2, 8, 32])
@pytest.mark.parametrize("columns", [1, 3, 8, 31, 32, 33, 100])
def test_a_block_computes_its_own_columns(tiles, columns, columns_at_once):
    masks = tiles.active_columns(columns, columns_at_once)
    left = range(columns, 0, -columns_at_once)
    assert masks == [2 ** min(n, columns_at_once) - 1 for n in left]


def test_the_gates_take_as_much_shared_memory_as_the_launches(tiles):
    assert tiles.table_bytes(20, False) == gpu_gates.ROOM
    assert tiles.table_bytes(20, True) == gpu_gates.ANSWERS
