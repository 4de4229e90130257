"""Steps and epochs of training and attacks, to be timed in turn."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import problems
from bench.problems import Call
from models.attacks import pgd, search
from models.data.augmentation import CropAndFlip
from models.data.source import Batch, Source
from models.data.tensors import TensorSource
from models.images import CIFAR10
from models.networks import build
from models.training import Recipe, Trainer

IMAGES, BATCH, EPS = 256, 128, 8 / 255
RECIPE = Recipe(1, BATCH, 1e-3, method="fast", eps=EPS, watch_steps=0)


class Made(Source):
    """Batches made beforehand: loading that costs nothing."""

    def __init__(self, source: Source) -> None:
        self.source, self.made = source, list(source.shuffled(BATCH, 0))

    def __len__(self) -> int:
        return len(self.source)

    def shuffled(
        self, batch_size: int, epoch: int, start: int = 0, *, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        return iter(self.made[start:])

    def ordered(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        return self.source.ordered(batch_size, count)


def source() -> Source:
    """Return random images 3 × 32 × 32 that are cropped and flipped."""
    images = torch.randint(256, (IMAGES, 3, 32, 32), dtype=torch.uint8)
    return TensorSource(images, torch.arange(IMAGES) % 10, 0, CropAndFlip(4, True))


def step(activation: str) -> Call:
    """Return the call that makes a step of SGD of a ResNet20 of width 16 on a batch of 128 images 3 × 32 × 32."""
    images, labels = torch.rand(BATCH, 3, 32, 32), torch.arange(BATCH) % 10
    network = build("resnet20", activation, CIFAR10, seed=0)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def call() -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        return (loss.detach(),)

    return call


def epoch(activation: str, method: str = "fast", images: Callable[[], Source] = source) -> Call:
    """Return the call that trains a ResNet20 of width 16 for an epoch of 2 batches, checkpoint included."""
    recipe = dataclasses.replace(RECIPE, method=method)
    network = build("resnet20", activation, CIFAR10, seed=0)
    train = images()
    folder = tempfile.TemporaryDirectory()

    def call() -> tuple[Tensor, ...]:
        # Named, so that the folder lives as long as the call.
        Trainer(network, recipe, 0, train, None, Path(folder.name)).run()
        return ()

    return call


def attack(threads: int) -> Call:
    """Return the call that attacks 128 images by PGD of 10 steps, on so many threads."""
    network = build("resnet20", "kaf_silu", CIFAR10, seed=0).eval()
    x = torch.rand(BATCH, 3, 32, 32)
    with torch.no_grad():
        y = network(x).argmax(1)

    def call() -> tuple[Tensor, ...]:
        with problems.threads(threads):
            # Radius 0 breaks no image, so that every call does the same work.
            return search(network, x, y, pgd(0.0, 10, step=0.0), torch.Generator().manual_seed(0))

    return call
