"""What a data set is to those who train and evaluate: three sources of batches."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.images import ImageFormat
from models.support.errors import UserError

Batch = tuple[Tensor, Tensor]  # images [B, C, H, W], float32 in [0, 1], and labels [B], int64


class DataError(UserError):
    """A data set that cannot be had, with what to do about it."""


class Source(Protocol):
    """Images with labels, to be had in shuffled and augmented batches or in a fixed order.

    Nothing here changes the state of torch's, NumPy's or Python's global generators.
    """

    def __len__(self) -> int:
        """Return the number of images of an epoch."""
        raise NotImplementedError

    def shuffled(
        self, batch_size: int, epoch: int, start: int = 0, *, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch, from number `start` on; the last may be smaller.

        Order and augmentation are functions of (seed, epoch, batch_size), whatever `start`, `rank`, `world` and the
        number of workers. With `world` processes, each gets image `rank` of every batch and every `world`-th after it:
        as many batches as the others, and in the last, perhaps smaller one it may be fewer images, or none.

        Raises:
            ValueError: there is no such batch, epoch or rank.
            DataError: an image cannot be read.
        """
        raise NotImplementedError

    def ordered(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        """Yield the first `count` images, or all, in an order that never changes, without augmentation.

        Where the labels are known beforehand, every stretch of it holds the classes in their overall proportions.

        Raises:
            ValueError: more images are asked for than there are, or none.
            DataError: an image cannot be read.
        """
        raise NotImplementedError

    def batches(self, batch_size: int) -> int:
        """Return the number of batches of an epoch."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        return math.ceil(len(self) / batch_size)

    def tensors(self, count: int | None = None) -> Batch:
        """Return what `ordered` yields, as two tensors."""
        images, labels = zip(*self.ordered(256, count), strict=True)
        return torch.cat(images), torch.cat(labels)


@dataclass(frozen=True)
class DataSet:
    """Images of one format in three sources that share no image.

    `train` is what weights are fitted to, `validation` what decides during training (which epoch is best, whether it
    collapsed), `test` what results are reported on. Validation images are cut from the training images.
    """

    name: str
    images: ImageFormat
    train: Source
    validation: Source
    test: Source


def check_shuffled(source: Source, batch_size: int, epoch: int, start: int, rank: int, world: int) -> None:
    """Raise a ValueError for arguments of `Source.shuffled` that make no sense."""
    batches = source.batches(batch_size)
    if epoch < 0 or not 0 <= start <= batches:
        raise ValueError(f"epoch must be at least 0 and start in 0..{batches}, got epoch={epoch} and start={start}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be at least 0 and below world, got rank={rank} and world={world}")


def check_ordered(source: Source, batch_size: int, count: int | None) -> int:
    """Return how many images `Source.ordered` is to yield, or raise a ValueError."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if count is not None and not 1 <= count <= len(source):
        raise ValueError(f"there are {len(source)} images here, so count must be in 1..{len(source)}, got {count}")
    return len(source) if count is None else count
