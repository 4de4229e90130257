"""Sources whose images are in memory."""

from collections.abc import Callable, Generator, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from models.data.ahead import ahead
from models.data.augmentation import CropAndFlip
from models.data.indexed import IndexedSource
from models.data.source import Batch
from models.support import seeds


class TensorSource(IndexedSource):
    """Images in memory.

    The next batches are made while the last one is worked on, by NumPy in one thread: that costs less than torch's
    threads for so little work, and leaves the cores to the network.

    Args:
        images: [N, C, H, W], uint8 in 0..255 or float32 in [0, 1]; kept as they are.
        labels: [N], int64.
        seed: of order and augmentation.
        augmentation: of shuffled batches; None for none.

    Raises:
        ValueError: shapes or types are other ones.
    """

    def __init__(self, images: Tensor, labels: Tensor, seed: int, augmentation: CropAndFlip | None = None) -> None:
        super().__init__(labels, seed)
        if images.ndim != 4 or images.dtype not in (torch.uint8, torch.float32):
            raise ValueError(
                f"images must be uint8 or float32 [N, C, H, W], got {images.dtype} of shape {list(images.shape)}"
            )
        if labels.shape != (len(images),) or labels.dtype != torch.int64:
            raise ValueError(
                f"{len(images)} images need int64 labels of shape [{len(images)}], got {labels.dtype} of shape "
                f"{list(labels.shape)}"
            )
        if len(labels) and labels.min() < 0:
            raise ValueError(f"labels must not be negative, got {labels.min().item()}")
        self.images, self.augmentation = images, augmentation

    def _load(self, batches: Iterable[Tensor], epoch: int | None) -> Iterator[Batch]:
        return ahead(self._batches(batches, epoch))

    def _batches(self, batches: Iterable[Tensor], epoch: int | None) -> Generator[Batch, None, None]:
        augment = self._augmentation(epoch)
        for chosen in batches:
            images = augment(self.images.numpy()[chosen.numpy()], chosen)
            yield torch.from_numpy(as_floats(images)), self.labels[chosen]

    def _augmentation(self, epoch: int | None) -> Callable[[np.ndarray, Tensor], np.ndarray]:
        """Return what is done to chosen images in an epoch."""
        if self.augmentation is None or epoch is None:
            return lambda images, chosen: images
        augmentation = self.augmentation
        moves = augmentation.draw(len(self), seeds.generator("cpu", "augmentation", self.seed, epoch))
        return lambda images, chosen: augmentation(images, moves[chosen])


def as_floats(images: np.ndarray) -> np.ndarray:
    """Return uint8 images in 0..255 as float32 in [0, 1]; float32 ones as they are."""
    return images / np.float32(255) if images.dtype == np.uint8 else images
