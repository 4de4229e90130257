"""Residual networks for small images: one class for three forms of the block and any stages."""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from models.activations import ActivationFactory
from models.images import ImageFormat
from models.networks.blocks import Entry, at_least_one, conv, one_of

SHORTCUTS = ("pad", "conv", "conv3x3")


class PadShortcut(nn.Module):
    """Every `stride`-th pixel, and zeros for the new channels, half of them on each side: no parameters (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        before = self.new_channels // 2
        x = x[..., :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))


class PreActivationBlock(nn.Module):
    """x + conv(act(bn(conv(act(bn(x)))))), the residual block of He et al. 2016, Identity Mappings.

    In a block that changes the shape, a padded shortcut starts at x and a convolution at act(bn(x)).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: ActivationFactory, shortcut: str) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.activation1 = activation(inputs)
        self.conv1 = conv(inputs, outputs, stride)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.activation2 = activation(outputs)
        self.conv2 = conv(outputs, outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        active = self.activation1(self.norm1(x))
        branch = self.conv2(self.activation2(self.norm2(self.conv1(active))))
        return self.shortcut(active if isinstance(self.shortcut, nn.Conv2d) else x) + branch


class PostActivationBlock(nn.Module):
    """act(x + bn(conv(act(bn(conv(x)))))), the block of He et al. 2015; a convolved shortcut ends in a norm too."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: ActivationFactory, shortcut: str) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.activation1 = activation(outputs)
        self.conv2 = conv(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, shortcut)
        if isinstance(self.shortcut, nn.Conv2d):
            self.shortcut = nn.Sequential(self.shortcut, nn.BatchNorm2d(outputs))
        self.activation2 = activation(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        branch = self.norm2(self.conv2(self.activation1(self.norm1(self.conv1(x)))))
        return self.activation2(self.shortcut(x) + branch)


class PostNormBlock(nn.Module):
    """act(bn(x + conv(act(bn(conv(x)))))), norm after the addition: the thesis's block, with shortcut conv3x3."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: ActivationFactory, shortcut: str) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.activation1 = activation(outputs)
        self.conv2 = conv(outputs, outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, shortcut)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.activation2 = activation(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        branch = self.conv2(self.activation1(self.norm1(self.conv1(x))))
        return self.activation2(self.norm2(self.shortcut(x) + branch))


FORMS = {"pre": PreActivationBlock, "post": PostActivationBlock, "post_norm": PostNormBlock}


class ResNet(nn.Module):
    """A 3 × 3 convolution, stages of residual blocks, the mean over all positions, and a linear classifier.

    Every stage but the first halves the map in its first block. In the pre-activation form a batch norm and an
    activation follow the last block, in the others they follow the first convolution.

    The form matters for a KAF, see docs/exploding-gradients.md. In the post-activation form a bounded activation on the
    trunk keeps the signal from growing, so that every branch, normalised to variance 1, drowns what came before it and
    gradients grow geometrically with depth. There branches start at 1/sqrt(number of blocks), so that all of them
    together double the variance of the trunk; the pre-activation form keeps activations off the trunk.

    Args:
        activation: factory, number of channels -> module.
        images: of the network.
        stem: channels of the first convolution.
        widths: channels of each stage.
        blocks: number of blocks of each stage.
        form: "pre", "post" or "post_norm": `PreActivationBlock`, `PostActivationBlock`, `PostNormBlock`.
        shortcut: of the blocks that change the shape: "pad" (no parameters), "conv" (1 × 1) or "conv3x3".
        patch: pixels a side that the entry folds into one position (`Entry`).
        branch: initial weight of the norm that ends each branch, form "post" only; default 1/sqrt(number of blocks).
            He et al. 2015 have 1.

    Raises:
        ValueError: an argument is out of its range, or the images are too small.
    """

    def __init__(
        self,
        activation: ActivationFactory,
        images: ImageFormat,
        stem: int,
        widths: Sequence[int],
        blocks: int,
        form: str = "pre",
        shortcut: str = "pad",
        patch: int = 1,
        branch: float | None = None,
    ) -> None:
        super().__init__()
        block = FORMS[one_of("form", form, tuple(FORMS))]
        one_of("shortcut", shortcut, SHORTCUTS)
        self.norm_last = form == "pre"
        trunk = widths[-1] if self.norm_last else stem
        self.entry = Entry(images, patch, halvings=len(widths) - 1)
        self.stem = conv(self.entry.channels, stem)
        if not self.norm_last:
            self.norm, self.activation = nn.BatchNorm2d(trunk), activation(trunk)
        shapes = _shapes(stem, widths, blocks)
        self.blocks = nn.Sequential(*(block(*shape, activation, shortcut) for shape in shapes))
        self._start_branches(form, branch)
        if self.norm_last:
            self.norm, self.activation = nn.BatchNorm2d(trunk), activation(trunk)
        self.classifier = nn.Linear(widths[-1], images.classes)

    def _start_branches(self, form: str, branch: float | None) -> None:
        if form != "post":
            if branch is not None:
                raise ValueError(
                    f"branch is of form=post, whose branches end in a norm; got branch={branch:g}, form={form}"
                )
            return
        if branch is not None and not 0 <= branch < math.inf:
            raise ValueError(f"branch must be a number of 0 or more, got {branch:g}")
        for block in self.blocks:
            assert isinstance(block, PostActivationBlock)
            nn.init.constant_(block.norm2.weight, 1 / math.sqrt(len(self.blocks)) if branch is None else branch)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, C, H, W] in [0, 1] to logits [N, classes]."""
        x = self.stem(self.entry(x))
        x = self.activation(self.norm(self.blocks(x))) if self.norm_last else self.blocks(self.activation(self.norm(x)))
        return self.classifier(x.mean((2, 3)))


def cifar_resnet(
    activation: ActivationFactory,
    images: ImageFormat,
    depth: int,
    width: int = 16,
    form: str = "pre",
    shortcut: str = "pad",
    patch: int = 1,
    branch: float | None = None,
) -> ResNet:
    """Build the CIFAR ResNet of 6n + 2 layers (He et al. 2015): three stages of n blocks of 1, 2 and 4 times `width`.

    Raises:
        ValueError: an argument is out of its range, or the images are too small.
    """
    blocks, remainder = divmod(depth - 2, 6)
    if blocks < 1 or remainder:
        raise ValueError(f"depth must be 6n + 2 with n at least 1 (20, 32, 44, 56, 110, ...), got {depth}")
    at_least_one("width", width)
    return ResNet(activation, images, width, (width, 2 * width, 4 * width), blocks, form, shortcut, patch, branch)


def _shapes(stem: int, widths: Sequence[int], blocks: int) -> list[tuple[int, int, int]]:
    """Return (input channels, output channels, stride) of each block."""
    shapes, inputs = [], stem
    for stage, outputs in enumerate(widths):
        for block in range(blocks):
            shapes.append((inputs, outputs, 2 if stage > 0 and block == 0 else 1))
            inputs = outputs
    return shapes


def _shortcut(inputs: int, outputs: int, stride: int, kind: str) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if kind == "pad":
        return PadShortcut(inputs, outputs, stride)
    return conv(inputs, outputs, stride, kernel=1 if kind == "conv" else 3)
