"""Attacks of other libraries behind our interface: AutoAttack's (pyautoattack) and foolbox's.

Whatever a library says of its result, an image counts as found when the point that it returns, projected to the ball
of the attack's norm and radius and to [0, 1], is misclassified. Only images that the model classifies correctly are
given to a library. It sees a model whose parameters ask for no gradient, global generators seeded from ours, and no
way to print or log; the generators are put back afterwards.
"""

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.attacks.attack import Strongest
from models.attacks.linf import frozen, misclassified
from models.attacks.wrappers import global_seed
from models.support.errors import UserError

MEMBERS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square")
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
FOOLBOX = {"deepfool": "Linf", "fmn": "Linf", "hopskipjump": "Linf", "cw": "L2", "boundary": "L2"}
_LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}
_PORTION = 32  # images that a foolbox attack gets at once: some keep a thousand copies of each
_NOISE_IMAGES = 64

_silent = logging.Logger("pyautoattack")  # no child of the root: what it is told goes nowhere
_silent.addHandler(logging.NullHandler())


class AttackError(UserError):
    """An attack that cannot be had, or not on this network."""


@dataclass(frozen=True)
class AutoAttackMember:
    """One attack of AutoAttack (Croce & Hein 2020), by pyautoattack.

    Args:
        eps: radius of the ball, in the units of the images, which are in [0, 1].
        name: "apgd-ce", "apgd-dlr", "apgd-t" (PGD that finds its step size, on the cross-entropy, the difference of
            logits ratio and its targeted form), "fab-t" (the nearest point of the decision boundary), or "square"
            (random search, without gradients).
        steps: of apgd and fab.
        targets: classes that apgd-t and fab-t aim at, at most one less than there are.
        queries: images that square shows to the network.

    Raises:
        AttackError: pyautoattack is not installed.
    """

    eps: float
    name: str
    steps: int = 100
    targets: int = 9
    queries: int = 5000
    norm: ClassVar[str] = "Linf"

    def __post_init__(self) -> None:
        if self.name not in MEMBERS:
            raise ValueError(f"AutoAttack's members here are {', '.join(MEMBERS)}, got {self.name!r}")
        if not 0 <= self.eps <= 1:
            raise ValueError(f"eps must be in [0, 1], the range of the images, got {self.eps}")
        if min(self.steps, self.targets, self.queries) < 1:
            raise ValueError(
                f"steps, targets and queries must be at least 1, got {self.steps}, {self.targets} and {self.queries}"
            )
        _library("pyautoattack", self.name)

    def search(
        self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:  # [N, C, H, W] in [0, 1], [N] bool
        """Look for a misclassified image near each image.

        Raises:
            AttackError: the network has fewer classes than the attack's loss needs.
        """
        return _search(self, model, x, y, generator, self.eps, self._points)

    def _points(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator, seed: int) -> Tensor:
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        self.check_classes(classes)
        attack = self._library_attack(_Plain(model, x.dtype), min(self.targets, classes - 1), seed, x.device)
        return attack.perturb(x.float().contiguous(), y).to(x.dtype)

    def check_classes(self, classes: int) -> None:
        """Raise an AttackError where a network has too few classes for the attack's loss."""
        least = _LEAST_CLASSES.get(self.name, 2)
        if classes < least:
            raise AttackError(
                f"attack {self.name!r} needs a network with at least {least} classes, this one has {classes}; "
                "use apgd-ce, fab-t and square"
            )

    def _library_attack(self, model: nn.Module, targets: int, seed: int, device: torch.device) -> Any:
        apgd = _library("pyautoattack.autopgd_base", self.name)
        common = {"norm": "Linf", "eps": self.eps, "seed": seed, "device": device, "verbose": False}
        if self.name == "apgd-t":
            return apgd.APGDAttack_targeted(
                model, n_iter=self.steps, n_target_classes=targets, logger=_silent, **common
            )
        if self.name.startswith("apgd"):
            return apgd.APGDAttack(model, n_iter=self.steps, loss=self.name[5:], logger=_silent, **common)
        if self.name == "fab-t":
            fab = _library("pyautoattack.fab_pt", self.name).FABAttack_PT
            return fab(model, n_iter=self.steps, n_restarts=1, targeted=True, n_target_classes=targets, **common)
        square = _library("pyautoattack.square", self.name).SquareAttack
        return square(model, n_queries=self.queries, p_init=0.8, resc_schedule=False, **common)


def autoattack(eps: float, steps: int = 100, targets: int = 9, queries: int = 5000) -> Strongest:
    """Return AutoAttack's standard ensemble: apgd-ce, apgd-t, fab-t and square, each on what the earlier ones left.

    Robust accuracy under other settings than the defaults is not comparable with published AutoAttack numbers.
    """
    return Strongest("autoattack", tuple(AutoAttackMember(eps, name, steps, targets, queries) for name in STANDARD))


@dataclass(frozen=True)
class Foolbox:
    """An attack of foolbox (Rauber et al. 2020) that looks for the nearest misclassified image.

    Args:
        name: "deepfool" (Moosavi-Dezfooli et al. 2016) and "fmn" (Pintor et al. 2021) by gradient in L-infinity, "cw"
            (Carlini & Wagner 2017) by gradient in L2; "hopskipjump" (Chen et al. 2020) in L-infinity and "boundary"
            (Brendel et al. 2018) in L2 by the network's decisions alone.
        radius: of the ball in the attack's norm; those of L2 and of L-infinity do not compare.
        steps: of the attack; None for a number that takes seconds for an image rather than minutes.

    Raises:
        AttackError: foolbox is not installed.
    """

    name: str
    radius: float
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.name not in FOOLBOX:
            raise ValueError(f"foolbox's attacks here are {', '.join(FOOLBOX)}, got {self.name!r}")
        if not 0 <= self.radius < float("inf"):
            raise ValueError(f"the radius of {self.name!r} must not be negative, got {self.radius}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, or None, got {self.steps}")
        _library("foolbox", self.name)

    @property
    def norm(self) -> str:
        """The norm that the attack minimises."""
        return FOOLBOX[self.name]

    def search(
        self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:  # [N, C, H, W] in [0, 1], [N] bool
        """Look for a misclassified image near each image.

        The attacks by decisions start from the nearest image, of the batch or of 64 of noise, that the network puts
        into another class. Where there is none an image is left alone.
        """
        farthest = 1.0 if self.norm == "Linf" else x[0].numel() ** 0.5
        if self.radius > farthest:
            raise ValueError(
                f"the radius of {self.name!r} must be at most {farthest:.4g}, as far as images can be apart in "
                f"{self.norm}, got {self.radius:g}"
            )
        return _search(self, model, x, y, generator, self.radius, self._points)

    def _points(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator, seed: int) -> Tensor:
        foolbox = _library("foolbox", self.name)
        attack, arguments = self._library_attack(foolbox.attacks), {}
        target = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        points = x.clone()
        todo = torch.arange(len(x), device=x.device)
        if self.name in ("hopskipjump", "boundary"):
            starts, there = _starts(model, x, y, generator)
            todo = todo[there]
        for part in todo.split(_PORTION) if len(todo) else ():
            if self.name in ("hopskipjump", "boundary"):
                arguments = {"starting_points": starts[part]}
            with _no_root_handler():
                points[part] = attack.run(target, x[part], foolbox.criteria.Misclassification(y[part]), **arguments)
        return points

    def _library_attack(self, attacks: Any) -> Any:
        if self.name == "deepfool":
            return attacks.LinfDeepFoolAttack(steps=self.steps or 50)
        if self.name == "fmn":
            return attacks.LInfFMNAttack(steps=self.steps or 100)
        if self.name == "cw":
            return attacks.L2CarliniWagnerAttack(steps=self.steps or 200, binary_search_steps=6, initial_const=0.1)
        if self.name == "hopskipjump":
            return attacks.HopSkipJumpAttack(steps=self.steps or 20, constraint="linf")
        return attacks.BoundaryAttack(steps=self.steps or 2000)


class _Plain(nn.Module):
    """A model as pyautoattack wants it: float32 in and out, and gradients contiguous, of which it takes views."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(Tensor.contiguous)
        return self.model(x.to(self.dtype)).float()


def project(points: Tensor, x: Tensor, radius: float, norm: str) -> Tensor:
    """Return the points [N, C, H, W], put into [0, 1] and the ball of that norm around images x, in this order.

    What is not finite becomes x: it is no image.
    """
    change = torch.where(points.isfinite(), points, x).clamp(0, 1) - x
    if norm == "Linf":
        return (x + change.clamp(-radius, radius)).clamp(0, 1)
    length = change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (x + change * (radius / length.clamp(min=1e-12)).clamp(max=1)).clamp(0, 1)


def _search(
    attack: AutoAttackMember | Foolbox,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    radius: float,
    points: Callable[[nn.Module, Tensor, Tensor, torch.Generator, int], Tensor],
) -> tuple[Tensor, Tensor]:
    adversarial = x.clone()
    with torch.no_grad():
        found = misclassified(model(x), y)
    todo = (~found).nonzero().squeeze(1)
    if len(todo) == 0:
        return adversarial, found
    with torch.enable_grad(), frozen(model), global_seed(generator, x.device) as seed:
        there = points(model, x[todo], y[todo], generator, seed).detach()
    adversarial[todo] = project(there, x[todo], radius, attack.norm)
    with torch.no_grad():
        found[todo] = misclassified(model(adversarial[todo]), y[todo])
    return adversarial, found


def _starts(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return for each image the nearest one that the model puts into another class, and whether there is one."""
    noise = torch.rand((_NOISE_IMAGES, *x.shape[1:]), generator=generator, dtype=x.dtype, device=x.device)
    pool = torch.cat((x, noise))
    with torch.no_grad():
        said = model(pool).argmax(1)
    apart = torch.cdist(x.flatten(1), pool.flatten(1)).masked_fill(said == y[:, None], torch.inf)
    least, which = apart.min(1)
    return pool[which], least.isfinite()


def _library(module: str, attack: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise AttackError(
            f"attack {attack!r} needs the package {package}, which cannot be imported ({error}); "
            "run `pip install 'kafops[attacks]'`"
        ) from error


@contextlib.contextmanager
def _no_root_handler() -> Iterator[None]:
    """Keep foolbox's calls of logging.info from installing a handler that writes to stderr."""
    handler = logging.NullHandler()
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
