"""What an evaluation asks of an attack, and an attack made of attacks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn


class Attack(Protocol):
    """Something that looks for a misclassified image near each image. Attacks are frozen dataclasses.

    Attributes:
        name: what to call it.
        norm: in which norm its images are near: "Linf", or "L2" for an attack that has a radius of its own.
    """

    @property
    def name(self) -> str:
        """What to call it."""

    @property
    def norm(self) -> str:
        """In which norm its images are near."""

    def search(
        self,
        model: nn.Module,
        x: Tensor,  # [N, C, H, W] in [0, 1]
        y: Tensor,  # [N]
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # [N, C, H, W] in [0, 1], [N] bool
        """Return an image within the radius of each image, and whether the model misclassifies it.

        Images that the model misclassifies as they are count as found, and come back untouched. The model is in
        evaluation mode; its parameters and their `.grad` are left alone. All randomness comes from `generator`.
        """
        ...


def check_classes(attack: Attack, classes: int) -> None:
    """Raise an AttackError where an attack, or a member of it, cannot be made on a network of so few classes."""
    for member in attack.members if isinstance(attack, Strongest) else (attack,):
        check = getattr(member, "check_classes", None)
        if check is not None:
            check(classes)


@dataclass(frozen=True)
class Halfway:
    """Where an attack made of attacks is between two of them, from which it can go on with the same bits.

    Args:
        members: how many are done.
        found: [N] bool, what they found.
        random: the generator's state.
    """

    members: int
    found: Tensor
    random: Tensor


@dataclass(frozen=True)
class Strongest:
    """For each image the first of several attacks that breaks it: later members get only the survivors."""

    name: str
    members: tuple[Attack, ...]
    norm: ClassVar[str] = "Linf"

    def __post_init__(self) -> None:
        others = [member.name for member in self.members if member.norm != self.norm]
        if not self.members or others:
            raise ValueError(
                f"{self.name} needs at least one member and all of norm {self.norm}, "
                f"got {len(self.members)} of which {others} have another"
            )

    def search(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        generator: torch.Generator,
        halfway: Halfway | None = None,
        on_member: Callable[[Halfway], None] = lambda halfway: None,
    ) -> tuple[Tensor, Tensor]:
        """Let one attack after the other look for a misclassified image near each image that is left.

        Args:
            model, x, y, generator: see `Attack.search`.
            halfway: where to go on; images that were found before come back as they are.
            on_member: called after each member but the last.
        """
        if len(x) and any(hasattr(member, "check_classes") for member in self.members):
            with torch.no_grad():
                check_classes(self, model(x[:1]).shape[1])
        adversarial = x.clone()
        found, done = torch.zeros_like(y, dtype=torch.bool), 0
        if halfway is not None:
            found, done = halfway.found.to(y.device), halfway.members
            generator.set_state(halfway.random)
        for number, member in enumerate(self.members[done:], done + 1):
            rest = (~found).nonzero().squeeze(1)
            if len(rest):
                adversarial[rest], found[rest] = member.search(model, x[rest], y[rest], generator)
            if number < len(self.members):
                on_member(Halfway(number, found.cpu(), generator.get_state()))
        return adversarial, found
