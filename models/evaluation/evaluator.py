"""What an evaluation consists of: the attacks asked for, the checks that they did not fail, and curves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from models.activations import KWinners
from models.attacks import ATTACKS, BPDA, Attack, Transfer, fgsm, pgd, soft_winners
from models.evaluation import Accuracy, Gradients, Outcome, accuracy, sanity
from models.evaluation.sanity import Attacked, Verdict

RADII = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3)  # of eps
STEPS, FEW_STEPS = (1, 2, 5, 10, 20, 50, 100), (10, 50)
RESTARTS = 10
_STEPS_ELSEWHERE = 20

_BY_GRADIENT = ("fgsm", "fast", "pgd", "targeted", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "deepfool", "fmn")
_WITHOUT = ("square", "nes", "spsa", "hopskipjump")

Do = Callable[[str, Attack, int, int], Outcome]
"""Makes an attack: (what to call it, the attack, how many of the images it is made on, its seed) -> the outcome."""
Point = tuple[float, Accuracy]


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Args:
        eps: radius in L-infinity, above 0.
        attacks: the attacks asked for, by name.
        images: how many images they are made on.
        checked: how many of these, from the first, checks and curves are made on; 0 for none.
        curves: whether to draw curves, over more radii and numbers of steps than the checks need.
        seed: of the attacks.
    """

    eps: float
    attacks: Mapping[str, Attack]
    images: int
    checked: int
    curves: bool
    seed: int

    @property
    def radii(self) -> tuple[float, ...]:
        """Radii to attack with, the last one 1, which allows any image."""
        return (*(r * self.eps for r in RADII if r * self.eps < 1), 1.0) if self.curves else (1.0,)

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of steps to attack with."""
        return STEPS if self.curves else FEW_STEPS


def attack_all(plan: Plan, do: Do) -> dict[str, Outcome]:
    """Make the attacks asked for."""
    return {name: do(name, attack, plan.images, plan.seed) for name, attack in plan.attacks.items()}


def check(
    plan: Plan, given: Mapping[str, Outcome], model: nn.Module, classes: int, gradients: Gradients, do: Do
) -> list[Verdict]:
    """Judge the attacks by what they and some further ones find on the images to be checked.

    Args:
        plan: what is to be done.
        given: outcomes of the attacks asked for.
        model: the network, of `classes` classes.
        gradients: what `input_gradients` says of the network at the images.
        do: makes a further attack.
    """

    def further(name: str, attack: Attack) -> Attacked:
        return Attacked(name, do(name, attack, plan.checked, plan.seed).found)

    with_restarts = further("PGD-50-3", pgd(plan.eps, 50, restarts=3))
    on_margin = further("PGD-50 on the margin", pgd(plan.eps, 50, loss="margin"))
    nes = further("NES", ATTACKS.create("nes:growth=1", plan.eps))
    by_gradient = _together("attacks by gradient", [with_restarts, on_margin, *_of(plan, given, _BY_GRADIENT)])
    without = _together("attacks without gradient", [nes, *_of(plan, given, _WITHOUT)])
    over_radii = [further(*_of_radius(radius)) for radius in plan.radii]
    verdicts = [
        sanity.falls_to_chance("accuracy falls to chance as ε grows", over_radii[-1], classes),
        sanity.more_never_helps(
            "more steps never help the network", [further(*_of_steps(plan.eps, steps)) for steps in plan.steps]
        ),
        sanity.never_beats("FGSM never beats PGD", further("FGSM", fgsm(plan.eps)), with_restarts),
        sanity.never_beats("attacks without gradient never beat those by gradient", without, by_gradient),
        sanity.has_gradients("gradients are not 0", gradients),
    ]
    if thorough := _of(plan, given, ("autoattack",)):
        usual = _together("PGD", [with_restarts, *_of(plan, given, ("pgd",))])
        title = "AutoAttack finds little that PGD does not"
        verdicts.append(sanity.finds_little_more(title, usual, thorough[0]))
    if len(over_radii) > 1:
        verdicts.insert(1, sanity.more_never_helps("a larger ε never helps the network", over_radii))
    if any(isinstance(module, KWinners) for module in model.modules()):
        relaxed = further("PGD by relaxed gradients", BPDA(pgd(plan.eps, 50, loss="margin"), KWinners, soft_winners))
        verdicts.append(sanity.never_beats("relaxed gradients of k-WTA never beat its own", relaxed, by_gradient))
    return verdicts


def curves(plan: Plan, clean: Outcome, do: Do) -> dict[str, list[Point]]:
    """Return accuracy over "eps", "steps" and "restarts" of PGD, on the images to be checked."""

    def point(at: float, name: str, attack: Attack) -> Point:
        return at, do(name, attack, plan.checked, plan.seed).accuracy

    starts = [
        do(f"start {number + 1}", pgd(plan.eps, _STEPS_ELSEWHERE), plan.checked, plan.seed + number).found
        for number in range(RESTARTS)
    ]
    so_far = torch.stack(starts).cumsum(0) > 0
    return {
        "eps": [
            (0.0, accuracy(clean.found[: plan.checked])),
            *(point(radius, *_of_radius(radius)) for radius in plan.radii if radius <= RADII[-1] * plan.eps),
        ],
        "steps": [point(steps, *_of_steps(plan.eps, steps)) for steps in plan.steps],
        "restarts": [(number + 1, accuracy(found)) for number, found in enumerate(so_far)],
    }


def _of_radius(radius: float) -> tuple[str, Attack]:
    return f"PGD at ε = {radius:.3g}", pgd(radius, _STEPS_ELSEWHERE)


def _of_steps(eps: float, steps: int) -> tuple[str, Attack]:
    return f"PGD-{steps}", pgd(eps, steps)


def _of(plan: Plan, given: Mapping[str, Outcome], kinds: Sequence[str]) -> list[Attacked]:
    """Return those attacks asked for that are of these kinds; a transferred one uses no gradient of this network."""

    def kind(name: str) -> str:
        return "nes" if isinstance(plan.attacks[name], Transfer) else ATTACKS.parse(name)[0]

    return [Attacked(name, o.found[: plan.checked]) for name, o in given.items() if kind(name) in kinds]


def _together(name: str, attacks: Sequence[Attacked]) -> Attacked:
    names = ", ".join(attack.name for attack in attacks)
    return Attacked(f"{name} ({names})", torch.stack([attack.found for attack in attacks]).any(0))
