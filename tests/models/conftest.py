import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # models/ is run from a clone, not installed


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks here are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
