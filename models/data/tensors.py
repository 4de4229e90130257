"""Sources whose images are in memory."""

from collections.abc import Iterator
from functools import cached_property

from torch import Tensor

from models.data.orders import epoch_order, stratified_order
from models.data.source import Batch, Source, check_ordered, check_shuffled


class TensorSource(Source):
    """Images in memory.

    Args:
        images: [N, C, H, W], uint8 in 0..255 or float32 in [0, 1]; kept as they are.
        labels: [N], int64.
        seed: of the order of images.
    """

    def __init__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        self.images, self.labels, self.seed = images, labels, seed

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def fixed_order(self) -> Tensor:
        """The order of `ordered`, the same for every seed."""
        return stratified_order(self.labels, 0)

    def shuffled(
        self, batch_size: int, epoch: int, start: int = 0, *, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """See `Source.shuffled`."""
        check_shuffled(self, batch_size, epoch, start, rank, world)
        batches = epoch_order(len(self), self.seed, epoch).split(batch_size)
        return (self._batch(chosen[rank::world]) for chosen in batches[start:])

    def ordered(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        """See `Source.ordered`."""
        count = check_ordered(self, batch_size, count)
        return (self._batch(chosen) for chosen in self.fixed_order[:count].split(batch_size))

    def _batch(self, chosen: Tensor) -> Batch:
        images = self.images[chosen]
        return (images if images.is_floating_point() else images.float() / 255), self.labels[chosen]
