"""The order of images: random ones that come again with their seed, and class-stratified ones."""

import torch
from torch import Tensor

from models.support import seeds


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """Return a random order of the images in which every stretch holds the classes in their overall proportions."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    first = counts.cumsum(0) - counts  # place of each class in by_class
    label = labels[by_class]
    position = torch.empty(len(labels), dtype=torch.float64)
    position[by_class] = (torch.arange(len(labels), dtype=torch.float64) - first[label] + 0.5) / counts[label]
    return shuffled[position[shuffled].argsort(stable=True)]


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return a random order of `count` images, a function of (seed, epoch)."""
    return torch.randperm(count, generator=seeds.generator("cpu", "order", seed, epoch))
