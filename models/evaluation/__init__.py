"""Clean and robust accuracy, image by image, with the interval that the number of images allows."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.nn import functional as F

from models.attacks import Adaptive, Attack, Halfway, Strongest
from models.attacks.linf import frozen
from models.support import seeds
from models.support.errors import UserError

BATCH_SIZE = 250


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

    @property
    def record(self) -> dict[str, Any]:
        """As results have it: "correct", "total", "accuracy" and "interval"."""
        return {**vars(self), "accuracy": self.value, "interval": list(self.interval)}


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % score interval of Wilson 1927 for a proportion."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"need 0 ≤ successes ≤ trials and trials ≥ 1, got {successes} of {trials}")
    low, high = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    # At the ends the formula gives 0 and 1 exactly, but for rounding.
    return (float(low) if successes else 0.0), (float(high) if successes < trials else 1.0)


@dataclass(frozen=True)
class Outcome:
    """What an attack did to each image.

    Args:
        found: [N] bool, on the CPU: a misclassified image was found near this one, or it is misclassified itself.
        seconds: how long it took.
        halfway: of the next batch, where members of an attack have been through it.
    """

    found: Tensor
    seconds: float
    halfway: Halfway | None = None

    @property
    def accuracy(self) -> Accuracy:
        """The accuracy under the attack: of the images for which nothing was found."""
        return accuracy(self.found)

    @property
    def status(self) -> str:
        """What is known so far, in words."""
        return f"accuracy {self.accuracy.value:.1%}" if len(self.found) else ""

    @property
    def mask(self) -> str:
        """`found` as text, a 0 or 1 for each image."""
        return as_text(self.found)


def as_text(found: Tensor) -> str:
    """Return a mask [N] bool as text, a 0 or 1 for each image."""
    return "".join("1" if f else "0" for f in found.tolist())


def accuracy(found: Tensor) -> Accuracy:
    """Return the accuracy where `found` [N] bool says which images are misclassified, or broken."""
    return Accuracy(int((~found).sum()), len(found))


def evaluate_clean(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = BATCH_SIZE) -> Outcome:
    """Find the images that the model misclassifies in evaluation mode as they are.

    Raises:
        EvaluationError: a logit is not finite.
    """
    start, found = time.perf_counter(), []
    with evaluation_mode(model), torch.no_grad():
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            logits = model(x)
            if not logits.isfinite().all():
                raise EvaluationError("the network's logits are not finite; it cannot be evaluated")
            found.append((logits.argmax(1) != y).cpu())
    return Outcome(torch.cat(found), time.perf_counter() - start)


def evaluate_attack(
    model: nn.Module,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    labels: Tensor,  # [N]
    attack: Attack,
    seed: int,
    batch_size: int = BATCH_SIZE,
    on_batch: Callable[[Outcome], None] = lambda so_far: None,
    done: Outcome | None = None,
) -> Outcome:
    """Attack every image in evaluation mode.

    The attack's randomness depends on `seed` and the number of the batch only: an interrupted evaluation goes on with
    the same bits, and every network meets the same random starts, but for attacks that take what others or other
    targets left (`targeted`, `adaptive`) and draw for these images alone.

    Args:
        model, images, labels, attack, seed, batch_size: as above; images and model are on one device.
        on_batch: called after each batch with the outcome so far, and within it after each member of an attack.
        done: the outcome so far of an earlier call with the same arguments; nothing of it is done again.
    """
    done = Outcome(torch.zeros(0, dtype=torch.bool), 0.0) if done is None else done
    found, seconds, halfway = done.found, done.seconds, done.halfway
    if len(found) % batch_size and len(found) < len(labels):
        raise ValueError(f"{len(found)} images are done, which is no whole number of batches of {batch_size}")
    with evaluation_mode(model):
        for first in range(len(found), len(labels), batch_size):
            start = time.perf_counter() - seconds
            x, y = images[first : first + batch_size], labels[first : first + batch_size]
            generator = seeds.generator(x.device, seed, "attack", first // batch_size)
            if isinstance(attack, Strongest | Adaptive):

                def on_member(halfway: Halfway, found: Tensor = found, start: float = start) -> None:
                    on_batch(Outcome(found, time.perf_counter() - start, halfway))

                broken = attack.search(model, x, y, generator, halfway, on_member)[1]
            else:
                broken = attack.search(model, x, y, generator)[1]
            found, halfway = torch.cat((found, broken.cpu())), None
            seconds = time.perf_counter() - start
            on_batch(Outcome(found, seconds))
    return Outcome(found, seconds)


def worst_case(outcomes: Iterable[Outcome]) -> Outcome:
    """Combine attacks on the same images: an image is broken when any of them breaks it."""
    outcomes = tuple(outcomes)
    found = torch.stack([outcome.found for outcome in outcomes]).any(0)
    return Outcome(found, sum(outcome.seconds for outcome in outcomes))


def per_class(found: Tensor, labels: Tensor, classes: int) -> list[Accuracy | None]:
    """Return the accuracy of each class, None for a class of which there is no image."""
    labels = labels.cpu()
    return [accuracy(found[labels == c]) if (labels == c).any() else None for c in range(classes)]


@dataclass(frozen=True)
class Gradients:
    """How many images have a gradient of the loss that tells an attack nothing.

    Args:
        total: images, those classified correctly.
        zero: images whose gradient is exactly 0 in every pixel.
        bad: images whose gradient is not finite somewhere.
        zero_pixels: share of pixels, over all images, where it is exactly 0.
    """

    total: int
    zero: int
    bad: int
    zero_pixels: float


def input_gradients(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = BATCH_SIZE) -> Gradients:
    """Look at the gradient of the cross-entropy at the images that the model classifies correctly."""
    total = zero = bad = pixels = zero_pixels = 0
    with evaluation_mode(model), frozen(model):
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            x = x.detach().clone().requires_grad_()
            with torch.enable_grad():
                logits = model(x)
                (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)
            gradient = gradient[logits.argmax(1) == y].flatten(1)
            total += len(gradient)
            zero += int((gradient == 0).all(1).sum())
            bad += int((~gradient.isfinite()).any(1).sum())
            zero_pixels += int((gradient == 0).sum())
            pixels += gradient.numel()
    return Gradients(total, zero, bad, zero_pixels / max(pixels, 1))


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
