"""Image files in folders, one for each class: the layout of ImageNet."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.data import pictures
from models.data.packages import need
from models.data.source import DataError


@dataclass(frozen=True)
class FolderImages:
    """Image files with labels.

    Arrays, since they are sent to every worker, which takes long for lists of a million names.
    """

    root: Path
    names: np.ndarray  # [N], bytes; relative to root
    labels: np.ndarray  # [N], int64
    classes: tuple[str, ...]

    def read(self, item: int) -> tuple[Image.Image, int]:
        """Return an image and its label.

        Raises:
            DataError: the file cannot be read; names it.
        """
        path = self.root / os.fsdecode(self.names[item])
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        return pictures.decode(content, str(path)), int(self.labels[item])


def read_folders(root: Path, parts: tuple[str, ...]) -> tuple[FolderImages, list[Tensor]]:
    """List the images of root/PART/CLASS/FILE.

    Returns:
        All images, and the numbers of those of each part.

    Raises:
        DataError: a part is missing, has no classes or empty ones, or other classes than the first.
    """
    folders = [_list(root / part) for part in parts]
    for part, folder in zip(parts[1:], folders[1:], strict=True):
        differing = sorted(set(folder.classes) ^ set(folders[0].classes))
        if differing:
            raise DataError(
                f"{root / parts[0]} and {root / part} must have the same classes, but only one has {_some(differing)}"
            )
    samples = [sample for folder in folders for sample in folder.samples]
    prefix = len(os.path.join(root, ""))
    names = np.array([os.fsencode(path[prefix:]) for path, _ in samples])
    labels = np.array([label for _, label in samples])
    numbers = torch.arange(len(samples)).split([len(folder) for folder in folders])
    return FolderImages(root, names, labels, tuple(folders[0].classes)), list(numbers)


def _list(folder: Path) -> Any:
    datasets: Any = need("torchvision.datasets", "torchvision", "listing image files")
    names = slice(len(str(folder)), None)

    class Visible(datasets.ImageFolder):
        """Without what an editor, a notebook or a system keeps beside the images: names that begin with a dot."""

        def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
            classes = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and entry.name[0] != ".")
            if not classes:
                raise FileNotFoundError(f"there is no folder in {directory}")
            return classes, {name: number for number, name in enumerate(classes)}

    def is_image(path: str) -> bool:
        return f"{os.sep}." not in path[names] and datasets.folder.is_image_file(path)

    try:
        return Visible(str(folder), is_valid_file=is_image)
    except FileNotFoundError as error:
        raise DataError(f"{folder} is not a folder of classes that each have images: {error}") from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
