"""Networks for torch.hub: `torch.hub.load("path/to/kafops", "preactresnet18", source="local", activation="kaf_silu")`.

`torch.hub.help` tells the options of each. Only torch is needed, torchvision for resnet50, safetensors for checkpoints.
"""

import contextlib as _contextlib
import pathlib as _pathlib
import sys as _sys
from collections.abc import Callable as _Callable
from collections.abc import Iterator as _Iterator
from importlib.machinery import PathFinder as _PathFinder
from types import ModuleType as _ModuleType

from torch import nn as _nn

_ROOT = str(_pathlib.Path(__file__).resolve().parent)
_modules: "dict[str, _ModuleType]" = {}


def _another_there() -> bool:
    """Whether `models` is, or would be, another package than the one beside this file."""
    if "models" in _sys.modules:
        places = [list(getattr(_sys.modules["models"], "__path__", ["a module"]))]
    else:
        specs = [_PathFinder.find_spec("models", [entry]) for entry in _sys.path]
        places = [list(spec.submodule_search_locations or ["a module"]) for spec in specs if spec is not None]
    ours = _pathlib.Path(_ROOT, "models")
    return any(_pathlib.Path(place).resolve() != ours for found in places for place in found)


@_contextlib.contextmanager
def _ours() -> "_Iterator[None]":
    """Within the block `models` is the package beside this file; behind it, it is again whatever the user's is."""
    if not _another_there():
        yield
        return

    def taken() -> "dict[str, _ModuleType]":
        names = [name for name in _sys.modules if name.partition(".")[0] == "models"]
        return {name: _sys.modules.pop(name) for name in names}

    theirs = taken()
    _sys.modules.update(_modules)
    _sys.path.insert(0, _ROOT)
    try:
        yield
    finally:
        _sys.path.remove(_ROOT)
        _modules.update(taken())
        _sys.modules.update(theirs)


with _ours():
    from models import images as _images
    from models import networks as _networks

dependencies = ["torch"]

_FORMATS = {
    "mnist": _images.MNIST,
    "fashion": _images.FASHION,
    "digits": _images.DIGITS,
    "cifar10": _images.CIFAR10,
    "cifar100": _images.CIFAR100,
    "svhn": _images.SVHN,
    "imagenet": _images.IMAGENET,
}
_HELP = """{what}. Images [N, C, H, W] in [0, 1] in, normalised inside, logits out.

Args:
    activation: name with options, such as "kaf_silu" or "kwta:ratio=0.1"; see models/activations.
    images: {formats}, or a `models.images.ImageFormat`.
    seed: of the weights, where no checkpoint gives them.
    checkpoint: path of a checkpoint made by `python -m models train` for this network, activation and images. The
        network is then in evaluation mode.
    options: {options}.

Raises:
    ValueError: a name or a value is wrong, or the images are too small.
    CheckpointError: the checkpoint is damaged, or of another network.
"""


def _entry(name: str, what: str, default_images: str = "cifar10") -> _Callable[..., _nn.Module]:
    def load(
        activation: str = "relu",
        images: "str | _images.ImageFormat" = default_images,
        seed: int = 0,
        checkpoint: "str | _pathlib.Path | None" = None,
        **options: "int | str | bool",
    ) -> _nn.Module:
        with _ours():
            model = _networks.build(_text(name, options), activation, _format(images), seed)
            return model if checkpoint is None else _load_weights(model, _pathlib.Path(checkpoint))

    options = ", ".join(f"{p.name}={p.default!r}" for p in _networks.NETWORKS.options(name).values())
    load.__name__ = load.__qualname__ = name
    load.__doc__ = _HELP.format(what=what, formats=", ".join(map(repr, _FORMATS)), options=options or "none")
    return load


def _text(name: str, options: "dict[str, int | str | bool]") -> str:
    words = {True: "yes", False: "no"}
    values = (f"{key}={words[value] if isinstance(value, bool) else value}" for key, value in options.items())
    return f"{name}:{','.join(values)}"


def _format(images: "str | _images.ImageFormat") -> _images.ImageFormat:
    if isinstance(images, _images.ImageFormat):
        return images
    if images not in _FORMATS:
        raise ValueError(f"images must be {', '.join(map(repr, _FORMATS))} or an ImageFormat, got {images!r}")
    return _FORMATS[images]


def _load_weights(model: _nn.Module, path: _pathlib.Path) -> _nn.Module:
    from models.support import checkpoints

    checkpoints.load_weights(model, checkpoints.weights(checkpoints.load(path)[0]), path)
    return model.eval()


vgg = _entry("vgg", "The VGG-inspired network of Peconi's thesis (2020)")
light = _entry("light", "The light network of Peconi's thesis (2020)")
resnet = _entry("resnet", "A CIFAR ResNet of 6n + 2 layers (He et al. 2015)")
resnet20 = _entry("resnet20", "The CIFAR ResNet of 20 layers (He et al. 2015)")
resnet32 = _entry("resnet32", "The CIFAR ResNet of 32 layers (He et al. 2015)")
resnet44 = _entry("resnet44", "The CIFAR ResNet of 44 layers (He et al. 2015)")
resnet56 = _entry("resnet56", "The CIFAR ResNet of 56 layers (He et al. 2015)")
resnet110 = _entry("resnet110", "The CIFAR ResNet of 110 layers (He et al. 2015)")
preactresnet18 = _entry("preactresnet18", "PreActResNet18 (He et al. 2016)")
wideresnet = _entry("wideresnet", "A WideResNet, WRN-28-10 by default (Zagoruyko, Komodakis 2016)")
resnet50 = _entry("resnet50", "torchvision's ResNet50 (He et al. 2015)", "imagenet")
