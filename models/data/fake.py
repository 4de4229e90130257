"""Made-up images in the format of a set, to try things out on where the set is not."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.data.loaders import Decoding
from models.images import ImageFormat
from models.support import seeds


@dataclass(frozen=True)
class FakeImages:
    """Images of which each is made when it is asked for, half noise and half a coarse pattern of its class."""

    images: ImageFormat

    def read(self, item: int) -> tuple[Tensor, int]:
        """Return image number `item`, uint8 [C, H, W], and its label; always the same."""
        label = item % self.images.classes
        shape = (self.images.channels, self.images.size, self.images.size)
        noise = torch.randint(128, shape, dtype=torch.uint8, generator=seeds.generator("cpu", "fake image", item))
        return noise + self._pattern(label), label

    def _pattern(self, label: int) -> Tensor:
        """Return 4 x 4 tiles of random colours."""
        generator = seeds.generator("cpu", "fake class", label)
        tiles = torch.randint(129, (self.images.channels, 4, 4), dtype=torch.uint8, generator=generator)
        tile = torch.arange(self.images.size) * 4 // self.images.size
        return tiles[:, tile][:, :, tile]

    def decoding(self) -> Decoding:
        """Return how workers get these images."""
        return Decoding(self.read, _same, _same, (self.images.channels, self.images.size, self.images.size))


def _same(image: Tensor) -> Tensor:
    return image
