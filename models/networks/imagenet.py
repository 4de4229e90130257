"""torchvision's ResNet50 with other activations; the one module here that needs torchvision."""

import torch
from torch import Tensor, nn
from torchvision.models import resnet

import kafops
from models.activations import ActivationFactory
from models.images import ImageFormat
from models.networks.blocks import Entry


class Bottleneck(resnet.Bottleneck):
    """torchvision's block, with an activation module for each of its three activations instead of one for all."""

    def __init__(self, *arguments: int, **options: object) -> None:
        super().__init__(*arguments, **options)
        del self.relu
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.relu2(self.bn2(self.conv2(branch)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu3(self.bn3(self.conv3(branch)) + shortcut)


class ResNet50(nn.Module):
    """ResNet50 (He et al. 2015) as torchvision builds it, with stride in the 3 × 3 convolution, from [0, 1] on.

    The names under `body` are torchvision's, so that its weights load there. See `models.networks.build` for weights.
    """

    def __init__(self, activation: ActivationFactory, images: ImageFormat) -> None:
        super().__init__()
        if images.channels != 3:
            raise ValueError(f"network 'resnet50' takes images of 3 channels, got {images.channels}")
        self.entry = Entry(images, patch=1, halvings=5)
        self.body = resnet.ResNet(Bottleneck, [3, 4, 6, 3], images.classes)
        kafops.replace_activations(self.body, lambda channels: activation(channels), nn.ReLU, torch.zeros(1, 3, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 3, H, W] in [0, 1] to logits [N, classes]."""
        return self.body(self.entry(x))
