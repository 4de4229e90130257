"""The watch for catastrophic overfitting: robust accuracy on a few held-out images after each epoch."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attacks.linf import LinfAttack, pgd
from models.evaluation import evaluate_attack, evaluate_clean
from models.support import seeds
from models.training.recipe import Recipe


@dataclass(frozen=True)
class Watched:
    """Accuracies on the held-out images; `robust` is None where nothing is attacked."""

    clean: float
    robust: float | None

    @property
    def score(self) -> float:
        """What the best checkpoint is chosen by: robust accuracy, or clean accuracy in training without attack."""
        return self.clean if self.robust is None else self.robust


class Watch:
    """Attacks the same images with the same random starts each time, so that its numbers can be compared.

    Single-step adversarial training can lose all robustness within an epoch, while its own loss looks better than ever
    (Wong et al. 2020, "catastrophic overfitting"); PGD of a few steps sees it.
    """

    def __init__(self, recipe: Recipe, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels, self.drop = images, labels, recipe.watch_drop
        attacks = recipe.make_method().attacks
        self.attack: LinfAttack | None = pgd(recipe.eps, recipe.watch_steps) if attacks else None

    def look(self, model: nn.Module, device: torch.device) -> Watched:
        """Return the accuracies of the network, which is put into evaluation mode meanwhile."""
        images, labels = self.images.to(device), self.labels.to(device)
        clean = evaluate_clean(model, images, labels).accuracy.value
        if self.attack is None:
            return Watched(clean, None)
        robust = evaluate_attack(model, images, labels, self.attack, seeds.derived("watch"))
        return Watched(clean, robust.accuracy.value)

    def collapsed(self, best: float, now: Watched) -> bool:
        """Say whether robustness is lost: its accuracy is more than `drop` below the best."""
        return now.robust is not None and self.drop > 0 and now.robust < best - self.drop
