"""The attack that an evaluation of activation functions needs: one member for each way to hide a gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import kafops
from models.activations import KWinners
from models.attacks.attack import Attack, Halfway, Strongest
from models.attacks.dead_zones import continued, has_dead_zones, widened
from models.attacks.linf import LinfAttack, pgd
from models.attacks.smoothed import SmoothedAttack
from models.attacks.targeted import MultiTargeted, targeted
from models.attacks.wrappers import BPDA, identity, soft_winners


@dataclass(frozen=True)
class Adaptive:
    """For each image the worst of PGD on the margin and toward each class, PGD by other gradients, and NES.

    What an activation can do to hide a network's weakness from an attack, and what finds it all the same:

    - It makes logits so large that the cross-entropy, and its gradient, round to 0: the margin of the logits does not.
    - It jumps, so that its gradient is of another function than the one that counts. k-WTA does: its gradient is that
      of the current winners, and a small step changes them. BPDA takes the gradient of the identity, and that of a
      gate that fades out below the threshold, which sees losers that are about to win (only where there is a k-WTA).
    - It is flat far from where it was learned. KAF without a base is: BPDA takes the slope of curves that go on as
      straight lines beyond their dictionary, and of curves of wider kernels, which reach across gaps, too (only where
      there is such a KAF).
    - It makes ridges between classes, on whose other side is a class that the margin never follows: a search toward
      each of the likeliest classes does (Gowal et al. 2019, An alternative surrogate loss for PGD-based attacks).
    - It is flat or jagged in any other way: NES takes no gradient at all, but the slope of the margin smoothed over a
      neighbourhood as large as the ball, which is what broke k-WTA (Tramèr et al. 2020, On adaptive attacks).

    Later members get the images that the earlier ones left. NES costs most, so it comes last.

    Args:
        eps: radius of the ball, in the units of the images, which are in [0, 1].
        pgd_steps, pgd_restarts: of PGD and of each BPDA.
        targets: classes aimed at, from one start of pgd_steps steps each. An image that nothing breaks costs
            pgd_steps · (pgd_restarts + targets) gradients, 600 with the defaults where PGD-50-10 takes 500, and
            pgd_steps · pgd_restarts for each BPDA: 900 in all with KAF.
        samples, growth, steps: of NES, see `SmoothedAttack`: with the defaults up to 12,000 outputs an image.
    """

    eps: float
    pgd_steps: int = 50
    pgd_restarts: int = 3
    targets: int = 9
    samples: int = 100
    growth: int = 2
    steps: int = 40
    name: ClassVar[str] = "adaptive"
    norm: ClassVar[str] = "Linf"

    def __post_init__(self) -> None:
        self._on_margin(), self._targeted(), self._gradient_free()

    def members(self, model: nn.Module) -> tuple[Attack, ...]:
        """Return the attacks that this model calls for, in the order in which they are run."""
        on_margin = self._on_margin()
        by_other_gradients: list[Attack] = []
        if any(isinstance(module, KWinners) for module in model.modules()):
            by_other_gradients += (BPDA(on_margin, KWinners, smooth) for smooth in (soft_winners, identity))
        if has_dead_zones(model):
            by_other_gradients += (BPDA(on_margin, kafops.KAF, smooth) for smooth in (continued, widened))
        return (on_margin, self._targeted(), *by_other_gradients, self._gradient_free())

    def search(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        generator: torch.Generator,
        halfway: Halfway | None = None,
        on_member: Callable[[Halfway], None] = lambda halfway: None,
    ) -> tuple[Tensor, Tensor]:
        """Let one member after the other look for a misclassified image near each image that is left."""
        return Strongest(self.name, self.members(model)).search(model, x, y, generator, halfway, on_member)

    def _on_margin(self) -> LinfAttack:
        return pgd(self.eps, self.pgd_steps, restarts=self.pgd_restarts, loss="margin")

    def _targeted(self) -> MultiTargeted:
        return targeted(self.eps, self.pgd_steps, self.targets)

    def _gradient_free(self) -> SmoothedAttack:
        return SmoothedAttack(self.eps, "gaussian", self.samples, self.growth, steps=self.steps)
