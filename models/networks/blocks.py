"""What several networks are made of."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.images import ImageFormat


class Normalise(nn.Module):
    """(x - mean) / std per channel, so that attacks and data stay in [0, 1]."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images [N, C, H, W].

        Raises:
            ValueError: x has another number of channels, which would broadcast, or another rank.
        """
        if x.dim() != 4 or x.shape[1] != len(self.mean):
            raise ValueError(f"wanted images [N, {len(self.mean)}, H, W], got shape {list(x.shape)}")
        return (x - self.mean) / self.std


class Entry(nn.Sequential):
    """What comes before the first layer: images [N, C, S, S] in [0, 1] -> [N, channels, size, size], normalised.

    With a `patch` p above 1 every p × p pixels become one position of p² C channels, so that the network works on maps
    of 1/p² of the positions and still sees every pixel: a cheap network for studies on CPUs.

    Args:
        images: of the network.
        patch: p, a divisor of the size.
        halvings: how often the network halves the map.

    Raises:
        ValueError: the patch does not divide the size, or the network halves the map more often than it can.
    """

    def __init__(self, images: ImageFormat, patch: int, halvings: int) -> None:
        super().__init__(Normalise(images.mean, images.std))
        if patch < 1 or images.size % patch:
            divisors = ", ".join(str(p) for p in range(1, images.size) if images.size % p == 0)
            raise ValueError(f"patch must divide the images' size {images.size}, as {divisors} do, got {patch}")
        self.channels, self.size = images.channels * patch**2, images.size // patch
        if self.size < 2**halvings:
            raise ValueError(
                f"images of {images.size} × {images.size} pixels are too small for a network with patch={patch} that "
                f"halves its maps {halvings} times, which takes {patch * 2**halvings} × {patch * 2**halvings} or more; "
                f"take {'a smaller patch' if patch > 1 else 'a network that halves less often'}"
            )
        if patch > 1:
            self.append(nn.PixelUnshuffle(patch))


def conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    """Return a convolution without bias that keeps the size, or divides it by the stride, rounding up."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def one_of(option: str, value: str, choices: Sequence[str]) -> str:
    """Return the value of an option, or raise a ValueError that names what there is."""
    if value not in choices:
        raise ValueError(f"{option} must be {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}")
    return value


def at_least_one(option: str, value: int) -> int:
    """Return the value of an option, or raise a ValueError."""
    if value < 1:
        raise ValueError(f"{option} must be at least 1, got {value}")
    return value
