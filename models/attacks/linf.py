"""The L-infinity gradient-sign family: FGSM, fast (RS-FGSM), N-FGSM and PGD are settings of one attack."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]  # logits [N, classes], labels [N] -> [N], or their sum []


@dataclass(frozen=True)
class LinfAttack:
    """x + noise, then `steps` times: add step · sign(∇ₓ loss), project to the ball |δ| ≤ eps if `clip`, and to [0, 1].

    Args:
        eps: radius of the ball, in the units of the images, which are in [0, 1].
        step: size of one step.
        steps: number of steps, each with one gradient.
        noise: half-width of the uniform random start; 0 starts at x.
        clip: whether to project to the ball. Without it δ can reach noise + steps · step (N-FGSM).
        restarts: random starts in an evaluation; an image counts as broken when any of them breaks it.
        loss: "ce", the cross-entropy, or "margin", the largest other logit minus the label's, which does not saturate
            where the network is sure of itself (Carlini & Wagner 2017).
        name: what to call it; two attacks that differ in this alone are equal.
    """

    eps: float
    step: float
    steps: int = 1
    noise: float = 0.0
    clip: bool = True
    restarts: int = 1
    loss: str = "ce"
    name: str = field(default="linf", compare=False)
    norm: ClassVar[str] = "Linf"

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 1:
            raise ValueError(f"eps must be in [0, 1], the range of the images, got {self.eps}")
        if not (self.step >= 0 and self.noise >= 0):
            raise ValueError(f"step and noise must not be negative, got step={self.step}, noise={self.noise}")
        if self.noise > 1:
            raise ValueError(f"noise must be at most 1, the range of the images, got {self.noise:g}")
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"steps and restarts must be at least 1, got {self.steps} and {self.restarts}")
        if self.restarts > 1 and self.noise == 0:
            raise ValueError(f"{self.restarts} restarts without noise would all be the same; give noise or restarts=1")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")

    def search(
        self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:  # [N, C, H, W] in [0, 1], [N] bool
        """Look for a misclassified image near each image; see `search`."""
        return search(model, x, y, self, generator)


def fgsm(eps: float) -> LinfAttack:
    """One step of eps from x (Goodfellow et al. 2015)."""
    return LinfAttack(eps, step=eps, name="fgsm")


def fast(eps: float) -> LinfAttack:
    """RS-FGSM: one step of 1.25 eps from a random point of the ball (Wong et al. 2020, Fast is better than free)."""
    return LinfAttack(eps, step=1.25 * eps, noise=eps, name="fast")


def nfgsm(eps: float, k: float = 2) -> LinfAttack:
    """N-FGSM: one step of eps from noise of k · eps, not projected to the ball (de Jorge et al. 2022).

    For training: its images are up to (k + 1) eps away, so it does not evaluate robustness within eps.
    """
    return LinfAttack(eps, step=eps, noise=k * eps, clip=False, name="nfgsm")


def pgd(eps: float, steps: int, step: float | None = None, restarts: int = 1, loss: str = "ce") -> LinfAttack:
    """`steps` steps of `step`, 2.5 eps / steps unless given, from a random point of the ball (Madry et al. 2018)."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    check_step(step, steps, eps)
    name = f"pgd-{steps}" + (f"-{restarts}" if restarts > 1 else "")
    return LinfAttack(eps, 2.5 * eps / steps if step is None else step, steps, eps, True, restarts, loss, name)


def check_step(step: float | None, steps: int, eps: float) -> None:
    """Raise a ValueError for a step that was given and is larger than the images' range, or too small to reach eps."""
    if step is None:
        return
    if not 0 <= step <= 1:
        raise ValueError(f"step must be in [0, 1], the range of the images, such as 2/255, got {step:g}")
    if step * steps < eps * (1 - 1e-9):
        raise ValueError(f"step is too small: {steps} steps of {step:.4g} go {step * steps:.4g}, and eps is {eps:.4g}")


def perturb(
    model: nn.Module,
    x: Tensor,  # [N, C, H, W] in [0, 1]
    y: Tensor,  # [N]
    attack: LinfAttack,
    generator: torch.Generator,
    loss_scale: float = 1.0,
) -> Tensor:  # [N, C, H, W] in [0, 1]
    """Perturb every image from one random start. This is the attack of adversarial training.

    The model runs in the mode it is in (in training mode batch norm sees the perturbed batch) and keeps its mode, its
    parameters and their `.grad`. The generator, on x's device, gives the noise.

    Args:
        model, x, y, attack, generator: as above. Of a model wrapped for distributed training give the inner module: the
            gradient is that of the images alone, which is nobody else's business.
        loss_scale: factor of the loss. The sign is the same, but under fp16 autocast small gradients would be rounded
            to 0 on their way back, and sign(0) is no step. A factor so large that they overflow to NaN does the same.
    """
    return ascend(model, x, random_start(x, attack.noise, generator), y, attack, loss_scale)


def ascend(
    model: nn.Module,
    x: Tensor,  # [N, C, H, W] in [0, 1]
    start: Tensor,  # [N, C, H, W] in [0, 1]
    y: Tensor,  # [N]
    attack: LinfAttack,
    loss_scale: float = 1.0,
    loss: Loss | None = None,
) -> Tensor:  # [N, C, H, W] in [0, 1]
    """Do the attack's steps from a given start, up its loss or another `loss`, (logits, y) -> [N] or []."""
    with frozen(model):
        for _ in range(attack.steps):
            _, start = _step(model, x, start, y, attack, loss_scale, loss)
    return start


def search(
    model: nn.Module,
    x: Tensor,  # [N, C, H, W] in [0, 1]
    y: Tensor,  # [N]
    attack: LinfAttack,
    generator: torch.Generator,
    target: Tensor | None = None,  # [N]
) -> tuple[Tensor, Tensor]:  # [N, C, H, W] in [0, 1], [N] bool
    """Look for a misclassified image near each image, and say for which one was found.

    An image leaves the search as soon as the model misclassifies it or a point on its path, so easy images cost
    little. Where none is found the last point of the last restart is returned. Call it in evaluation mode: images must
    not influence each other. With targets, steps go up the target's logit minus the label's, not the attack's loss.
    """
    adversarial = x.clone()
    with torch.no_grad():
        found = misclassified(model(x), y)
    with frozen(model):
        for _ in range(attack.restarts):
            todo = (~found).nonzero().squeeze(1)
            points = random_start(x, attack.noise, generator)[todo]
            for _ in range(attack.steps):
                loss = None if target is None else _toward(target[todo])
                logits, moved = _step(model, x[todo], points, y[todo], attack, loss=loss)
                todo, points = _settle(todo, points, moved, logits, y, adversarial, found)
            with torch.no_grad():
                logits = model(points) if len(todo) else points.new_zeros(0, 1)
            todo, points = _settle(todo, points, points, logits, y, adversarial, found)
            adversarial[todo] = points
    return adversarial, found


def _settle(
    todo: Tensor, points: Tensor, moved: Tensor, logits: Tensor, y: Tensor, adversarial: Tensor, found: Tensor
) -> tuple[Tensor, Tensor]:
    """Record the points that the logits show to be misclassified; return the other images and where they moved to."""
    wrong = misclassified(logits, y[todo])
    adversarial[todo[wrong]] = points[wrong]
    found[todo[wrong]] = True
    return todo[~wrong], moved[~wrong]


def random_start(x: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Return images [N, C, H, W] moved by uniform noise of half-width `noise` and cut to [0, 1]."""
    if noise == 0:
        return x.detach().clone()
    return (x + torch.empty_like(x).uniform_(-noise, noise, generator=generator)).clamp(0, 1)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:  # [N, classes], [N] -> [N] bool
    """Say which labels are not what the logits say, as where they are not finite: NaN is the largest to argmax."""
    return (logits.argmax(1) != y) | ~logits.isfinite().all(1)


def margin(logits: Tensor, y: Tensor) -> Tensor:  # [N]
    """Return for logits [N, classes] the largest other logit minus the label's: positive where y [N] is not said."""
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - logits.gather(1, y[:, None])[:, 0]


def _toward(target: Tensor) -> Loss:
    """Return the loss that is the target's logit minus the label's."""
    return lambda logits, y: (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]


LOSSES: dict[str, Loss] = {"ce": lambda logits, y: F.cross_entropy(logits, y, reduction="none"), "margin": margin}


def _step(
    model: nn.Module,
    x: Tensor,
    point: Tensor,
    y: Tensor,
    attack: LinfAttack,
    loss_scale: float = 1.0,
    loss: Loss | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the logits at `point` and the point one step up the loss."""
    if len(x) == 0:
        return x.new_zeros(0, 1), point
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(point)
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = (loss or LOSSES[attack.loss])(exact, y).sum() * loss_scale
        (gradient,) = torch.autograd.grad(total, point)
    with torch.no_grad():
        moved = point + attack.step * gradient.nan_to_num(nan=0.0).sign()
        if attack.clip:
            moved = x + (moved - x).clamp(-attack.eps, attack.eps)
        return logits.detach(), moved.clamp(0, 1)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Ask for no gradient of the parameters meanwhile, which saves their share of the backward pass."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
