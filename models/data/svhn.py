"""SVHN, house numbers (Netzer et al. 2011), from its official .mat files."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.data.packages import need
from models.data.source import DataError


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Return images [N, 3, 32, 32], uint8, and labels [N], int64; the files' label 10 is the digit 0.

    Raises:
        DataError: SciPy is not installed, or the file is missing, damaged or something else.
    """
    io = need("scipy.io", "scipy", "svhn")
    try:
        content = io.loadmat(str(path))
        pixels, labels = content["X"], content["y"]
    except Exception as error:  # a damaged file raises almost anything
        raise DataError(f"{path} cannot be read as a file of SVHN: {type(error).__name__}: {error}") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
        raise DataError(
            f"{path} must hold X, uint8 of 32 x 32 x 3 x N, got {pixels.dtype} of shape {list(pixels.shape)}"
        )
    labels = labels.reshape(-1).astype(np.int64)
    if len(labels) != pixels.shape[3] or labels.min() < 1 or labels.max() > 10:
        raise DataError(f"{path} must hold a label from 1 to 10 for each of its {pixels.shape[3]} images")
    images = np.ascontiguousarray(pixels.transpose(3, 2, 0, 1))
    return torch.from_numpy(images), torch.from_numpy(labels % 10)
