"""How a batch becomes a loss: standard training and the kinds of adversarial training, by name.

The single-step family (FGSM, RS-FGSM, N-FGSM) and PGD are one class with different attacks. Each method crafts on the
network in the mode that its paper does, training mode unless said, and every one but `free` updates once per batch.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attacks.linf import LinfAttack, ascend, fgsm, frozen, nfgsm, pgd
from models.evaluation import evaluation_mode
from models.registry import Registry
from models.training.noise import Noise


@dataclass(frozen=True)
class Step:
    """What a method works with in one step.

    Args:
        model: the network to call for the loss; under DDP the wrapped one.
        bare: the same network as it is, to craft on, so that no hook for parameters' gradients runs.
        loss: mean cross-entropy of logits and labels.
        noise: where random starts come from.
        scale: of mean losses whose gradients go through half precision; signs and directions do not depend on it.
    """

    model: nn.Module
    bare: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    noise: Noise
    scale: float = 1.0


@dataclass(frozen=True)
class Update:
    """A loss to descend, and the logits of the images it is about, for the training accuracy."""

    loss: Tensor
    logits: Tensor


class Method:
    """Turns batches into updates; the trainer differentiates each loss and steps the optimizer between them."""

    attacks = True
    updates = 1  # per batch

    def __call__(self, step: Step, x: Tensor, y: Tensor) -> Iterator[Update]:  # x [N, C, H, W] in [0, 1], y [N]
        """Yield the updates of a batch."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Return what the method carries from batch to batch, by image of the batch."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up the result of `state()`."""


METHODS: Registry[Method] = Registry("method")


@METHODS.register("standard", "clean")
class Standard(Method):
    """No attack."""

    attacks = False

    def __init__(self, eps: float) -> None:
        pass

    def __call__(self, step: Step, x: Tensor, y: Tensor) -> Iterator[Update]:
        """Yield the loss of the images themselves."""
        logits = step.model(x)
        yield Update(step.loss(logits, y), logits)


class Adversarial(Method):
    """The loss at the end of an attack on the loss (Goodfellow et al. 2015, Madry et al. 2018)."""

    def __init__(self, attack: LinfAttack, mode: str = "train") -> None:
        self.attack, self.mode = attack, _mode(mode)

    def __call__(self, step: Step, x: Tensor, y: Tensor) -> Iterator[Update]:
        """Yield the loss of the perturbed images."""
        logits = step.model(self.craft(step, x, y))
        yield Update(step.loss(logits, y), logits)

    def craft(self, step: Step, x: Tensor, y: Tensor) -> Tensor:
        """Return the perturbed images."""
        start = step.noise.around(x, self.attack.noise)
        with _mode_for_crafting(step.bare, self.mode):
            return ascend(step.bare, x, start, y, self.attack, step.scale / len(x))


@METHODS.register("fgsm")
def make_fgsm(eps: float, *, mode: str = "train") -> Method:
    """One step of eps from the image (Goodfellow et al. 2015). Collapses at large eps: see the watch."""
    return Adversarial(fgsm(eps), mode)


@METHODS.register("fast", "rs-fgsm")
def make_fast(eps: float, *, step: float = 1.25, mode: str = "train") -> Method:
    """One step of `step` · eps from a random point of the ball, projected to it (Wong et al. 2020)."""
    if not 0 < step <= 2:
        raise ValueError(f"step is in units of eps, above 0 and up to 2, which crosses the ball, got {step:g}")
    return Adversarial(LinfAttack(eps, step * eps, noise=eps), mode)


@METHODS.register("nfgsm", "n-fgsm")
def make_nfgsm(eps: float, *, k: float = 2.0, mode: str = "train") -> Method:
    """One step of eps from noise of half-width k · eps, not projected to the ball (de Jorge et al. 2022)."""
    return Adversarial(nfgsm(eps, k), mode)


@METHODS.register("pgd", "madry")
def make_pgd(eps: float, *, steps: int = 10, step: float | None = None, mode: str = "train") -> Method:
    """`steps` steps of `step`, 2.5 eps / steps unless given, from a random point of the ball (Madry et al. 2018)."""
    return Adversarial(pgd(eps, steps, step), mode)


@METHODS.register("free")
class Free(Method):
    """Each batch `m` times; one backward pass gives the update and the next step of the attack (Shafahi et al. 2019).

    The perturbation goes on from batch to batch. An epoch is still one pass over the images, with m updates a batch, so
    m times fewer epochs are comparable to other methods.
    """

    def __init__(self, eps: float, *, m: int = 8) -> None:
        if m < 1:
            raise ValueError(f"m, the replays of a batch, must be at least 1, got {m}")
        self.eps, self.updates = eps, m
        self.delta: Tensor | None = None

    def __call__(self, step: Step, x: Tensor, y: Tensor) -> Iterator[Update]:
        """Yield the loss of the images with the present perturbation, m times."""
        if self.delta is None or self.delta.shape[1:] != x.shape[1:]:
            self.delta = torch.zeros_like(x)
        if len(self.delta) < len(x):
            self.delta = torch.cat([self.delta, self.delta.new_zeros(len(x) - len(self.delta), *x.shape[1:])])
        for _ in range(self.updates):
            delta = self.delta[: len(x)].clone().requires_grad_()
            logits = step.model((x + delta).clamp(0, 1))
            yield Update(step.loss(logits, y), logits)
            if delta.grad is None:
                raise RuntimeError("the loss was not differentiated before the next replay")
            with torch.no_grad():
                self.delta[: len(x)] += self.eps * delta.grad.sign()
                self.delta.clamp_(-self.eps, self.eps)

    def state(self) -> dict[str, Tensor]:
        """Return the perturbation."""
        return {} if self.delta is None else {"delta": self.delta}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up the perturbation."""
        self.delta = state.get("delta")


@METHODS.register("trades")
class Trades(Method):
    """Cross-entropy of images + beta · KL(image ‖ perturbed), perturbed by an attack on that KL (Zhang et al. 2019).

    The attack starts from normal noise of 0.001 and runs in evaluation mode, as in the authors' code.
    """

    def __init__(
        self, eps: float, *, beta: float = 6.0, steps: int = 10, step: float | None = None, mode: str = "eval"
    ) -> None:
        if beta < 0:
            raise ValueError(f"beta must not be negative, got {beta}")
        self.attack, self.beta, self.mode = LinfAttack(eps, pgd(eps, steps, step).step, steps), beta, _mode(mode)

    def __call__(self, step: Step, x: Tensor, y: Tensor) -> Iterator[Update]:
        """Yield the loss of TRADES; the logits are those of the images themselves."""
        with _mode_for_crafting(step.bare, self.mode):
            with torch.no_grad():
                target = exact(step.bare(x)).softmax(1)
            start = (x + step.noise.normal(x, 0.001)).clamp(0, 1)

            def divergence(logits: Tensor, labels: Tensor) -> Tensor:
                return F.kl_div(logits.log_softmax(1), target, reduction="sum")

            perturbed = ascend(step.bare, x, start, y, self.attack, step.scale / len(x), divergence)
        logits, moved = step.model(x), step.model(perturbed)
        away = F.kl_div(exact(moved).log_softmax(1), exact(logits).softmax(1), reduction="batchmean")
        yield Update(step.loss(logits, y) + self.beta * away, logits)


# The authors' weights for eps of 1 to 16 / 255 on CIFAR-10.
GRADALIGN_WEIGHTS = (
    0.027, 0.036, 0.047, 0.063, 0.084, 0.112, 0.150, 0.200, 0.267, 0.356, 0.474, 0.632, 0.843, 1.124, 1.5, 2.0,
)  # fmt: skip


@METHODS.register("gradalign")
class GradAlign(Method):
    """FGSM + weight · (1 − mean cosine of ∇ₓL at x and at x + U(−eps, eps)) (Andriushchenko and Flammarion 2020).

    The regulariser is differentiated through the gradient at the random point; the one at x is held constant, and
    images with a zero gradient are left out, as in the authors' code. `weight` is theirs for eps up to 16/255 unless
    given.
    """

    def __init__(self, eps: float, *, weight: float | None = None) -> None:
        if weight is None:
            if not 1 / 255 <= eps <= 16 / 255:
                raise ValueError(
                    f"the authors of GradAlign give weights for eps from 1/255 to 16/255, got {eps:.4g}; "
                    "give one, as in gradalign:weight=0.2"
                )
            weight = float(np.interp(255 * eps, range(1, 17), GRADALIGN_WEIGHTS))
        if weight < 0:
            raise ValueError(f"weight must not be negative, got {weight}")
        self.eps, self.weight = eps, weight
        self.fgsm = Adversarial(fgsm(eps))

    def __call__(self, step: Step, x: Tensor, y: Tensor) -> Iterator[Update]:
        """Yield FGSM's loss and the regulariser."""
        misalignment = self.misalignment(step, x, y)
        for update in self.fgsm(step, x, y):
            yield Update(update.loss + self.weight * misalignment, update.logits)

    def misalignment(self, step: Step, x: Tensor, y: Tensor) -> Tensor:
        """Return 1 − the mean cosine, differentiable by the parameters."""
        with frozen(step.bare):
            at_image = _input_gradient(step, x, y, create_graph=False)
        at_random = _input_gradient(step, step.noise.around(x, self.eps), y, create_graph=True)
        # Under float16 a gradient can overflow; the loss must not become NaN for it, since the scaler then only skips.
        usable = _direction(at_image) & _direction(at_random.detach())
        if not usable.any():
            return at_random[usable].sum()  # 0, and differentiable all the same
        return 1 - F.cosine_similarity(_scaled(at_image[usable]), _scaled(at_random[usable]), eps=0.0).mean()


def exact(logits: Tensor) -> Tensor:
    """Return logits of half precision in float32, others as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _input_gradient(step: Step, x: Tensor, y: Tensor, create_graph: bool) -> Tensor:  # [N, C·H·W]
    x = x.detach().requires_grad_()
    loss = step.scale * F.cross_entropy(exact(step.bare(x)), y)
    return torch.autograd.grad(loss, x, create_graph=create_graph)[0].flatten(1)


def _direction(gradients: Tensor) -> Tensor:  # [N, *] -> [N] bool
    return gradients.any(1) & gradients.isfinite().all(1)


def _scaled(gradients: Tensor) -> Tensor:  # [N, *]
    """Bring each to a largest element of 1: of a confident image, squares would underflow."""
    return gradients / gradients.detach().abs().amax(1, keepdim=True)


def _mode(mode: str) -> str:
    if mode not in ("train", "eval"):
        raise ValueError(f"mode, of the network while images are perturbed, must be train or eval, got {mode}")
    return mode


def _mode_for_crafting(model: nn.Module, mode: str) -> contextlib.AbstractContextManager[None]:
    return evaluation_mode(model) if mode == "eval" else contextlib.nullcontext()
