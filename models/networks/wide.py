"""The two networks of the CIFAR robustness literature: PreActResNet18 and WideResNet."""

from models.activations import ActivationFactory
from models.images import ImageFormat
from models.networks.blocks import at_least_one
from models.networks.resnet import ResNet


def preactresnet18(activation: ActivationFactory, images: ImageFormat, *, width: int = 64, patch: int = 1) -> ResNet:
    """Build PreActResNet18 (He et al. 2016): four stages of two blocks of 1, 2, 4 and 8 times `width`.

    With a batch norm and an activation before the mean, as in the code of Wong et al. 2020; some code leaves them out.

    Raises:
        ValueError: an argument is out of its range, or the images are too small.
    """
    at_least_one("width", width)
    return ResNet(activation, images, width, [width * 2**i for i in range(4)], 2, "pre", "conv", patch)


def wideresnet(
    activation: ActivationFactory, images: ImageFormat, *, depth: int = 28, width: int = 10, patch: int = 1
) -> ResNet:
    """Build the WideResNet of 6n + 4 layers (Zagoruyko, Komodakis 2016): three stages of n blocks, 16, 32, 64 × width.

    The first convolution has 16 channels; there is no dropout. Depth 28 and width 10 give WRN-28-10.

    Raises:
        ValueError: an argument is out of its range, or the images are too small.
    """
    blocks, remainder = divmod(depth - 4, 6)
    if blocks < 1 or remainder:
        raise ValueError(f"depth must be 6n + 4 with n at least 1 (16, 22, 28, 34, 70, ...), got {depth}")
    at_least_one("width", width)
    return ResNet(activation, images, 16, [16 * width * 2**i for i in range(3)], blocks, "pre", "conv", patch)
