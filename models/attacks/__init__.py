"""Attacks by name, options in the name: `pgd-50-10`, `nes:samples=1000`, `autoattack`.

Each is made for a radius eps in the L-infinity norm and looks for misclassified images through `search`.
"""

import re
from typing import Any

from models.attacks.adaptive import Adaptive
from models.attacks.attack import Attack, Halfway, Strongest, check_classes
from models.attacks.dead_zones import continued, has_dead_zones, widened
from models.attacks.libraries import FOOLBOX, MEMBERS, AttackError, AutoAttackMember, Foolbox, autoattack
from models.attacks.linf import LinfAttack, fast, fgsm, margin, nfgsm, perturb, pgd, search
from models.attacks.smoothed import SmoothedAttack
from models.attacks.targeted import MultiTargeted, targeted
from models.attacks.transfer import Transfer
from models.attacks.wrappers import BPDA, EOT, backward_of, identity, soft_winners
from models.registry import Registry

__all__ = [
    "ATTACKS",
    "BPDA",
    "EOT",
    "Adaptive",
    "Attack",
    "AttackError",
    "AutoAttackMember",
    "Foolbox",
    "Halfway",
    "LinfAttack",
    "MultiTargeted",
    "SmoothedAttack",
    "Strongest",
    "Transfer",
    "autoattack",
    "backward_of",
    "check_classes",
    "continued",
    "fast",
    "fgsm",
    "has_dead_zones",
    "identity",
    "margin",
    "nfgsm",
    "perturb",
    "pgd",
    "search",
    "soft_winners",
    "targeted",
    "widened",
]


class _Attacks(Registry[Attack]):
    """A registry in which `pgd-50-10` stands for `pgd:steps=50,restarts=10`."""

    def parse(self, text: str) -> tuple[str, dict[str, Any]]:
        name, _, options = text.partition(":")
        short = re.fullmatch(r"pgd-(\d+)(?:-(\d+))?", name)
        if short is None:
            return super().parse(text)
        steps, restarts = short.groups(default="1")
        return super().parse(f"pgd:steps={steps},restarts={restarts},{options}")


ATTACKS: Registry[Attack] = _Attacks("attack")
"""Factories of attacks; their context is the radius eps."""


@ATTACKS.register("fgsm")
def _fgsm(eps: float) -> Attack:
    return fgsm(eps)


@ATTACKS.register("fast")
def _fast(eps: float) -> Attack:
    return fast(eps)


@ATTACKS.register("pgd")
def _pgd(eps: float, *, steps: int = 50, restarts: int = 1, step: float | None = None, loss: str = "ce") -> Attack:
    return pgd(eps, steps, step, restarts, loss)


@ATTACKS.register("targeted")
def _targeted(eps: float, *, steps: int = 50, targets: int = 9, step: float | None = None) -> Attack:
    return targeted(eps, steps, targets, step)


def _register_smoothed(name: str, distribution: str) -> None:
    @ATTACKS.register(name)
    def smoothed(
        eps: float,
        *,
        samples: int = 100,
        growth: int = 2,
        sigma: float | None = None,
        steps: int = 40,
        step: float | None = None,
        restarts: int = 1,
        momentum: float = 0.9,
    ) -> Attack:
        return SmoothedAttack(eps, distribution, samples, growth, sigma, steps, step, restarts, momentum, name)


_register_smoothed("nes", "gaussian")
_register_smoothed("spsa", "rademacher")


@ATTACKS.register("adaptive")
def _adaptive(
    eps: float,
    *,
    pgd_steps: int = 50,
    pgd_restarts: int = 3,
    targets: int = 9,
    samples: int = 100,
    growth: int = 2,
    steps: int = 40,
) -> Attack:
    return Adaptive(eps, pgd_steps, pgd_restarts, targets, samples, growth, steps)


@ATTACKS.register("autoattack")
def _autoattack(eps: float, *, steps: int = 100, targets: int = 9, queries: int = 5000) -> Attack:
    return autoattack(eps, steps, targets, queries)


def _register_member(name: str) -> None:
    @ATTACKS.register(name)
    def member(eps: float, *, steps: int = 100, targets: int = 9, queries: int = 5000) -> Attack:
        return AutoAttackMember(eps, name, steps, targets, queries)


def _register_foolbox(name: str) -> None:
    if FOOLBOX[name] == "Linf":

        @ATTACKS.register(name)
        def linf(eps: float, *, steps: int | None = None) -> Attack:
            return Foolbox(name, eps, steps)

    else:

        @ATTACKS.register(name)
        def other(eps: float, *, l2: float | None = None, steps: int | None = None) -> Attack:
            if l2 is None:
                raise AttackError(
                    f"attack {name!r} works in L2 and needs a radius of its own, such as {name}:l2=0.5 "
                    "(usual: 0.5 for CIFAR-10, 2 for MNIST)"
                )
            return Foolbox(name, l2, steps)


for _name in MEMBERS:
    _register_member(_name)
for _name in FOOLBOX:
    _register_foolbox(_name)
