"""Smooth activations with a parameter or two that are learned."""

import torch
from torch import Tensor, nn


class SmoothReLU(nn.Module):
    """max(0, x − log(1 + β|x|) / β) with β = b², b learned, one for the layer.

    For x > 0 the slope is βx / (1 + βx), which rises from 0 at 0 to 1; larger β is closer to ReLU.

    Args:
        b: initial value, not 0. The default 20 (β = 400) is the authors'.

    State:
        Parameter `b`, a scalar.

    Source: Xie et al., "Smooth adversarial training", 2020, section 4; b = 20 is from their code.
    """

    def __init__(self, b: float = 20.0) -> None:
        super().__init__()
        if b == 0:
            raise ValueError("b must not be 0: β = b² divides")
        self.b = nn.Parameter(torch.tensor(b))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the curve to every value."""
        beta = self.b.square()
        return torch.relu(x - torch.log1p(beta * x.abs()) / beta)


class PSSiLU(nn.Module):
    """x · (σ(|a| x) − |b|) / (1 − |b|), SiLU with a learned steepness and a learned slope −|b| / (1 − |b|) for x → −∞.

    The curve has a pole at |b| = 1. Above `MOST` |b| counts as `MOST` and b gets no gradient any more.

    Args:
        a, b: the two parameters, scalars. Layers that get the same objects share them.

    Source: Dai, Mahloujifar, Mittal, "Parameterizing activation functions for adversarial robustness", 2021.
    """

    MOST = 0.99

    def __init__(self, a: nn.Parameter, b: nn.Parameter) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        """Apply the curve to every value."""
        b = self.b.abs().clamp(max=self.MOST)
        return x * (torch.sigmoid(self.a.abs() * x) - b) / (1 - b)


class SharedPSSiLU:
    """Makes the PSSiLU layers of one network, which share one pair: a = 1 and b = 1e-8 at the start, as in the paper.

    A state_dict names the pair once per layer; `parameters()` yields it once.
    """

    def __init__(self) -> None:
        self.a = nn.Parameter(torch.tensor(1.0))
        self.b = nn.Parameter(torch.tensor(1e-8))  # not 0, where |b| has no slope

    def __call__(self, channels: int) -> PSSiLU:
        """Return one more layer."""
        return PSSiLU(self.a, self.b)
