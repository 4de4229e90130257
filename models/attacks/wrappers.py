"""Attacks on networks that hide their gradient: another backward pass (BPDA), an average over draws (EOT)."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.activations import KWinners
from models.attacks.attack import Attack

Kinds = type[nn.Module] | tuple[type[nn.Module], ...]
Smooth = Callable[[Any, Tensor], Tensor]
"""What stands for a module in the backward pass: (module, its input) -> a tensor like its output."""


@contextlib.contextmanager
def backward_of(model: nn.Module, kinds: Kinds, smooth: Smooth) -> Iterator[None]:
    """Within the block, modules of these kinds compute what they always did, but backpropagate through `smooth`.

    Raises:
        ValueError: the model has no such module, so that nothing would be replaced.
    """
    modules = [module for module in model.modules() if isinstance(module, kinds)]
    if not modules:
        raise ValueError(f"the model has no module of the kind whose backward pass is to be replaced, {kinds}")
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = _Substitute(module, module.forward, smooth)
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            del module.forward
            if own is not None:
                module.forward = own


class _Substitute:
    """The forward of one function and the backward of another."""

    def __init__(self, module: nn.Module, forward: Callable[[Tensor], Tensor], smooth: Smooth) -> None:
        self.module, self.forward, self.smooth = module, forward, smooth

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            value = self.forward(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return value
        return _ValueOfOneGradientOfOther.apply(value, self.smooth(self.module, x))


class _ValueOfOneGradientOfOther(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        if value.shape != other.shape:
            raise ValueError(f"the smooth function gave shape {tuple(other.shape)} instead of {tuple(value.shape)}")
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def identity(module: nn.Module, x: Tensor) -> Tensor:
    """Pass the gradient on as it is: the straight-through estimator."""
    return x


def soft_winners(module: KWinners, x: Tensor) -> Tensor:
    """Let k-WTA fade out below its threshold t instead of jumping there: x σ((x - t) / τ), τ a tenth of x's deviation.

    The mask's own gradient says nothing of the values that lose; here those near the threshold count too.
    """
    values = x.detach().flatten(2 if module.per == "channel" and x.dim() > 2 else 1)
    n = values.shape[-1]
    shape = (*values.shape[:-1], *(1,) * (x.dim() - values.dim() + 1))
    threshold = values.kthvalue(n - module.winners(n) + 1).values.reshape(shape)
    width = 0.1 * values.std(-1, correction=0).reshape(shape) + torch.finfo(x.dtype).tiny
    return x * ((x - threshold) / width).sigmoid()


@dataclass(frozen=True)
class BPDA:
    """Backward pass differentiable approximation (Athalye et al. 2018): an attack that sees other gradients.

    Values are the network's own, so what is found is misclassified by the network itself.

    Args:
        attack: the attack to run.
        kinds: kinds of modules whose backward pass is replaced.
        smooth: what to differentiate instead of such a module.
    """

    attack: Attack
    kinds: Kinds = KWinners
    smooth: Smooth = identity

    @property
    def name(self) -> str:
        """What to call it."""
        return f"bpda-{getattr(self.smooth, '__name__', 'smooth')}-{self.attack.name}"

    @property
    def norm(self) -> str:
        """The norm of the attack."""
        return self.attack.norm

    def search(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Run the attack on the model with the backward passes replaced.

        Raises:
            ValueError: the model has no module of these kinds.
        """
        with backward_of(model, self.kinds, self.smooth):
            return self.attack.search(model, x, y, generator)


class Mean(nn.Module):
    """The mean of a randomised model's logits over several draws."""

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        self.model, self.draws = model, draws

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, C, H, W] to logits [N, classes], the mean of `draws` passes."""
        total = self.model(x)
        for _ in range(self.draws - 1):
            total = total + self.model(x)
        return total / self.draws


@dataclass(frozen=True)
class EOT:
    """Expectation over transformation (Athalye et al. 2018): an attack on the mean logits of a randomised model.

    The gradient of the mean is the mean of the draws' gradients. The randomised model counts as misclassifying an image
    when its mean logits over `draws` draws do. The model's own random numbers come from the global generators, which
    are seeded from the attack's and put back afterwards.

    Args:
        attack: the attack to run.
        draws: passes for each value and gradient.
    """

    attack: Attack
    draws: int = 20

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")

    @property
    def name(self) -> str:
        """What to call it."""
        return f"eot-{self.draws}-{self.attack.name}"

    @property
    def norm(self) -> str:
        """The norm of the attack."""
        return self.attack.norm

    def search(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Run the attack on the mean of the model."""
        with global_seed(generator, x.device):
            return self.attack.search(Mean(model, self.draws), x, y, generator)


@contextlib.contextmanager
def global_seed(generator: torch.Generator, device: torch.device) -> Iterator[int]:
    """Seed torch's global generators from `generator` within the block, give the seed, and restore them afterwards."""
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.random.manual_seed(seed)
        yield seed
