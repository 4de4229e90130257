"""Networks: input in [0, 1], normalisation inside, logits out. The activation is a factory: channels -> module."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.activations import ActivationFactory

MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)


class Normalise(nn.Module):
    """(x - mean) / std per channel, so that attacks and data stay in [0, 1]."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images [N, C, H, W]."""
        return (x - self.mean) / self.std


class PreActivationBlock(nn.Module):
    """x + conv(act(bn(conv(act(bn(x)))))), the residual block of He et al. 2016, Identity Mappings.

    A block that changes the shape subsamples its input and fills the new channels with zeros, which has no parameters.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: ActivationFactory) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.activation1 = activation(inputs)
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.activation2 = activation(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.stride = stride
        self.new_channels = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        branch = self.conv1(self.activation1(self.norm1(x)))
        branch = self.conv2(self.activation2(self.norm2(branch)))
        return self._shortcut(x) + branch

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[..., :: self.stride, :: self.stride]
        before = self.new_channels // 2
        return F.pad(x, (0, 0, 0, 0, before, self.new_channels - before)) if self.new_channels else x


class ResNet(nn.Module):
    """CIFAR ResNet of 6n + 2 layers in pre-activation form (He et al. 2016), three stages of n blocks.

    The pre-activation form keeps activations off the trunk. Behind an activation on the trunk, the batch norm after it
    divides its scale out, and the gradient changes by about sqrt(E[f'²] / Var f) per block: 1.2 for ReLU, but 1.9 for a
    KAF with random coefficients, which makes the gradients of a deep post-activation KAF ResNet explode.

    Args:
        depth: 6n + 2: 20, 32, 44, 56, 110, ...
        width: channels of the first stage; the next two have 2x and 4x (16 in the paper).
        activation: factory, number of channels -> module.
        mean, std: of the training images, per channel; their length is the number of input channels.
        classes: number of logits.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        activation: ActivationFactory,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        classes: int = 10,
    ) -> None:
        super().__init__()
        blocks, remainder = divmod(depth - 2, 6)
        if blocks < 1 or remainder:
            raise ValueError(f"depth must be 6n + 2 with n at least 1 (20, 32, 44, 56, 110, ...), got {depth}")
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.normalise = Normalise(mean, std)
        self.stem = _conv3x3(len(mean), width)
        stages = [
            PreActivationBlock(*_block_shape(width, stage, block), activation)
            for stage in range(3)
            for block in range(blocks)
        ]
        self.blocks = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(4 * width)
        self.activation = activation(4 * width)
        self.classifier = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, C, H, W] in [0, 1] to logits [N, classes]."""
        x = self.blocks(self.stem(self.normalise(x)))
        return self.classifier(self.activation(self.norm(x)).mean((2, 3)))


def resnet20(activation: ActivationFactory, width: int, seed: int) -> ResNet:
    """Build a ResNet20 for MNIST. The weights depend on `seed` only: they are the same whatever the activation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ResNet(20, width, activation, MNIST_MEAN, MNIST_STD)
        torch.manual_seed(seed)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                module.reset_parameters()
    return network


def _block_shape(width: int, stage: int, block: int) -> tuple[int, int, int]:
    """Return (input channels, output channels, stride): a stage's first block halves the map and doubles the width."""
    outputs = width * 2**stage
    if block == 0 and stage > 0:
        return outputs // 2, outputs, 2
    return outputs, outputs, 1


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
