"""Images in shards: tar files of the WebDataset format, read from front to back.

A stream cannot be put into any order, so an epoch is defined by lanes. The shards, in an order drawn for the epoch, are
dealt to `lanes` lanes; each reads its own one after the other, through a buffer from which it yields images at random,
and starts again when they are used up. Image i of the epoch is the next one of lane i mod lanes. So

- which image comes when does not depend on the number of processes, nor on where a run resumes;
- all processes get the same number of batches, however unequal the shards are. Lanes with fewer images than others
  repeat some; with a number of lanes that divides that of equal shards, every image comes once per epoch;
- if the number of processes divides that of lanes and the batch size, each process reads only its own lanes.

To resume in the middle of an epoch, what came before is read but not decoded.
"""

import os
import random
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from models.data import pictures, places
from models.data.loaders import Task, Workers
from models.data.packages import need
from models.data.source import Batch, DataError, Source, check_ordered, check_shuffled
from models.support import seeds

_IMAGES = ("jpg", "jpeg", "png")
_DOTS = "; a name is KEY.jpg or KEY.cls, and its first dot ends the key"


@dataclass(frozen=True)
class Record:
    """An undecoded image, and which it is."""

    name: str
    content: bytes
    label: int


class ShardSource(Source):
    """The images of shards.

    Args:
        shards: their paths.
        workers: whose `read` takes records.
        classes: labels are 0 .. classes - 1.
        seed: of order and augmentation.
        images: images of an epoch; None for those there are, which takes looking through all shards.
        lanes: at most so many shards are read at a time.
        buffer: images of a lane among which the next one is drawn.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        workers: Workers,
        classes: int,
        seed: int,
        images: int | None = None,
        lanes: int = 16,
        buffer: int = 256,
    ) -> None:
        self.shards, self.workers, self.classes, self.seed = list(shards), workers, classes, seed
        self.lanes, self.buffer = min(lanes, len(shards)), buffer
        self._images = images

    def __len__(self) -> int:
        return self._images if self._images is not None else self.count

    @cached_property
    def count(self) -> int:
        """Number of images in the shards."""
        return sum(map(_count, self.shards))

    def shuffled(
        self, batch_size: int, epoch: int, start: int = 0, *, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """See `Source.shuffled`, and this module for what an epoch is."""
        check_shuffled(self, batch_size, epoch, start, rank, world)
        return self.workers.batches(self._plan(batch_size, epoch, start, rank, world))

    def ordered(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        """See `Source.ordered`; the order takes an image of each lane in turn, and knows nothing of classes."""
        count = check_ordered(self, batch_size, count)
        lanes = [self._read(self.shards[lane :: self.lanes]) for lane in range(self.lanes)]
        return self.workers.batches(self._ordered_plan(_in_turn(lanes), batch_size, count))

    def _plan(self, batch_size: int, epoch: int, start: int, rank: int, world: int) -> Iterator[list[Task]]:
        lanes = self._shuffled_lanes(epoch)
        for first in range(start * batch_size, len(self), batch_size):
            numbers = range(first, min(first + batch_size, len(self)))[rank::world]
            yield [
                Task(lanes[i % self.lanes].at(i // self.lanes), seeds.derived("augmentation", self.seed, epoch, i))
                for i in numbers
            ]

    def _ordered_plan(self, records: Iterator[Record], batch_size: int, count: int) -> Iterator[list[Task]]:
        for first in range(0, count, batch_size):
            wanted = min(batch_size, count - first)
            tasks = [Task(record, None) for record in islice(records, wanted)]
            if len(tasks) < wanted:
                raise DataError(f"{count} images were wanted of {_few(self.shards)}, which hold {first + len(tasks)}")
            yield tasks

    def _shuffled_lanes(self, epoch: int) -> list["_Lane"]:
        order = list(self.shards)
        random.Random(seeds.derived("shards", self.seed, epoch)).shuffle(order)
        return [
            _Lane(self._endless(order[lane :: self.lanes], seeds.derived("buffer", self.seed, epoch, lane)))
            for lane in range(self.lanes)
        ]

    def _endless(self, shards: Sequence[Path], seed: int) -> Iterator[Record]:
        """Yield the images of some shards again and again, shuffled within the buffer."""
        shuffle = need("webdataset", "webdataset", "webdataset").shuffle(
            self.buffer, initial=self.buffer, rng=random.Random(seed)
        )
        while True:
            empty = True
            for record in shuffle(self._read(shards)):
                empty = False
                yield record
            if empty:
                raise DataError(f"{_few(shards)} hold no images")

    def _read(self, shards: Sequence[Path]) -> Iterator[Record]:
        """Yield the images of some shards, once."""
        tar = need("webdataset.tariterators", "webdataset", "webdataset")
        for shard in shards:
            with _naming(shard), shard.open("rb") as file:
                _check_end(shard, file)
                entries = tar.tar_file_expander(iter([{"url": str(shard), "stream": file}]))
                for sample in tar.group_by_keys(entries):
                    yield self._record(sample, shard)

    def _record(self, sample: dict[str, Any], shard: Path) -> Record:
        name = f"{sample['__key__']} in {shard}"
        content = next((sample[suffix] for suffix in _IMAGES if suffix in sample), None)
        if content is None or "cls" not in sample:
            there = ", .".join(suffix for suffix in sample if not suffix.startswith("__"))
            raise DataError(f"{name} must have a .cls and one of .{', .'.join(_IMAGES)}, got .{there}{_DOTS}")
        try:
            label = int(sample["cls"])
        except ValueError:
            label = -1
        if not 0 <= label < self.classes:
            raise DataError(
                f"{name} must have a label from 0 to {self.classes - 1} in its .cls, got {sample['cls'][:20]!r}"
            )
        return Record(name, content, label)


def find(root: Path | None, option: str, pattern: str) -> list[Path]:
    """Return the shards that a pattern such as train-{000..146}.tar names.

    Raises:
        DataError: webdataset is not installed, the pattern is none, or a shard is missing.
    """
    need("webdataset", "webdataset", "webdataset")
    if not pattern:
        raise DataError(f"webdataset needs the option {option}, such as webdataset:{option}={option}-{{000..146}}.tar")
    try:
        names = list(need("braceexpand", "braceexpand", "webdataset").braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"{option} must be a pattern such as {option}-{{000..146}}.tar, got {pattern}") from error
    how = "Shards are tar files with KEY.jpg, .jpeg or .png and KEY.cls, as webdataset's ShardWriter makes them"
    first = places.find(f"{option} of webdataset", root, names[:1], how)
    folder = next(folder for folder in places.folders(root) if folder / names[0] == first)
    shards = [(folder / name).absolute() for name in names]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise DataError(f"{len(missing)} of {len(shards)} shards of {pattern} are missing, such as {missing[0]}")
    return shards


def read_record(record: Record) -> tuple[Image.Image, int]:
    """Return the image and its label."""
    return pictures.decode(record.content, record.name), record.label


class _Lane:
    """Records that can be skipped."""

    def __init__(self, records: Iterator[Record]) -> None:
        self._records, self._taken = records, 0

    def at(self, number: int) -> Record:
        """Return record `number`; numbers have to ascend from call to call."""
        record = next(islice(self._records, number - self._taken, None))
        self._taken = number + 1
        return record


def _in_turn(iterators: list[Iterator[Record]]) -> Iterator[Record]:
    """Yield one of each, again and again, until all are used up."""
    while iterators:
        left = []
        for iterator in iterators:
            for record in islice(iterator, 1):
                left.append(iterator)
                yield record
        iterators = left


def _count(shard: Path) -> int:
    """Return the number of labels in a shard, which takes looking at its headers only."""
    with _naming(shard), shard.open("rb") as file:
        _check_end(shard, file)
        with tarfile.open(fileobj=file) as entries:
            names = [entry.name for entry in entries]
    labels = sum(Path(name).name.lower().partition(".")[2] == "cls" for name in names)
    if labels == 0:
        there = f"it has {names[0]}{_DOTS}" if names else "it is empty"
        raise DataError(f"{shard} holds no images with labels: {there}")
    return labels


def _check_end(shard: Path, file: BinaryIO) -> None:
    """Raise a DataError for a file that is cut off; between two entries this would go unnoticed."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 1024))
    end = file.read()
    file.seek(0)
    if shard.suffix == ".tar" and (len(end) < 1024 or any(end)):
        raise DataError(f"{shard} is cut off: a tar file ends with 1,024 bytes of zeros")


@contextmanager
def _naming(shard: Path) -> Iterator[None]:
    """Turn errors into DataErrors that name the shard."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # of which webdataset extends the arguments, but not the first
        what = getattr(error, "strerror", None) or next(iter(error.args), "")
        raise DataError(f"{shard} cannot be read as a tar file: {type(error).__name__}: {what}") from error


def _few(shards: Sequence[Path]) -> str:
    return str(shards[0]) + (f" and {len(shards) - 1} more" if len(shards) > 1 else "")
