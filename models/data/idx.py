"""MNIST (LeCun 1998) and Fashion-MNIST (Xiao 2017) from their official IDX files, compressed or not."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.data.source import DataError

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
Part = tuple[Tensor, Tensor]  # images [N, 1, 28, 28], uint8, and labels [N], int64


def read(folder: Path) -> tuple[Part, Part]:
    """Return the training and test images of a folder with the four official files, each as it is or as .gz.

    Raises:
        DataError: a file is missing, damaged or something else.
    """
    train_images, train_labels, test_images, test_labels = (_array(folder, name) for name in FILES)
    return _part(folder, train_images, train_labels), _part(folder, test_images, test_labels)


def _array(folder: Path, name: str) -> NDArray[np.uint8]:
    """Read an IDX file of bytes: 0, 0, 8 and the number of dimensions; these, big-endian; then the values."""
    path = folder / name
    compressed = folder / f"{name}.gz"
    try:
        content = path.read_bytes() if path.exists() else gzip.decompress(compressed.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"there is no {name} or {compressed.name} in {folder}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{compressed} cannot be read: {type(error).__name__}: {error}") from error
    path = path if path.exists() else compressed
    dims = 3 if "idx3" in name else 1
    begin = 4 + 4 * dims
    if content[:4] != bytes((0, 0, 8, dims)) or len(content) < begin:
        raise DataError(
            f"{path} must be an IDX file of bytes in {dims} dimensions, and begins with {content[:4].hex()}"
        )
    shape, values = np.frombuffer(content[4:begin], ">u4"), np.frombuffer(content[begin:], np.uint8)
    if len(values) != shape.prod():
        raise DataError(f"{path} must hold {' x '.join(map(str, shape))} bytes, got {len(values)}: it is damaged")
    return values.reshape(shape)


def _part(folder: Path, pixels: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Part:
    if pixels.shape[1:] != (28, 28):
        raise DataError(f"images in {folder} must be of 28 x 28 pixels, got {' x '.join(map(str, pixels.shape[1:]))}")
    if len(pixels) != len(labels) or labels.max(initial=0) > 9:
        raise DataError(f"{folder} must hold a label from 0 to 9 for each image, got {len(labels)} for {len(pixels)}")
    return torch.from_numpy(pixels[:, None].copy()), torch.from_numpy(labels.astype(np.int64))
