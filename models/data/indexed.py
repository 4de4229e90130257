"""Sources whose images have numbers, so that any order of them can be had."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property

from torch import Tensor

from models.data.orders import epoch_order, stratified_order
from models.data.source import Batch, Source, check_ordered, check_shuffled


class IndexedSource(Source):
    """Images 0 .. N-1, of which a subclass makes batches.

    Args:
        labels: [N], int64.
        seed: of order and augmentation.
    """

    def __init__(self, labels: Tensor, seed: int) -> None:
        self.labels, self.seed = labels, seed

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fixed_order(self) -> Tensor:
        """The order of `ordered`, [N]: stratified, and the same for every seed."""
        return stratified_order(self.labels, 0)

    def shuffled(
        self, batch_size: int, epoch: int, start: int = 0, *, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """See `Source.shuffled`; the augmentation of an image depends on (seed, epoch, image) only."""
        check_shuffled(self, batch_size, epoch, start, rank, world)
        batches = epoch_order(len(self), self.seed, epoch).split(batch_size)[start:]
        return self._load((chosen[rank::world] for chosen in batches), epoch)

    def ordered(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        """See `Source.ordered`; the order is stratified."""
        count = check_ordered(self, batch_size, count)
        return self._load(self.fixed_order[:count].split(batch_size), None)

    @abstractmethod
    def _load(self, batches: Iterable[Tensor], epoch: int | None) -> Iterator[Batch]:
        """Yield the images whose numbers each of `batches` lists, augmented for an epoch, or as they are for None."""
