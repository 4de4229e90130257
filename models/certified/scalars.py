"""Ranges of activations and of their slopes on intervals, and their Lipschitz constants.

An activation's value on [l, u] is extreme at l, at u, or where its slope is 0 in between; its slope is extreme at l, at
u, where its second derivative is 0 in between, or on a side of a kink in between. So the few such places of each
function give its ranges. They are widened by 64 ε of the numbers involved, more than float64 loses: the formulas here
take fewer than 16 rounded steps, and that a place c is rounded to c + δ matters in second order only, by f″ δ².
"""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import kafops
from models.activations.smooth import PSSiLU, SmoothReLU
from models.support.errors import UserError

Range = tuple[Tensor, Tensor]
"""Least and largest values, each [N, C, *]."""

_SLACK = 64 * torch.finfo(torch.float64).eps
_FLAT = 700.0  # beyond it exp(-|x|) is 0 next to any other number of a slope


class Scalar(Protocol):
    """A function of one number, for each channel its own or one for all."""

    @property
    def lipschitz(self) -> Tensor:  # [C] or [1]
        """The largest |slope| on ℝ."""
        ...

    def values(self, lower: Tensor, upper: Tensor) -> Range:
        """Return what encloses the values on intervals [N, C, *], in float64."""
        ...

    def slopes(self, lower: Tensor, upper: Tensor) -> Range:
        """Return what encloses the slopes on intervals [N, C, *], one-sided ones at kinks, in float64."""
        ...


@dataclass(frozen=True, eq=False)
class Fixed:
    """A function with known places where it or its slope turns.

    Args:
        value, slope: the function and its derivative; at a kink either side's.
        turns: where its slope is 0, and its kinks if it turns there.
        bends: where the slope turns.
        kinks: where the slope jumps, with the slopes on both sides.
        limits: of the slope towards -∞ and +∞.
        scale: factor of the slack for rounding, where a formula divides by something small.
        error: how far the module's own formula is from `value`, in exact arithmetic.

    Places and slopes are numbers, or tensors [C].
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    turns: Sequence[float | Tensor] = ()
    bends: Sequence[float | Tensor] = ()
    kinks: Sequence[tuple[float | Tensor, float | Tensor, float | Tensor]] = ()
    limits: Sequence[float | Tensor] = (0.0, 1.0)
    scale: float = 1.0
    error: float = 0.0

    @property
    def lipschitz(self) -> Tensor:  # [C] or [1]
        """The largest |slope| on ℝ."""
        extremes = [self.slope(_tensor(place)) for place in self.bends]
        extremes += [_tensor(slope) for _, *sides in self.kinks for slope in sides]
        extremes += [_tensor(slope) for slope in self.limits]
        largest = functools.reduce(torch.maximum, [e.abs() for e in extremes])
        return largest * (1 + _SLACK * self.scale)

    def values(self, lower: Tensor, upper: Tensor) -> Range:
        """Return what encloses the values on intervals."""
        places = [_along(_tensor(place), lower) for place in self.turns]
        candidates = [(self.value(place), place) for place in places]
        least, most = _range(self.value(lower), self.value(upper), candidates, lower, upper)
        slack = _SLACK * self.scale * (1 + torch.maximum(lower.abs(), upper.abs())) + self.error
        return least - slack, most + slack

    def slopes(self, lower: Tensor, upper: Tensor) -> Range:
        """Return what encloses the slopes on intervals."""
        places = [_along(_tensor(place), lower) for place in self.bends]
        candidates = [(self.slope(place), place) for place in places]
        for place, *sides in self.kinks:
            candidates += [(_along(_tensor(side), lower), _along(_tensor(place), lower)) for side in sides]
        least, most = _range(self.slope(lower), self.slope(upper), candidates, lower, upper)
        slack = _SLACK * self.scale * (1 + torch.maximum(least.abs(), most.abs()))
        return least - slack, most + slack


def _range(
    at_lower: Tensor, at_upper: Tensor, candidates: Sequence[tuple[Tensor, Tensor]], lower: Tensor, upper: Tensor
) -> Range:
    least, most = torch.minimum(at_lower, at_upper), torch.maximum(at_lower, at_upper)
    for value, place in candidates:
        inside = (lower <= place) & (place <= upper)
        least = torch.where(inside, torch.minimum(least, value), least)
        most = torch.where(inside, torch.maximum(most, value), most)
    return least, most


def _tensor(value: float | Tensor) -> Tensor:  # [C] or [1]
    return torch.as_tensor(value, dtype=torch.float64).detach().cpu().reshape(-1)


def _along(by_channel: Tensor, x: Tensor) -> Tensor:  # [C] or [1] -> [1, C, 1, ...] to go with x [N, C, *]
    return by_channel.reshape(1, -1, *(1,) * (x.dim() - 2)) if x.dim() > 1 else by_channel


class Curves:
    """The curves of a KAF layer, with the bounds of `kafops.bounds`, for channels in dimension 1.

    `CurveRanges` is exact to some 1e-6 Σ|α|, more than short intervals have. On these f(c) ± r max |f′| is closer, with
    centre c and radius r; kafops in float64 is within 4e-16 Σ|α| of f(c) (measured), and 1e-12 Σ|α| is allowed. A base
    is within 4 ε |c|, and 64 ε |c| are.
    """

    def __init__(self, layer: kafops.KAF) -> None:
        self._layer = copy.deepcopy(layer).to("cpu", torch.float64).requires_grad_(False)
        self._layer.channel_dim = 1

    def _parameters(self) -> dict[str, Any]:
        layer = self._layer
        return {
            "alpha": layer.alpha,
            "gamma": layer.bandwidths(),
            "boundary": layer.boundary if layer.dictionary is None else layer.dictionary,
            "kernel": layer.kernel,
            "base": layer.base,
        }

    @functools.cached_property
    def lipschitz(self) -> Tensor:  # [C] or [1]
        """The largest |slope| on ℝ."""
        return kafops.bounds.curve_bounds(**self._parameters()).lipschitz

    @functools.cached_property
    def _ranges(self) -> kafops.bounds.CurveRanges:
        return kafops.bounds.CurveRanges(**self._parameters())

    def values(self, lower: Tensor, upper: Tensor) -> Range:
        """Return what encloses the values on intervals."""
        centre = lower / 2 + upper / 2
        radius = torch.maximum(upper - centre, centre - lower) * (1 + _SLACK)
        middle = self._layer(centre)
        least, most = self.slopes(lower, upper)
        away = torch.maximum(least.abs(), most.abs()) * radius * (1 + _SLACK)
        away = away + _along(1e-12 * self._layer.alpha.abs().sum(1), lower)
        if self._layer.base is not None:
            away = away + _SLACK * centre.abs()
        values = self._ranges.values(lower, upper)
        # The other one where one is NaN, as on infinite intervals.
        return torch.fmax(values.minimum, middle - away), torch.fmin(values.maximum, middle + away)

    def slopes(self, lower: Tensor, upper: Tensor) -> Range:
        """Return what encloses the slopes on intervals."""
        return self._ranges.slopes(lower, upper)


@functools.singledispatch
def scalar(module: nn.Module) -> Scalar:
    """Return an activation as a function of one number with ranges.

    Raises:
        UserError: the module is no activation known here.
    """
    raise UserError(f"no bounds are known for the activation {type(module).__name__}")


@scalar.register(kafops.KAF)
def _kaf(module: kafops.KAF) -> Scalar:
    return Curves(module)


@scalar.register(nn.ReLU)
def _relu(module: nn.ReLU) -> Scalar:
    return _two_lines(0.0)


@scalar.register(nn.LeakyReLU)
def _leaky_relu(module: nn.LeakyReLU) -> Scalar:
    return _two_lines(module.negative_slope)


@scalar.register(nn.PReLU)
def _prelu(module: nn.PReLU) -> Scalar:
    return _two_lines(module.weight)


def _two_lines(below: float | Tensor) -> Scalar:
    """Return x for x ≥ 0 and `below` · x for others."""
    factor = _tensor(below)
    return Fixed(
        lambda x: torch.where(x >= 0, x, x * _along(factor, x)),
        lambda x: torch.where(x >= 0, torch.ones_like(x), _along(factor, x).expand_as(x)),
        turns=(0.0,),
        kinks=((0.0, factor, 1.0),),
        limits=(factor, 1.0),
    )


@scalar.register(nn.ELU)
def _elu(module: nn.ELU) -> Scalar:
    """The slope alpha · exp(x) below 0 is monotone."""
    alpha = module.alpha
    return Fixed(
        lambda x: torch.where(x >= 0, x, alpha * x.clamp(max=0).expm1()),
        lambda x: torch.where(x >= 0, torch.ones_like(x), alpha * x.clamp(max=0).exp()),
        turns=(0.0,),
        kinks=((0.0, alpha, 1.0),),
    )


# x σ(x): the zero of its slope σ + x σ (1 − σ), 1 + x (1 − σ(x)) = 0; and that of its second derivative, where
# x tanh(x / 2) = 2, which gives the largest slope, 1.0998393194..., and its mirror image the least.
_SILU_TURN, _SILU_BEND = -1.2784645427610738, 2.3993572805154677


def _silu_slope(x: Tensor) -> Tensor:
    x = x.clamp(-_FLAT, _FLAT)
    return torch.sigmoid(x) * (1 + x * torch.sigmoid(-x))


@scalar.register(nn.SiLU)
def _silu(module: nn.SiLU) -> Scalar:
    return Fixed(lambda x: x * torch.sigmoid(x), _silu_slope, (_SILU_TURN,), (-_SILU_BEND, _SILU_BEND))


@scalar.register(PSSiLU)
def _pssilu(module: PSSiLU) -> Scalar:
    """x (σ(a x) − b) / (1 − b), whose slope at z = a x is (silu′(z) − b) / (1 − b); it is 0 where silu′(z) = b."""
    a = module.a.detach().double().abs().item()
    b = min(module.b.detach().double().abs().item(), PSSiLU.MOST)
    if a == 0:
        line = (0.5 - b) / (1 - b)
        return Fixed(lambda x: x * line, lambda x: torch.full_like(x, line), limits=(line, line))
    low, high = -_SILU_BEND, _SILU_BEND  # silu′ rises from -0.0998 to 1.0998 between them, and b is in [0, 1)
    for _ in range(80):
        middle = (low + high) / 2
        below = _silu_slope(torch.tensor(middle, dtype=torch.float64)).item() < b
        low, high = (middle, high) if below else (low, middle)
    return Fixed(
        lambda x: x * (torch.sigmoid(a * x) - b) / (1 - b),
        lambda x: (_silu_slope(a * x) - b) / (1 - b),
        turns=(high / a,),
        bends=(-_SILU_BEND / a, _SILU_BEND / a),
        limits=(-b / (1 - b), 1.0),
        scale=1 / (1 - b),
    )


@scalar.register(nn.GELU)
def _gelu(module: nn.GELU) -> Scalar:
    """x Φ(x): slope Φ + x φ, second derivative φ (2 − x²), so the slope turns at ±√2 and is at most 1.1289..."""
    if module.approximate != "none":
        raise UserError(f"bounds are known for GELU with approximate='none', got {module.approximate!r}")

    def below(x: Tensor) -> Tensor:
        return torch.special.ndtr(x)

    def density(x: Tensor) -> Tensor:
        return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    return Fixed(
        lambda x: x * below(x),
        lambda x: below(x) + x.clamp(-_FLAT, _FLAT) * density(x),
        turns=(-0.7517915246935645,),
        bends=(-math.sqrt(2), math.sqrt(2)),
    )


_THRESHOLD = 20.0  # of softplus, PyTorch's default


@scalar.register(nn.Softplus)
def _softplus(module: nn.Softplus) -> Scalar:
    """log(1 + exp(βx)) / β; PyTorch returns x itself for βx above the threshold, where the slope is 1.

    There its value falls by log(1 + exp(-threshold)) / β, 2e-9 / β for a threshold of 20. Ranges of values include
    that; slopes, and so Lipschitz constants, leave it out.
    """
    beta, threshold = module.beta, module.threshold
    if not (0 < beta < math.inf and threshold >= _THRESHOLD):
        raise UserError(
            f"bounds are known for Softplus with beta > 0 and threshold >= {_THRESHOLD:g}, got beta={beta}, "
            f"threshold={threshold}: at a lower threshold it jumps"
        )
    return Fixed(
        lambda x: torch.logaddexp(beta * x, torch.zeros_like(x)) / beta,
        lambda x: torch.where(beta * x > threshold, torch.ones_like(x), torch.sigmoid(beta * x)),
        kinks=((threshold / beta, 1 / (1 + math.exp(-threshold)), 1.0),),
        error=math.log1p(math.exp(-threshold)) / beta,
    )


@scalar.register(SmoothReLU)
def _smoothrelu(module: SmoothReLU) -> Scalar:
    """Slope βx / (1 + βx) for x > 0, which rises to 1, and 0 elsewhere."""
    beta = module.b.detach().double().square().item()

    def value(x: Tensor) -> Tensor:
        x = x.clamp(min=0)
        return x - torch.log1p(beta * x) / beta

    return Fixed(value, lambda x: 1 - 1 / (1 + beta * x.clamp(min=0)))


@scalar.register(nn.Tanh)
def _tanh(module: nn.Tanh) -> Scalar:
    return Fixed(torch.tanh, lambda x: 1 - torch.tanh(x).square(), bends=(0.0,), limits=(0.0, 0.0))


@scalar.register(nn.Sigmoid)
def _sigmoid(module: nn.Sigmoid) -> Scalar:
    return Fixed(torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x), bends=(0.0,), limits=(0.0, 0.0))
