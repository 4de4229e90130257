"""Random starts that do not depend on how many processes share a batch."""

import torch
from torch import Tensor


class Noise:
    """Draws for a whole batch and returns this process's share, every `world`-th image from `rank` on.

    Args:
        generator: on the device of the images.
        images: in the whole batch; None means that the share is the batch.
    """

    def __init__(self, generator: torch.Generator, images: int | None = None, rank: int = 0, world: int = 1) -> None:
        self.generator, self.images, self.rank, self.world = generator, images, rank, world

    def around(self, x: Tensor, half_width: float) -> Tensor:
        """Return x + U(−half_width, half_width), kept in [0, 1]."""
        if half_width == 0:
            return x.detach().clone()
        whole = self._empty(x).uniform_(-half_width, half_width, generator=self.generator)
        return (x.detach() + self._share(whole)).clamp(0, 1)

    def normal(self, x: Tensor, std: float) -> Tensor:
        """Return normal noise of the shape of x."""
        return self._share(self._empty(x).normal_(0, std, generator=self.generator))

    def _empty(self, x: Tensor) -> Tensor:
        return x.new_empty(len(x) if self.images is None else self.images, *x.shape[1:])

    def _share(self, whole: Tensor) -> Tensor:
        return whole[self.rank :: self.world]
