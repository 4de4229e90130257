"""Which part of its dictionary a KAF network uses, and how its curves came about.

A channel's inputs are counted by the point of the dictionary that is nearest, between the first point and the last: a
point's **cell** ends half-way to its neighbours. What lies outside is counted on either side. So for each channel the
shares of its D cells, of what is below and what is above add up to 1.

- A channel **uses** a point where at least 0.1 % of its inputs are in the cell. A coefficient whose cell is empty is
  decided by weight decay and by the neighbours' inputs alone.
- The **dead zone** is outside [−b, b]. There the curve falls to 0 within a few Δ, and no gradient comes back.
- The **suggested boundary** encloses 99.9 % of the inputs of every layer.

Images come in batches and leave counts behind, so memory does not grow with them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import kafops
from models.analysis.distributions import curve, spread
from models.evaluation import evaluation_mode
from models.histograms import Histogram, NotFinite
from models.support.errors import UserError
from models.taps import tapped
from models.training import curves as kept
from models.training.outside import INSIDE, ends, rounded_up

_POINTS = 161
_BEYOND = 0.15  # of the dictionary's length, that a curve is shown at either side


@dataclass(frozen=True)
class Use:
    """What one KAF layer does with its dictionary.

    Args:
        name: of its module.
        points: of the dictionary, where all channels have the same; empty where they are learned.
        low, high: first and last point, over all channels.
        below, above: of each channel, the share of inputs below the first and above the last point.
        cells: of each channel, the share of inputs in the cell of each of its D points, in their order.
        reach, reach_99: 99.9 % and 99 % of all inputs of the layer are within ±reach, ±reach_99. They are too large by
            at most 0.2 % of the largest input.
    """

    USED: ClassVar[float] = 0.001
    """The share of a channel's inputs from which on it uses a point."""

    name: str
    points: list[float]
    low: float
    high: float
    below: list[float]
    above: list[float]
    cells: list[list[float]]
    reach: float
    reach_99: float

    @property
    def outside(self) -> list[float]:
        """Of each channel, the share of inputs outside the dictionary."""
        return [a + b for a, b in zip(self.below, self.above, strict=True)]

    @property
    def share(self) -> float:
        """The share of the layer's inputs outside the dictionary."""
        return sum(self.outside) / len(self.outside)

    @property
    def users(self) -> list[float]:
        """Of each point, the share of channels that use it."""
        return [sum(share >= self.USED for share in cell) / len(cell) for cell in zip(*self.cells, strict=True)]

    @property
    def never(self) -> list[int]:
        """Of each channel, the number of points whose cell no input ever reached."""
        return [sum(share == 0 for share in cells) for cells in self.cells]


class DictionaryUse:
    """Counts the inputs of a network's KAF layers.

    Raises:
        UserError: the network has no KAF layers.

    Example:
        >>> use = DictionaryUse(model)
        >>> for x, _ in data.validation.ordered(100):
        ...     use.add(x)
        >>> suggested_boundary(use.layers())
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.modules = model, kept.kaf_layers(model)
        if not self.modules:
            raise UserError("the network has no KAF layers, so it has neither curves nor dictionaries to look at")
        self._counts: dict[str, Tensor] = {}
        self._sizes: dict[str, Histogram] = {}

    def add(self, images: Tensor) -> None:
        """Run the network on images [N, C, H, W] in evaluation mode.

        Raises:
            UserError: an input of a KAF layer is not finite.
        """
        with evaluation_mode(self.model), torch.no_grad(), tapped(self.modules, self._see):
            self.model(images)

    def layers(self) -> list[Use]:
        """Return what has been seen so far, of each layer in the order in which an image meets them."""
        uses = []
        for name, counts in self._counts.items():
            layer = self.modules[name]
            shares = counts.double() / counts.sum(1, keepdim=True)
            low, high = ends(layer)
            uses.append(
                Use(
                    name,
                    [] if layer.learn_dictionary else layer.points()[0].tolist(),
                    low.min().item(),
                    high.max().item(),
                    shares[:, 0].tolist(),
                    shares[:, -1].tolist(),
                    shares[:, 1:-1].tolist(),
                    self._sizes[name].upper(INSIDE).item(),
                    self._sizes[name].upper(0.99).item(),
                )
            )
        return uses

    def _see(self, name: str, x: Tensor, y: Tensor) -> None:
        edges = cell_edges(self.modules[name])
        channels = x.shape[1]
        dtype = torch.promote_types(x.dtype, edges.dtype)
        rows = x.transpose(0, 1).reshape(channels, -1).to(dtype).contiguous()
        edges = edges.to(rows.dtype)
        size = self._sizes.setdefault(name, Histogram(1, device=x.device))
        try:
            size.add(rows.abs().reshape(1, -1))
        except NotFinite as error:
            raise UserError(f"the inputs of {name}: {error}; the network cannot be looked at") from error
        places = torch.searchsorted(edges.expand(channels, -1).contiguous(), rows, right=True)
        kinds = edges.shape[1] + 1
        places += torch.arange(channels, device=x.device)[:, None] * kinds
        counts = torch.bincount(places.flatten(), minlength=channels * kinds).view(channels, kinds)
        self._counts[name] = self._counts.get(name, 0) + counts


def cell_edges(layer: kafops.KAF) -> Tensor:  # [C, D + 1] or [1, D + 1]
    """Return the edges of the cells of a layer's points, sorted: the first point, half-way marks, just past the last.

    The cell of a point is [its lower edge, its upper edge); so the last point itself is inside.
    """
    points = layer.points().detach().sort(1).values
    last = torch.nextafter(points[:, -1:], points.new_tensor(torch.inf))
    return torch.cat([points[:, :1], (points[:, 1:] + points[:, :-1]) / 2, last], 1)


def suggested_boundary(layers: Sequence[Use]) -> float:
    """Return a boundary that encloses 99.9 % of the inputs of every layer, rounded up to two digits."""
    return rounded_up(max(layer.reach for layer in layers))


def dense_size(size: int, boundary: float, wider: float) -> int:
    """Return how many points a dictionary on [−wider, wider] needs to be as dense as `size` of them on ±boundary.

    With the default bandwidth, which goes with the spacing, curves are then as detailed as before.
    """
    return 1 + round((size - 1) * wider / boundary)


@dataclass(frozen=True)
class Evolution:
    """Curves of some channels of one layer over the epochs.

    Args:
        layer: its place among the KAF layers, from 0.
        name: of its module.
        channels: which ones.
        low, high: the ends of its dictionary before training.
        x: [P], where the curves are sampled.
        curves: [states][channels][P].
    """

    layer: int
    name: str
    channels: list[int]
    low: float
    high: float
    x: list[float]
    curves: list[list[list[float]]]


def evolution(states: Iterable[nn.Module], layers: int = 5, channels: int = 4) -> list[Evolution]:
    """Sample evenly chosen channels of evenly chosen layers of a network in one state after the other.

    Args:
        states: the network along its training; it may be one object whose curves change between the steps.
        layers, channels: at most so many.

    Raises:
        UserError: the network has no KAF layers.
    """
    found: list[Evolution] = []
    for model in states:
        modules = list(kept.kaf_layers(model).items())
        if not modules:
            raise UserError("the network has no KAF layers, so it has no curves to look at")
        found = found or [_start(place, *modules[place], channels) for place in spread(len(modules), layers)]
        for seen in found:
            layer = modules[seen.layer][1]
            x = torch.tensor(seen.x, device=layer.alpha.device)
            values = curve(layer, x, layer.num_parameters, kept.rank(layer))
            assert values is not None
            seen.curves.append(values[seen.channels].tolist())
    return found


def _start(place: int, name: str, layer: kafops.KAF, channels: int) -> Evolution:
    low, high = ends(layer)
    first, last = low.min().item(), high.max().item()
    beyond = _BEYOND * (last - first)
    x = torch.linspace(first - beyond, last + beyond, _POINTS).tolist()
    return Evolution(place, name, spread(layer.num_parameters, channels), first, last, x, [])
