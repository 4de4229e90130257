"""Attacks made on one network and tried on another."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.attacks.linf import LinfAttack, misclassified, perturb


@dataclass(frozen=True)
class Transfer:
    """Perturb images on `source` and count which of them another network misclassifies.

    Such images owe nothing to the attacked network's gradient. If they break it where its own gradient does not, that
    gradient is masked. Points are followed to the end on the source, whether or not it is fooled on the way.

    Args:
        source: the network to make the images on, in evaluation mode, on the device of the images.
        attack: how to make them; each of its restarts is tried.
        origin: what is known of the source, such as its file and digest, for the record of the evaluation.
    """

    source: nn.Module = field(repr=False)
    attack: LinfAttack
    origin: str = ""
    norm: ClassVar[str] = "Linf"

    @property
    def name(self) -> str:
        """What to call it."""
        return f"transfer-{self.attack.name}"

    def search(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Try the images of each restart on the model."""
        adversarial = x.clone()
        with torch.no_grad():
            found = misclassified(model(x), y)
        for _ in range(self.attack.restarts):
            todo = (~found).nonzero().squeeze(1)
            if len(todo) == 0:
                break
            points = perturb(self.source, x[todo], y[todo], self.attack, generator)
            adversarial[todo] = points
            with torch.no_grad():
                found[todo] = misclassified(model(points), y[todo])
        return adversarial, found
