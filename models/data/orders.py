"""The order of images: random ones that come again with their seed, and class-stratified ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models import seeds
from models.data.source import DataError


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """Return a random order of the images in which every stretch holds the classes in their overall proportions."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    first = counts.cumsum(0) - counts  # of each class in by_class
    label = labels[by_class]
    position = torch.empty(len(labels), dtype=torch.float64)
    position[by_class] = (torch.arange(len(labels), dtype=torch.float64) - first[label] + 0.5) / counts[label]
    return shuffled[position[shuffled].argsort(stable=True)]


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return a random order of `count` images, a function of (seed, epoch)."""
    return torch.randperm(count, generator=seeds.generator("cpu", "order", seed, epoch))


@dataclass(frozen=True)
class Cut:
    """Indices of the images to train on, and of those kept back from them for validation."""

    train: Tensor  # [N]
    validation: Tensor  # [V]


def cut_validation(order: Tensor, train: int, validation: int) -> Cut:
    """Cut the first `train` of a stratified order in two; the first `validation` are kept back.

    So the validation images do not depend on how many are trained on, and both parts are stratified.
    """
    return Cut(order[validation:train], order[:validation])


def check_count(what: str, count: int, least: int, most: int) -> None:
    """Raise a DataError that says how many images there can be, where `count` is not in least..most."""
    if not least <= count <= most:
        raise DataError(f"{what} must be from {least} to {most}, got {count}")
