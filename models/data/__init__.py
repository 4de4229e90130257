"""Image sets by name, such as `mnist5k:train=2000` or `cifar10`."""

from pathlib import Path

from models.data.mnist import MNIST5K_SIZE
from models.data.orders import stratified_order
from models.data.sets import DATA
from models.data.source import Batch, DataError, DataSet, Source
from models.data.tensors import TensorSource

__all__ = [
    "DATA",
    "MNIST5K_SIZE",
    "Batch",
    "DataError",
    "DataSet",
    "Source",
    "TensorSource",
    "load",
    "made_up",
    "marked",
    "stratified_order",
]


def load(text: str, seed: int, root: Path | None = None) -> DataSet:
    """Return the image set that `text` names.

    Which images are in which source depends on `text` alone, and `seed` decides order and augmentation, so that
    networks trained with different seeds are validated and tested on the same images.

    Args:
        text: name and options, such as `mnist5k:train=2000,test=500`.
        seed: of the order of training images and their augmentation.
        root: folder in which files are looked for; None for that which the environment variable KAFOPS_DATA names, and
            ./data.

    Raises:
        ValueError: no set has this name, or it has no such option.
        DataError: the images are not there or are damaged, or an option asks for what there is not.
    """
    return DATA.create(text, seed, root)


def made_up(text: str) -> bool:
    """Say whether a set's images are made up: accuracies on them say nothing, and whoever shows them says so."""
    return text.partition(":")[0] == "fake"


def marked(text: str) -> str:
    """Return what to put behind the name of what was measured on a set: whether its images are made up."""
    return " (made-up images)" if made_up(text) else ""
