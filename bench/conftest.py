"""Options and fixtures of the benchmarks."""

import ctypes
from collections.abc import Iterator

import pytest
import torch

THREADS = 2
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="three rounds each, to try the machinery: not a result")


@pytest.fixture(scope="session", autouse=True)
def steady_machine() -> Iterator[None]:
    """Compute with 2 threads, and let glibc keep freed memory: page faults would add the same noise to every call."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28), (_M_MMAP_THRESHOLD, 2**25)):
            mallopt(parameter, value)
    yield
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Add to the JSON what a result depends on."""
    from bench import machine

    torch.set_num_threads(THREADS)
    machine_info["kafops"] = machine.describe() | {"quick": config.getoption("--quick")}
