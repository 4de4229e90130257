"""Loading hidden behind compute."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from models.data.source import Batch


def ahead(batches: Generator[Batch, None, None], depth: int = 2) -> Iterator[Batch]:
    """Yield batches that a thread gets ready, `depth` of them ahead. An exception comes where its batch would have.

    Where there is a CUDA device the batches are in pinned memory, so that copying them there can be asynchronous too.
    """
    pin = torch.cuda.is_available()

    def get() -> Batch | None:
        batch = next(batches, None)
        return (batch[0].pin_memory(), batch[1].pin_memory()) if batch and pin else batch

    thread = ThreadPoolExecutor(1, "data")
    try:
        waiting = deque(thread.submit(get) for _ in range(depth))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(get))
            yield batch
    finally:
        thread.shutdown(cancel_futures=True)
        batches.close()
