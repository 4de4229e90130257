"""Clean and robust accuracy, with the interval that the number of images allows."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attacks import LinfAttack, search
from models.errors import UserError


class EvaluationError(UserError):
    """A network that cannot be evaluated."""


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `total` images."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval of the share."""
        return wilson_interval(self.correct, self.total)


def wilson_interval(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return the score interval of Wilson 1927 for a proportion; z is the normal quantile, 1.96 for 95 %."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"need 0 ≤ successes ≤ trials and trials ≥ 1, got {successes} of {trials}")
    share, z2 = successes / trials, z**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # At the ends the formula gives 0 and 1 exactly, but for rounding.
    return (centre - half if successes else 0.0), (centre + half if successes < trials else 1.0)


def clean_accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 250) -> Accuracy:
    """Count the images classified correctly, in evaluation mode."""
    correct = 0
    with evaluation_mode(model), torch.no_grad():
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            logits = model(x)
            if not logits.isfinite().all():
                raise EvaluationError("the network's logits are not finite; it cannot be evaluated")
            correct += int((logits.argmax(1) == y).sum())
    return Accuracy(correct, len(labels))


def robust_accuracy(
    model: nn.Module,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    labels: Tensor,  # [N]
    attack: LinfAttack,
    seed: int,
    batch_size: int = 250,
    on_batch: Callable[[int], None] = lambda images_done: None,
) -> Accuracy:
    """Count the images classified correctly for which the attack finds no misclassified point either.

    The attack's noise depends on `seed` only, so every network meets the same random starts.
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    robust = done = 0
    with evaluation_mode(model):
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            _, found = search(model, x, y, attack, generator)
            robust += int((~found).sum())
            done += len(x)
            on_batch(done)
    return Accuracy(robust, len(labels))


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and each of its modules back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
