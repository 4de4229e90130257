"""Learned curves kept from being steep while a network trains: by a penalty on their slopes, or by a limit.

The limit is on slopes themselves. A normalisation behind a curve f undoes it: it divides by the standard deviation of
f, however small. So the penalty is on max |f′| / std f with x ~ N(0, 1), which no scale changes.

Curves are looked at on a grid over [−5, 5], the dictionary and a little beyond, eight points to the distance 1/sqrt(2γ)
from a point to where its kernel is steepest. A maximum of |f′| between two points of the grid is at most about 1 %
higher, which the limit leaves room for; `kafops.bounds` has the exact value.

A base is in f. The limit scales the curve on top of it, so it cannot be below the base's own largest slope.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kafops
from kafops.kernels import KernelName
from models.support.errors import UserError
from models.training.curves import kaf_layers
from models.training.recipe import Recipe

FREE = 1 / math.sqrt(0.5 - 0.5 / math.pi)
"""max |f′| / std f of ReLU, 1.71; up to it a curve costs no penalty."""
_ROOM = 1.01  # between the largest slope on the grid and the largest
_FINE, _BEYOND = 8, 2  # points to a kernel's width, and widths beyond the dictionary
_NORMAL, _WIDEST = 5.0, 4.0  # what the grid covers, and the widest width
_COARSEST = 1.0  # at most 8 points, for means over x ~ N(0, 1) and for bases
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
        if self.most is not None:
            for base in {layer.base for layer in self.layers if layer.base is not None}:
                own = base_slope(base)
                if own > self.most:
                    raise SlopeError(
                        f"slope_limit must be at least {own:.4g}, the largest slope of the base {base!r} beneath the "
                        f"curves, got {self.most:g}"
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
    grid = _on_grid(layer, differentiable=True)
    x, values = grid.x, grid.values + kafops.bases.value(layer.base, grid.x)
    weights = torch.exp(-x.square() / 2) * ((x[1] - x[0]) / math.sqrt(2 * math.pi))  # a trapezium rule
    mean = (weights * values).sum(0)
    variance = (weights * values.square()).sum(0) - mean.square()
    largest = (grid.slopes + grid.base_slopes).abs().amax(0)
    return largest * variance.clamp(min=_LEAST_VARIANCE).rsqrt()


@torch.no_grad()
def limit_slopes(layer: kafops.KAF, most: float) -> None:
    """Scale down the coefficients of each channel whose |f′| exceeds `most`, so that it no longer does.

    The limit has to be at least `base_slope` of the layer's base.
    """
    grid = _on_grid(layer, differentiable=False)
    slopes, beneath = grid.slopes, grid.base_slopes
    missed = (_ROOM - 1) * slopes.abs().amax(0)
    # s slopes + base ≤ most, and ≥ −most, for the largest s: by what curves and their maxima add in either direction.
    up, down = slopes + missed, missed - slopes
    room = most - _missed_of_base(layer.base)
    factors = [
        torch.where(up > 0, (room - beneath).clamp(min=0) / up, math.inf),
        torch.where(down > 0, (room + beneath).clamp(min=0) / down, math.inf),
    ]
    factor = torch.cat(factors).amin(0).clamp(max=1)
    layer.alpha.mul_(factor[:, None])


def curve_slopes(layer: kafops.KAF) -> Tensor:  # [points, C]
    """Return the slopes of a layer's curves, base included, on its grid, and on both sides of the base's kink."""
    grid = _on_grid(layer, differentiable=False)
    return grid.slopes + grid.base_slopes


def base_slope(base: str | None) -> float:
    """Return the largest |slope| of a base, 0 for None."""
    if base is None:
        return 0.0
    x = torch.linspace(-_NORMAL, _NORMAL, 100_001, dtype=torch.float64)
    return kafops.bases.value(base, x, 1).abs().max().item()


def _missed_of_base(base: str | None) -> float:
    """Return by how much a base's slope may be larger between two points of a grid."""
    return 2e-3 if base in ("silu", "gelu") else 0.0  # at most 1 / 16² / 2 of the third derivative, 0.75


@dataclass(frozen=True)
class _Grid:
    """Curves without their base on a grid of P points.

    Args:
        x: [P, C or 1].
        values: [P, C].
        slopes: [P', C], with more points than the grid where the base has kinks: two for each.
        base_slopes: of the base, [P', C or 1], at a kink once either side's.
    """

    x: Tensor
    values: Tensor
    slopes: Tensor
    base_slopes: Tensor


def _on_grid(layer: kafops.KAF, differentiable: bool) -> _Grid:
    """Return a layer's grid and its curves there.

    Args:
        layer: the layer.
        differentiable: by the layer's parameters; the grid's points count as constant, though learned ones move them.
    """
    common = _common_gamma(layer)
    if common is not None:
        # Curves of one dictionary and bandwidth are sums of the same D functions: a small product of matrices.
        dtype, device = layer.alpha.dtype, layer.alpha.device
        x, values, slopes = _basis(
            layer.dictionary_size, layer.boundary, common, layer.kernel, layer.base, dtype, device
        )
        values, slopes = values @ layer.alpha.T, slopes @ layer.alpha.T
    else:
        x = _grid(layer.points(), layer.bandwidths())
        at = _with_kinks(x, layer.base).requires_grad_()
        with torch.enable_grad():
            if layer.dictionary is None:
                values = kafops.kaf(at, layer.alpha, layer.bandwidths(), layer.boundary, layer.kernel)
            else:
                values = kafops.kaf_free(at, layer.alpha, layer.bandwidths(), layer.dictionary, layer.kernel)
            (slopes,) = torch.autograd.grad(values.sum(), at, create_graph=differentiable)
    beside = _with_kinks(x, layer.base, 1e-6)
    return _Grid(x, values[: len(x)], slopes, kafops.bases.value(layer.base, beside, 1))


def _with_kinks(x: Tensor, base: str | None, beside: float = 0.0) -> Tensor:  # [P, C] -> [P', C]
    """Return the points, and each kink of a base twice, once so much to the left and once to the right of it."""
    found = kafops.bases.named(base)
    kinks = [kink + side for kink in (found.kinks if found else ()) for side in (-beside, beside)]
    return torch.cat([x, x.new_tensor(kinks)[:, None].expand(-1, x.shape[1])])


def _common_gamma(layer: kafops.KAF) -> float | None:
    """Return the bandwidth of all channels, or None where they differ, or where it or the dictionary is learned."""
    if layer.gamma is None or layer.dictionary is not None or len(layer.gamma) == 0:
        return None
    least, most = layer.gamma.aminmax()
    return least.item() if least == most else None


@functools.lru_cache(maxsize=64)
def _basis(
    size: int,
    boundary: float,
    gamma: float,
    kernel: KernelName,
    base: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the grid [P, 1], and values and slopes of the D functions that curves are sums of, with kinks [P', D]."""
    each = torch.eye(size, dtype=dtype, device=device)
    bandwidth = each.new_full((1,), gamma)
    points = kafops.reference.uniform_dictionary(size, boundary, like=each)
    grid = _grid(points, bandwidth)
    x = _with_kinks(grid, base).expand(-1, size).contiguous().requires_grad_()
    with torch.enable_grad():
        values = kafops.kaf(x, each, bandwidth, boundary, kernel)
        (slopes,) = torch.autograd.grad(values.sum(), x)
    return grid, values.detach(), slopes


@torch.no_grad()
def _grid(dictionary: Tensor, bandwidths: Tensor) -> Tensor:  # [C or 1, D], [C] -> [points, C]
    width = (2 * bandwidths).rsqrt().clamp(max=_WIDEST)  # from a point to where its kernel is steepest
    first, last = dictionary.aminmax(dim=1)
    first, last = (first - _BEYOND * width).clamp(max=-_NORMAL), (last + _BEYOND * width).clamp(min=_NORMAL)
    points = _FINE * ((last - first) / width.clamp(max=_COARSEST)).max().item() + 1
    count = int(min(math.ceil(points), _MOST)) if math.isfinite(points) else _MOST
    shares = torch.linspace(0, 1, count, dtype=width.dtype, device=width.device)
    return first + shares[:, None] * (last - first)
