"""What every source has to do, whatever its images are made of."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from models.data import Batch, DataSet, Source


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(x, other_x) and torch.equal(y, other_y)
        for (x, y), (other_x, other_y) in zip(left, right, strict=True)
    )


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def labels_of(batches: list[Batch]) -> list[int]:
    return [label for _, y in batches for label in y.tolist()]


@contextmanager
def global_generators_untouched() -> Iterator[None]:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    yield
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def check_format(data: DataSet) -> None:
    shape = (data.images.channels, data.images.size, data.images.size)
    for source in (data.train, data.validation, data.test):
        for x, y in (next(source.shuffled(4, 0)), next(source.ordered(4))):
            assert x.shape == (4, *shape)
            assert y.shape == (4,)
            assert x.dtype == torch.float32
            assert y.dtype == torch.int64
            assert 0 <= x.min() < x.max() <= 1
            assert 0 <= y.min() <= y.max() < data.images.classes


def check_shuffled(make: Callable[[int], Source], batch_size: int) -> None:
    """`make` returns the source for a seed; its size must be no multiple of the batch size."""
    with global_generators_untouched():
        source = make(0)
        epoch = list(source.shuffled(batch_size, 3))
        assert len(epoch) == source.batches(batch_size)
        assert [len(y) for _, y in epoch] == [batch_size] * (len(epoch) - 1) + [len(source) % batch_size]
        assert same(epoch, list(make(0).shuffled(batch_size, 3)))
        assert not same(epoch, list(source.shuffled(batch_size, 4)))
        assert not same(epoch, list(make(1).shuffled(batch_size, 3)))
        for start in (1, len(epoch) - 1, len(epoch)):
            assert same(epoch[start:], list(source.shuffled(batch_size, 3, start)))
        for world in (2, 3):
            check_ranks(source, batch_size, 3, epoch, world)


def check_ranks(source: Source, batch_size: int, number: int, epoch: list[Batch], world: int) -> None:
    for rank in range(world):
        expected = [(x[rank::world], y[rank::world]) for x, y in epoch]
        assert same(expected, list(source.shuffled(batch_size, number, rank=rank, world=world)))
        assert same(expected[1:], list(source.shuffled(batch_size, number, 1, rank=rank, world=world)))


def check_ordered(make: Callable[[int], Source]) -> None:
    with global_generators_untouched():
        source = make(0)
        x, y = source.tensors()
        assert len(x) == len(y) == len(source)
        for batch_size, count in ((3, None), (4, 7), (len(source), 1)):
            batches = list(make(1).ordered(batch_size, count))
            wanted = len(source) if count is None else count
            assert torch.equal(torch.cat([part for part, _ in batches]), x[:wanted])
            assert torch.equal(torch.cat([part for _, part in batches]), y[:wanted])
            assert all(len(part) == batch_size for part, _ in batches[:-1])
        assert torch.equal(source.tensors(5)[0], x[:5])


def check_arguments(source: Source) -> None:
    n = len(source)
    for call, message in (
        (lambda: source.shuffled(0, 0), "batch_size must be at least 1"),
        (lambda: source.shuffled(4, -1), "epoch must be at least 0"),
        (lambda: source.shuffled(n, 0, 2), r"start in 0\.\.1, got epoch=0 and start=2"),
        (lambda: source.shuffled(4, 0, -1), "start in"),
        (lambda: source.shuffled(4, 0, rank=2, world=2), "got rank=2 and world=2"),
        (lambda: source.ordered(0), "batch_size must be at least 1, got 0"),
        (lambda: source.ordered(4, n + 1), f"there are {n} images here, so count must be in 1..{n}, got {n + 1}"),
        (lambda: source.ordered(4, 0), "got 0"),
        (lambda: source.batches(0), "batch_size must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
