"""The two plain networks of the thesis, VGG-inspired and light, with the pooling to choose."""

from collections.abc import Sequence

from torch import Tensor, nn

from models.activations import ActivationFactory
from models.images import ImageFormat
from models.networks.blocks import Entry, at_least_one, conv, one_of

POOLS = ("max", "average", "stride")


class PlainNetwork(nn.Module):
    """Blocks of two 3 × 3 convolutions and a pooling that halves the map; a dense layer; a linear classifier.

    Every convolution is followed by batch norm and activation, the dense layer by an activation.

    That is how the thesis describes its VGG-inspired network. Its notebooks do so for KAFs, but put the norm behind
    ReLU and Swish. Here all have the one order, so that only the activation differs. Their convolutions also have a
    bias, which the norm would cancel, and their norms Keras' defaults (ε 1e-3, running mean of 1 % of a batch), ours
    PyTorch's (1e-5, 10 %). Their weights are He's for fan-in, uniform; ours see `models.networks.build`.

    Args:
        activation: factory, number of channels -> module.
        images: of the network.
        widths: channels of each block.
        pool: "max" or "average" over 2 × 2, or "stride": the second convolution of each block has stride 2 instead.
        mean: whether the dense layer takes the mean over all positions; else it takes all of them.
        dense: outputs of the dense layer.
        dropout: rate behind each block, and behind the dense layer.
        patch: pixels a side that the entry folds into one position (`Entry`).

    Raises:
        ValueError: an argument is out of its range, or the images are too small.
    """

    def __init__(
        self,
        activation: ActivationFactory,
        images: ImageFormat,
        widths: Sequence[int],
        pool: str,
        mean: bool,
        dense: int,
        dropout: Sequence[float],
        patch: int,
    ) -> None:
        super().__init__()
        one_of("pool", pool, POOLS)
        at_least_one("dense", dense)
        self.entry = Entry(images, patch, halvings=len(widths))
        layers: list[nn.Module] = []
        inputs, size = self.entry.channels, self.entry.size
        for outputs, rate in zip(widths, dropout[:-1], strict=True):
            layers += _block(inputs, outputs, pool, rate, activation)
            inputs, size = outputs, -(-size // 2) if pool == "stride" else size // 2
        self.blocks = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1) if mean else nn.Identity()
        self.dense = nn.Linear(inputs if mean else inputs * size**2, dense)
        self.activation = activation(dense)
        self.dropout = nn.Dropout(dropout[-1])
        self.classifier = nn.Linear(dense, images.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, C, H, W] in [0, 1] to logits [N, classes]."""
        x = self.pool(self.blocks(self.entry(x))).flatten(1)
        return self.classifier(self.dropout(self.activation(self.dense(x))))


def vgg(
    activation: ActivationFactory,
    images: ImageFormat,
    *,
    width: int = 32,
    pool: str = "max",
    dense: int = 128,
    dropout: bool = True,
    patch: int = 1,
) -> PlainNetwork:
    """Build the thesis's VGG-inspired network: three blocks of 1, 2 and 4 times `width`, then all positions at once.

    Dropout .2, .25, .3 behind the blocks and .4 behind the dense layer, as in its notebooks (its text says that the
    rate grows by .05 each time from .2 to .4, which would be one more); none without `dropout`.

    Raises:
        ValueError: an argument is out of its range, or the images are too small.
    """
    at_least_one("width", width)
    rates = (0.2, 0.25, 0.3, 0.4) if dropout else (0.0,) * 4
    return PlainNetwork(activation, images, (width, 2 * width, 4 * width), pool, False, dense, rates, patch)


def light(
    activation: ActivationFactory,
    images: ImageFormat,
    *,
    width: int = 32,
    pool: str = "max",
    dense: int = 128,
    dropout: bool = True,
    patch: int = 1,
) -> PlainNetwork:
    """Build the thesis's light network: two blocks of 1 and 2 times `width`, then the mean of each map.

    Dropout .2, .3 behind the blocks and .4 behind the dense layer, as in its notebook; none without `dropout`.

    Raises:
        ValueError: an argument is out of its range, or the images are too small.
    """
    at_least_one("width", width)
    rates = (0.2, 0.3, 0.4) if dropout else (0.0,) * 3
    return PlainNetwork(activation, images, (width, 2 * width), pool, True, dense, rates, patch)


def _block(inputs: int, outputs: int, pool: str, dropout: float, activation: ActivationFactory) -> list[nn.Module]:
    pools: dict[str, list[nn.Module]] = {"max": [nn.MaxPool2d(2)], "average": [nn.AvgPool2d(2)], "stride": []}
    return [
        conv(inputs, outputs),
        nn.BatchNorm2d(outputs),
        activation(outputs),
        conv(outputs, outputs, stride=2 if pool == "stride" else 1),
        nn.BatchNorm2d(outputs),
        activation(outputs),
        *pools[pool],
        nn.Dropout(dropout),
    ]
