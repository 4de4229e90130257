"""How large signals and gradients are layer by layer, and what each activation does to them."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from models import taps
from models.networks.resnet import PostActivationBlock, ResNet


@dataclass(frozen=True)
class ActivationGradients:
    """One activation of a network: what it does to the gradient, behind a normalisation that divides its scale out.

    Args:
        name: of the module.
        output_std: root of the mean variance of a channel of its output, over images and positions.
        factor: sqrt(Σ_c E[f_c′²] / Σ_c Var f_c) for the inputs that there are; None for an activation that does not
            work on each element by itself, as k-WTA.
        normal_factor: the same for inputs x ~ N(0, 1), by quadrature.
    """

    name: str
    output_std: float
    factor: float | None
    normal_factor: float | None


@dataclass(frozen=True)
class NetworkGradients:
    """Norms in one network for one batch; None where something is not finite.

    Args:
        weights: gradient norm of the weights of each convolution, from the images on.
        trunk: root mean square of the gradient of the output of each block of a ResNet; empty for other networks.
        signals: forward, the root of the mean variance of a channel at the output of each block of a ResNet, of each
            activation in other networks.
        activations: what each activation does.
        growth: for each block of a post-activation ResNet the factor by which, by the reading of
            docs/exploding-gradients.md, it multiplies a gradient; empty for other networks, and where an activation has
            no factor.
    """

    weights: list[float | None]
    trunk: list[float | None]
    signals: list[float | None]
    activations: list[ActivationGradients]
    growth: list[float]

    @property
    def ratio(self) -> float | None:
        """The gradient norm of the first convolution over that of the last one."""
        first, last = self.weights[0], self.weights[-1]
        return None if first is None or not last else finite(first / last)


def measure(model: nn.Module, images: Tensor, labels: Tensor) -> NetworkGradients:
    """Measure norms in the forward and backward pass of the cross-entropy, in training mode, on a copy of the model.

    Dropout is left out, so that the numbers are those of the weights and images alone.

    Args:
        model: a network that calls its convolutions in the order of its modules.
        images: [N, C, H, W] in [0, 1].
        labels: [N].
    """
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.eval()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    blocks = list(model.blocks) if isinstance(model, ResNet) else []
    activations = taps.activations(model)
    inputs: dict[nn.Module, Tensor] = {}
    trunk: list[Tensor] = []

    def see(name: str, x: Tensor, y: Tensor) -> None:
        module = model.get_submodule(name)
        inputs[module] = x.detach()  # where a module is called twice, of the last time
        if module in blocks:
            trunk.append(y)

    watched = {name: m for name, m in model.named_modules() if name in activations or m in blocks}
    with taps.tapped(watched, see):
        loss = F.cross_entropy(model(images), labels)
        wanted = [c.weight for c in convolutions] + trunk
        gradients = torch.autograd.grad(loss, wanted)
    norms = [finite(g.double().norm()) for g in gradients[: len(convolutions)]]
    sizes = [finite(g.double().square().mean().sqrt()) for g in gradients[len(convolutions) :]]
    moments = {m: moments_at(m, inputs[m]) for m in activations.values() if m in inputs}
    described = [
        ActivationGradients(name, *_describe(m, inputs[m], moments[m]))
        for name, m in activations.items()
        if m in inputs
    ]
    signals = [finite(_variance(y).sqrt()) for y in trunk]
    if not blocks:
        signals = [finite(a.output_std) for a in described]
    return NetworkGradients(norms, sizes, signals, described, _growth(blocks, inputs, moments))


@dataclass(frozen=True)
class Moments:
    """Of one activation, means over channels: of Var f, and of E[f′²]."""

    variance: float
    slope: float

    @property
    def factor(self) -> float:
        """sqrt(E[f′²] / Var f)."""
        return math.sqrt(self.slope / self.variance) if self.variance > 0 else math.nan


def moments_at(activation: nn.Module, x: Tensor, weights: Tensor | None = None) -> Moments:
    """Return the moments of an activation that works on each element by itself, for inputs [N, C, *].

    Args:
        activation: the module.
        x: inputs.
        weights: of the inputs [N], such as those of a quadrature; equal ones unless given.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y = activation(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
    y, slope = (t.detach().double().transpose(0, 1).flatten(1) for t in (y, slope))  # [C, n]
    if weights is None:
        weights = torch.full(y.shape[1:], 1 / y.shape[1], dtype=torch.float64)
    mean = (y * weights).sum(1, keepdim=True)
    variance = ((y - mean).square() * weights).sum(1)
    return Moments(variance.mean().item(), (slope.square() * weights).sum(1).mean().item())


def moments_normal(activation: nn.Module, channels: int) -> Moments:
    """Return the moments for x ~ N(0, 1), by the trapezium rule: exact for a KAF, and to 1e-4 at a kink or a jump."""
    x = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    weights = torch.exp(-x.square() / 2)
    activation = copy.deepcopy(activation).double()
    return moments_at(activation, x[:, None].expand(-1, channels), weights / weights.sum())


def _describe(module: nn.Module, x: Tensor, moments: Moments) -> tuple[float, float | None, float | None]:
    size = math.sqrt(moments.variance)
    if not taps.elementwise(module):
        return size, None, None
    return size, moments.factor, moments_normal(module, x.shape[1]).factor


def _growth(blocks: list[nn.Module], inputs: dict[nn.Module, Tensor], moments: dict[nn.Module, Moments]) -> list[float]:
    """Return sqrt(E[f₂′²] (1 + w² φ₁² / σ²)) of each block act₂(x + w · bn(conv(act₁(bn(conv(x)))))).

    φ₁ is the factor of act₁, σ² the mean variance of a channel of x, and f₂ the activation of the trunk. A batch norm
    makes a branch's gain independent of the scale of x, so it falls with σ.
    """
    grown = []
    for block in blocks:
        if not isinstance(block, PostActivationBlock):
            return []
        if not (taps.elementwise(block.activation1) and taps.elementwise(block.activation2)):
            return []
        sigma2 = _variance(inputs[block]).item()
        weight2 = block.norm2.weight.detach().double().square().mean().item()
        inner, trunk = moments[block.activation1], moments[block.activation2]
        branch = weight2 * inner.factor**2 / sigma2 if sigma2 > 0 else math.inf
        grown.append(math.sqrt(trunk.slope * (1 + branch)))
    return grown


def _variance(x: Tensor) -> Tensor:
    """Return the mean over channels of the variance over images and positions."""
    return x.detach().double().transpose(0, 1).flatten(1).var(1, correction=0).mean()


def finite(number: float | Tensor) -> float | None:
    """Return a number, or None for one that is infinite or NaN, which JSON has not."""
    number = float(number)
    return number if math.isfinite(number) else None
