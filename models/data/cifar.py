"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from their official files, or from arrays in an .npz file."""

import codecs
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.data.source import DataError

Part = tuple[Tensor, Tensor]  # images [N, 3, 32, 32], uint8, and labels [N], int64


@dataclass(frozen=True)
class Layout:
    """What the official files are called and hold."""

    name: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: bytes
    classes: int


_RECONSTRUCT = np.empty(0).__reduce__()[0]
_NEEDED = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": _RECONSTRUCT,  # NumPy 2
    "_codecs.encode": codecs.encode,  # for bytes written by Python 3
}

CIFAR10 = Layout(
    "cifar10", "cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",), b"labels", 10
)
CIFAR100 = Layout("cifar100", "cifar-100-python", ("train",), ("test",), b"fine_labels", 100)


def read(path: Path, layout: Layout) -> tuple[Part, Part]:
    """Return the training and test images of the official folder, or of an .npz file.

    The arrays of an .npz file are x_train and x_test, uint8 of N x 3 x 32 x 32 or N x 32 x 32 x 3, y_train and y_test.

    The official files are pickles, which can name any function to be called when they are read. Here they can name the
    four that make arrays, and nothing else. Their number of images is not checked, so smaller files of the same layout
    can be used.

    Raises:
        DataError: a file is missing, damaged or something else.
    """
    if path.suffix == ".npz":
        return _read_npz(path, layout)
    train, test = ([_read_batch(path / name, layout) for name in names] for names in (layout.train, layout.test))
    return _joined(train), _joined(test)


def _joined(parts: list[Part]) -> Part:
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def _read_batch(path: Path, layout: Layout) -> Part:
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
        pixels, labels = np.asarray(content[b"data"]), np.asarray(content[layout.labels])
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(
            f"{path} cannot be read as a file of {layout.name}: {type(error).__name__}: {error}. There must be "
            f"{', '.join(layout.train + layout.test)}"
        ) from error
    if pixels.shape[1:] == (3 * 32 * 32,):
        pixels = pixels.reshape(-1, 3, 32, 32)
    return _checked(path, pixels, labels, layout)


def _read_npz(path: Path, layout: Layout) -> tuple[Part, Part]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    except Exception as error:  # a damaged file raises almost anything
        raise DataError(
            f"{path} must hold the arrays x_train, y_train, x_test and y_test: {type(error).__name__}: {error}"
        ) from error
    for name in ("x_train", "x_test"):
        if arrays[name].shape[-1:] == (3,):
            arrays[name] = np.moveaxis(arrays[name], -1, 1)
    train, test = (
        _checked(path, arrays[f"x_{part}"], arrays[f"y_{part}"].reshape(-1), layout) for part in ("train", "test")
    )
    return train, test


def _checked(path: Path, images: np.ndarray, labels: np.ndarray, layout: Layout) -> Part:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (3, 32, 32) or not len(images):
        raise DataError(
            f"{path} must hold uint8 images of 3 x 32 x 32, got {images.dtype} of shape {list(images.shape)}"
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path} must hold a whole number as label of each of its {len(images)} images, got {labels.dtype} of "
            f"shape {list(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= layout.classes:
        raise DataError(f"{path} must hold labels from 0 to {layout.classes - 1}, got {labels.min()} to {labels.max()}")
    return torch.from_numpy(np.array(images)), torch.from_numpy(labels.astype(np.int64))


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of dictionaries, lists, numbers, strings and arrays, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NEEDED[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which CIFAR's files do not") from None
