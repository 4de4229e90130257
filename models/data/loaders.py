"""Sources whose images are read and decoded by worker processes."""

import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from models.data.ahead import ahead
from models.data.indexed import IndexedSource
from models.data.source import Batch, DataError
from models.support import seeds


@dataclass(frozen=True)
class Task:
    """An image to get: what `Decoding.read` takes, and the seed of its augmentation, or None for none."""

    item: Any
    seed: int | None


@dataclass(frozen=True)
class Broken:
    """Why an image cannot be had. An error's message would gain a traceback on its way from a worker."""

    message: str


@dataclass(frozen=True)
class Decoding:
    """How workers get an image: a map-style data set whose keys are tasks. It is sent to each worker, so small is good.

    Args:
        read: item → (image, label), or raises a DataError that names the file.
        augment, plain: image → uint8 tensor of `shape`; `augment` may draw from torch's global generator.
        shape: (C, H, W).
    """

    read: Callable[[Any], tuple[Any, int]]
    augment: Callable[[Any], Tensor]
    plain: Callable[[Any], Tensor]
    shape: tuple[int, int, int]

    def __getitem__(self, task: Task) -> tuple[Tensor, int] | Broken:
        try:
            image, label = self.read(task.item)
        except DataError as error:
            return Broken(str(error))
        if task.seed is None:
            return self.plain(image), label
        with _seeded(task.seed):
            return self.augment(image), label


class Workers:
    """Processes that decode images, kept from epoch to epoch.

    They come from a fork server, since a process that has threads, or runs NCCL or gloo, cannot be forked safely.
    What they yield does not depend on how many there are. A script that has any needs the usual guard
    `if __name__ == "__main__":`, since each of them imports it.

    Args:
        decoding: what they do.
        count: at most so many processes, and not more than there are cores; 0 decodes in this process.
    """

    def __init__(self, decoding: Decoding, count: int) -> None:
        self.decoding, self.count = decoding, min(count, len(os.sched_getaffinity(0)))
        self._idle: list[DataLoader[Any]] = []

    def batches(self, plan: Iterator[list[Task]]) -> Iterator[Batch]:
        """Yield the batch of each list of tasks; the plan itself is made in a thread if there are processes.

        Raises:
            DataError: an image cannot be read.
        """
        return ahead(self._batches(plan)) if self.count else self._batches(plan)

    def _batches(self, plan: Iterator[list[Task]]) -> Generator[Batch, None, None]:
        # One iteration at a time for each loader; a second one at the same time gets processes of its own.
        loader = self._idle.pop() if self._idle else self._new_loader()
        try:
            loader.batch_sampler.batches = plan  # type: ignore
            for batch in loader:
                if isinstance(batch, Broken):
                    raise DataError(batch.message)
                yield batch
        finally:
            self._idle.append(loader)

    def _new_loader(self) -> DataLoader[Any]:
        processes: dict[str, Any] = {}
        if self.count:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["torchvision"])  # else each worker takes seconds to import it
            processes = {
                "num_workers": self.count,
                "persistent_workers": True,
                "multiprocessing_context": context,
                "worker_init_fn": _ignore_interrupts,
            }
        return DataLoader(
            self.decoding,  # type: ignore[arg-type]
            batch_sampler=_Plan(),
            collate_fn=functools.partial(_collate, shape=self.decoding.shape),
            generator=torch.Generator(),  # else each iteration would draw from the global one
            **processes,
        )


class LoaderSource(IndexedSource):
    """Numbered images that workers get.

    Args:
        workers: whose `read` takes the members of `items`.
        items: [N], int64.
        labels: [N], int64.
        seed: of order and augmentation.
    """

    def __init__(self, workers: Workers, items: Tensor, labels: Tensor, seed: int) -> None:
        super().__init__(labels, seed)
        self.workers, self.items = workers, items

    def _load(self, batches: Iterable[Tensor], epoch: int | None) -> Iterator[Batch]:
        return self.workers.batches(self._tasks(chosen, epoch) for chosen in batches)

    def _tasks(self, chosen: Tensor, epoch: int | None) -> list[Task]:
        items = self.items[chosen].tolist()
        if epoch is None:
            return [Task(item, None) for item in items]
        return [Task(item, seeds.derived("augmentation", self.seed, epoch, item)) for item in items]


class _Plan:
    """A batch sampler whose batches are set anew for each iteration."""

    batches: Iterator[list[Task]] = iter(())

    def __iter__(self) -> Iterator[list[Task]]:
        return self.batches


def _collate(samples: list[tuple[Tensor, int] | Broken], shape: tuple[int, int, int]) -> Batch | Broken:
    images = torch.empty(len(samples), *shape, dtype=torch.uint8)
    labels = torch.empty(len(samples), dtype=torch.int64)
    for i, sample in enumerate(samples):
        if isinstance(sample, Broken):
            return sample
        image, labels[i] = sample
        if image.shape != shape or image.dtype != torch.uint8:
            raise ValueError(f"a decoded image must be uint8 {shape}, got {image.dtype} {tuple(image.shape)}")
        images[i] = image
    return images / 255, labels


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global CPU generator, from which torchvision draws, and give it back its state."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the main one decides what happens, and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
