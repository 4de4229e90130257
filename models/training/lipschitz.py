"""Learned curves kept from being steep while a network trains: by a penalty on their slopes, or by a limit.

The slopes f′ of each channel are looked at on a grid over its dictionary and a little beyond, eight points to the
distance 1/sqrt(2γ) from a point to where its kernel is steepest. A maximum between two points of the grid is at most
about 1 % higher, which the limit leaves room for; `kafops.bounds` has the exact value.
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

FREE = 1.0
"""Slopes up to it cost no penalty: it is ReLU's."""
_ROOM = 1.01  # between the largest slope on the grid and the largest
_FINE, _BEYOND = 8, 2  # points to a kernel's width, and widths beyond the dictionary
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
    """Return the mean over all channels of all layers of max(0, max |f′| − 1)², differentiable by the parameters."""
    largest = torch.cat([curve_slopes(layer, differentiable=True).abs().amax(0) for layer in layers])
    return (largest - FREE).clamp(min=0).square().mean()


@torch.no_grad()
def limit_slopes(layer: kafops.KAF, most: float) -> None:
    """Scale down the coefficients of each channel whose |f′| exceeds `most`, so that it no longer does."""
    largest = curve_slopes(layer).abs().amax(0) * _ROOM
    factor = torch.where(largest > most, most / largest, 1.0)
    layer.alpha.mul_(factor[:, None])


def curve_slopes(layer: kafops.KAF, differentiable: bool = False) -> Tensor:  # [points, C]
    """Return the slopes of a layer's curves on its grid.

    Args:
        layer: the layer.
        differentiable: by the layer's parameters; the grid's points count as constant, though learned ones move them.
    """
    common = _common_gamma(layer)
    if common is not None:
        # Curves of one dictionary and bandwidth are sums of the same D functions: a small product of matrices.
        dtype, device = layer.alpha.dtype, layer.alpha.device
        return _basis(layer.dictionary_size, layer.boundary, common, layer.kernel, dtype, device) @ layer.alpha.T
    channels = layer.num_parameters
    x = _grid(layer.points(), layer.bandwidths())
    x = x.view(-1, channels, *(1,) * (rank(layer) - 2)).requires_grad_()
    with torch.enable_grad():
        (slopes,) = torch.autograd.grad(layer(x).sum(), x, create_graph=differentiable)
    return slopes.view(-1, channels)


def _common_gamma(layer: kafops.KAF) -> float | None:
    """Return the bandwidth of all channels, or None where they differ, or where it or the dictionary is learned."""
    if layer.gamma is None or layer.dictionary is not None or len(layer.gamma) == 0:
        return None
    least, most = layer.gamma.aminmax()
    return least.item() if least == most else None


@functools.lru_cache(maxsize=64)
def _basis(size: int, boundary: float, gamma: float, kernel: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the slopes [points, D] of the D functions that curves are sums of."""
    each = torch.eye(size, dtype=dtype, device=device)
    bandwidth = each.new_full((1,), gamma)
    points = kafops.reference.uniform_dictionary(size, boundary, like=each)
    x = _grid(points, bandwidth).expand(-1, size).contiguous().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(kafops.kaf(x, each, bandwidth, boundary, kernel).sum(), x)[0]


@torch.no_grad()
def _grid(dictionary: Tensor, bandwidths: Tensor) -> Tensor:  # [C or 1, D], [C] -> [points, C]
    width = (2 * bandwidths).rsqrt()  # from a point to where its kernel is steepest
    first, last = dictionary.aminmax(dim=1)
    first, last = first - _BEYOND * width, last + _BEYOND * width
    points = _FINE * ((last - first) / width).max().item() + 1
    count = int(min(math.ceil(points), _MOST)) if math.isfinite(points) else _MOST
    shares = torch.linspace(0, 1, count, dtype=width.dtype, device=width.device)
    return first + shares[:, None] * (last - first)
