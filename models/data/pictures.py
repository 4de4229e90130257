"""Image files of any size as training and test images of one size, the way that is usual for ImageNet."""

from collections.abc import Callable
from io import BytesIO
from typing import Any

from PIL import Image

from models.data.loaders import Decoding
from models.data.packages import need
from models.data.source import DataError


def decode(content: bytes, name: str) -> Image.Image:
    """Return the image that a file holds, as RGB.

    Raises:
        DataError: it cannot be decoded; names the file.
    """
    try:
        return Image.open(BytesIO(content)).convert("RGB")
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
