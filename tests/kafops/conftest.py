"""Fixtures of the tests of kafops."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Small inputs on one thread: more threads cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
