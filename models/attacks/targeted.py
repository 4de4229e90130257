"""An attack that aims at one class after the other."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.attacks.linf import LinfAttack, misclassified, pgd, search


@dataclass(frozen=True)
class MultiTargeted:
    """PGD toward one other class at a time, up the difference of its logit and the label's (Gowal et al. 2019).

    The margin follows whichever class is nearest at each step, and never sees one behind a ridge. Here the first search
    aims at the class with the largest other logit at the image itself, the next one at the second largest.

    Args:
        attack: one search: its steps, its radius, its random start and restarts. Its loss is not used.
        targets: how many classes to aim at, at most all others.
    """

    attack: LinfAttack
    targets: int = 9
    norm: ClassVar[str] = "Linf"

    def __post_init__(self) -> None:
        if self.targets < 1:
            raise ValueError(f"targets must be at least 1, got {self.targets}")

    @property
    def name(self) -> str:
        """What to call it."""
        return f"targeted-{self.targets}-{self.attack.name}"

    def search(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Aim at one class after the other, for the images that are left."""
        adversarial = x.clone()
        with torch.no_grad():
            logits = model(x)
        found = misclassified(logits, y)
        others = logits.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)  # the label comes last
        for target in others[:, : min(self.targets, logits.shape[1] - 1)].unbind(1):
            todo = (~found).nonzero().squeeze(1)
            if len(todo) == 0:
                break
            found_now = search(model, x[todo], y[todo], self.attack, generator, target[todo])
            adversarial[todo], found[todo] = found_now
        return adversarial, found


def targeted(eps: float, steps: int = 50, targets: int = 9, step: float | None = None) -> MultiTargeted:
    """Aim at up to `targets` classes with `steps` steps of `step` each: eps / 4, or more where there are few.

    PGD's own steps, 2.5 eps / steps, are so small that learned curves, which wave, hold them up.
    """
    if step is None:
        step = min(1.0, max(2.5 * eps / max(steps, 1), eps / 4))
    return MultiTargeted(pgd(eps, steps, step), targets)
