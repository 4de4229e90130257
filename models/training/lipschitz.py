"""Learned curves kept from being steep while a network trains: by a penalty on their slopes, or by a limit.

The limit is on slopes themselves. A normalisation behind a curve f undoes it: it divides by the standard deviation of
f, however small. So the penalty is on max |f′| / std f with x ~ N(0, 1), which no scale changes.

Curves are looked at on a grid over [−5, 5], the dictionary and a little beyond, eight points to the distance 1/sqrt(2γ)
from a point to where its kernel is steepest. A maximum of |f′| between two points of the grid is at most about 1 %
higher, which the limit leaves room for; `kafops.bounds` has the exact value.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import kafops
from models.errors import UserError
from models.training.curves import kaf_layers, rank
from models.training.recipe import Recipe

FREE = 1 / math.sqrt(0.5 - 0.5 / math.pi)
"""max |f′| / std f of ReLU, 1.71; up to it a curve costs no penalty."""
_ROOM = 1.01  # between the largest slope on the grid and the largest
_FINE, _BEYOND = 8, 2  # points to a kernel's width, and widths beyond the dictionary
_NORMAL, _WIDEST = 5.0, 4.0  # what the grid covers, and at most 8 points of it, for means over x ~ N(0, 1)
_LEAST_VARIANCE = 1e-12
_MOST = 4096  # points of a grid, for learned bandwidths that become very narrow


class SlopeError(UserError):
    """A network whose slopes cannot be controlled as its recipe says."""


class Slopes:
    """What a recipe's `slope_penalty` and `slope_limit` do to the KAF layers of a network.

    Args:
        model: the network.
        recipe: of its training.

    Raises:
        SlopeError: the recipe asks for either, and the network has no KAF layer.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.weight, self.most = recipe.slope_penalty, recipe.slope_limit
        self.layers = list(kaf_layers(model).values())
        asked = [name for name in ("slope_penalty", "slope_limit") if getattr(recipe, name)]
        if asked and not self.layers:
            raise SlopeError(
                f"{' and '.join(asked)} control the slopes of KAF layers, and the network has none; choose an "
                "activation of the kaf family, or leave them out"
            )

    def penalised(self, loss: Tensor) -> Tensor:
        """Return the loss with the penalty added, or as it is where there is none."""
        return loss + self.weight * penalty(self.layers) if self.weight > 0 else loss

    def limit(self) -> None:
        """Scale down the coefficients of the channels that are steeper than the limit, where there is one."""
        if self.most is not None:
            for layer in self.layers:
                limit_slopes(layer, self.most)


def penalty(layers: Sequence[kafops.KAF]) -> Tensor:
    """Return the mean over channels of max(0, max |f′| / std f − `FREE`)², differentiable by the parameters."""
    return (torch.cat([steepness(layer) for layer in layers]) - FREE).clamp(min=0).square().mean()


def steepness(layer: kafops.KAF) -> Tensor:  # [C]
    """Return max |f′| / std f of each curve for x ~ N(0, 1): at least 1, 1.71 for ReLU; 0 for a curve that is 0."""
    x, values, slopes = _on_grid(layer, differentiable=True)
    weights = torch.exp(-x.square() / 2) * ((x[1] - x[0]) / math.sqrt(2 * math.pi))  # a trapezium rule
    mean = (weights * values).sum(0)
    variance = (weights * values.square()).sum(0) - mean.square()
    return slopes.abs().amax(0) * variance.clamp(min=_LEAST_VARIANCE).rsqrt()


@torch.no_grad()
def limit_slopes(layer: kafops.KAF, most: float) -> None:
    """Scale down the coefficients of each channel whose |f′| exceeds `most`, so that it no longer does."""
    largest = curve_slopes(layer).abs().amax(0) * _ROOM
    factor = torch.where(largest > most, most / largest, 1.0)
    layer.alpha.mul_(factor[:, None])


def curve_slopes(layer: kafops.KAF) -> Tensor:  # [points, C]
    """Return the slopes of a layer's curves on its grid."""
    return _on_grid(layer, differentiable=False)[2]


def _on_grid(layer: kafops.KAF, differentiable: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the grid [points, C or 1] of a layer, and the values and slopes of its curves there, [points, C] each.

    Args:
        layer: the layer.
        differentiable: by the layer's parameters; the grid's points count as constant, though learned ones move them.
    """
    common = _common_gamma(layer)
    if common is not None:
        # Curves of one dictionary and bandwidth are sums of the same D functions: a small product of matrices.
        dtype, device = layer.alpha.dtype, layer.alpha.device
        x, values, slopes = _basis(layer.dictionary_size, layer.boundary, common, layer.kernel, dtype, device)
        return x, values @ layer.alpha.T, slopes @ layer.alpha.T
    channels = layer.num_parameters
    grid = _grid(layer.points(), layer.bandwidths())
    x = grid.view(-1, channels, *(1,) * (rank(layer) - 2)).requires_grad_()
    with torch.enable_grad():
        values = layer(x)
        (slopes,) = torch.autograd.grad(values.sum(), x, create_graph=differentiable)
    return grid.detach(), values.view(-1, channels), slopes.view(-1, channels)


def _common_gamma(layer: kafops.KAF) -> float | None:
    """Return the bandwidth of all channels, or None where they differ, or where it or the dictionary is learned."""
    if layer.gamma is None or layer.dictionary is not None or len(layer.gamma) == 0:
        return None
    least, most = layer.gamma.aminmax()
    return least.item() if least == most else None


@functools.lru_cache(maxsize=64)
def _basis(
    size: int, boundary: float, gamma: float, kernel: str, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the grid [points, 1], and values and slopes [points, D] of the D functions that curves are sums of."""
    each = torch.eye(size, dtype=dtype, device=device)
    bandwidth = each.new_full((1,), gamma)
    points = kafops.reference.uniform_dictionary(size, boundary, like=each)
    grid = _grid(points, bandwidth)
    x = grid.expand(-1, size).contiguous().requires_grad_()
    with torch.enable_grad():
        values = kafops.kaf(x, each, bandwidth, boundary, kernel)
        (slopes,) = torch.autograd.grad(values.sum(), x)
    return grid, values.detach(), slopes


@torch.no_grad()
def _grid(dictionary: Tensor, bandwidths: Tensor) -> Tensor:  # [C or 1, D], [C] -> [points, C]
    width = (2 * bandwidths).rsqrt().clamp(max=_WIDEST)  # from a point to where its kernel is steepest
    first, last = dictionary.aminmax(dim=1)
    first, last = (first - _BEYOND * width).clamp(max=-_NORMAL), (last + _BEYOND * width).clamp(min=_NORMAL)
    points = _FINE * ((last - first) / width).max().item() + 1
    count = int(min(math.ceil(points), _MOST)) if math.isfinite(points) else _MOST
    shares = torch.linspace(0, 1, count, dtype=width.dtype, device=width.device)
    return first + shares[:, None] * (last - first)
