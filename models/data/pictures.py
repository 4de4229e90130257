"""Image files of any size as training and test images of one size, the way that is usual for ImageNet."""

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from models.data.loaders import Decoding
from models.data.packages import need
from models.data.source import DataError


def decode(content: bytes, name: str) -> Image.Image:
    """Return the image that a file holds, as RGB. Grey values of 16 bits are divided by 257.

    Raises:
        DataError: it cannot be decoded, or nothing says what its largest value means; names the file.
    """
    try:
        image: Image.Image = Image.open(BytesIO(content))
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
            grey = (np.asarray(image).astype(np.int64) + 128) // 257
            image = Image.fromarray(grey.astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"grey values of 32 bits (mode {image.mode}) have no range; save it with 8 or 16 bits")
        return image.convert("RGB")
    except Exception as error:  # decoders raise almost anything for a damaged file
        raise DataError(f"{name} cannot be read as an image: {type(error).__name__}: {error}") from error


def decoding(read: Callable[[Any], tuple[Image.Image, int]], size: int) -> Decoding:
    """Return how images become [3, size, size].

    For training a random crop of 8 to 100 % of the area is resized, and half of the images are mirrored (Szegedy et al.
    2015); otherwise the shorter side is resized to 256/224 size, and the middle is cut out.
    """
    transforms = need("torchvision.transforms", "torchvision", "decoding image files")
    augment = transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    )
    plain = transforms.Compose(
        [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size), transforms.PILToTensor()]
    )
    return Decoding(read, augment, plain, (3, size, size))
