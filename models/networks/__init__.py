"""Networks by name, options in the name: `resnet20:width=8,form=post`. Input in [0, 1], logits out, by `build`."""

import torch
from torch import nn

from models import activations
from models.activations import ActivationFactory
from models.images import ImageFormat
from models.networks.blocks import Normalise
from models.networks.resnet import ResNet, cifar_resnet
from models.networks.vgg import light, vgg
from models.networks.wide import preactresnet18, wideresnet
from models.registry import Registry
from models.support.errors import UserError

__all__ = ["NETWORKS", "Normalise", "ResNet", "build"]

NETWORKS: Registry[nn.Module] = Registry("network")


def build(network: str, activation: str | ActivationFactory, images: ImageFormat, seed: int) -> nn.Module:
    """Build a network for images [N, C, H, W] in [0, 1]: it normalises them itself and returns logits [N, classes].

    The weights are a function of `seed` alone, the same whatever the activation, and so are random curves; the global
    generators are left alone. Convolutions have He's normal weights for fan-out, linear layers PyTorch's default.

    Args:
        network: name in `NETWORKS` with options, such as "resnet20:width=8".
        activation: name in `ACTIVATIONS` with options, such as "kaf_silu", or a factory, channels -> module.
        images: what the network is for.
        seed: of all that is random.

    Raises:
        ValueError: a name or option is unknown, a value is out of its range, or the images are too small.

    Example:
        >>> model = build("vgg:pool=average", "kaf_silu", images.CIFAR10, seed=0)
    """
    factory = activations.activation(activation) if isinstance(activation, str) else activation
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = NETWORKS.create(network, factory, images)
        torch.default_generator.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                module.reset_parameters()
    return model


NETWORKS.register("vgg")(vgg)
NETWORKS.register("light")(light)


@NETWORKS.register("resnet")
def _resnet(
    activation: ActivationFactory,
    images: ImageFormat,
    *,
    depth: int = 20,
    width: int = 16,
    form: str = "pre",
    shortcut: str = "pad",
    patch: int = 1,
    branch: float | None = None,
) -> nn.Module:
    return cifar_resnet(activation, images, depth, width, form, shortcut, patch, branch)


def _register_resnet(depth: int) -> None:
    @NETWORKS.register(f"resnet{depth}")
    def of_depth(
        activation: ActivationFactory,
        images: ImageFormat,
        *,
        width: int = 16,
        form: str = "pre",
        shortcut: str = "pad",
        patch: int = 1,
        branch: float | None = None,
    ) -> nn.Module:
        return cifar_resnet(activation, images, depth, width, form, shortcut, patch, branch)


for _depth in (20, 32, 44, 56, 110):
    _register_resnet(_depth)

NETWORKS.register("preactresnet18")(preactresnet18)
NETWORKS.register("wideresnet", "wideresnet28_10")(wideresnet)


@NETWORKS.register("resnet50")
def _resnet50(activation: ActivationFactory, images: ImageFormat) -> nn.Module:
    try:
        from models.networks.imagenet import ResNet50
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torchvision":
            raise
        raise UserError("network 'resnet50' is torchvision's; run `pip install torchvision`") from error
    return ResNet50(activation, images)
