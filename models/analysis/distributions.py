"""How the values in a network move when its images are attacked: activations clean against adversarial, layer by layer.

For each activation its inputs (pre-activations) and its outputs are looked at, in two ways:

- paired: ‖a(x') − a(x)‖₂ / ‖a(x)‖₂ for an image x and its adversarial image x', a(·) all values of the layer. How far
  an image is moved, whichever way.
- as distributions: the Wasserstein-1 distance of all clean values of a channel, over images and positions, to all its
  adversarial values. How far the population is moved; images that change places do not count.

Batches come one at a time and leave sums and histograms behind, so memory does not grow with the images but for three
numbers of each: its paired distance on either side, a mean over the layers, and whether the network is right about it.
Over several networks `across` has the means of these, on all images and on those that the attack did not break, where
being moved is not being misclassified.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import kafops
from models import taps
from models.evaluation import evaluation_mode
from models.histograms import BINS, Histogram, NotFinite, wasserstein
from models.support.errors import UserError
from models.training.outside import ends

SIDES = ("inputs", "outputs")
_TAIL = 0.001  # share of the values that a panel may leave out at either end
_COLUMNS = 56  # of a panel, about
_POINTS = 161  # of a curve


@dataclass(frozen=True)
class Moved:
    """How one side of one activation, its inputs or its outputs, differs between clean and adversarial images.

    Args:
        l2, l2_std: mean and standard deviation over images of ‖a(x') − a(x)‖ / ‖a(x)‖; None where a(x) is always 0.
        distance: mean over images of ‖a(x') − a(x)‖, in the units of the values.
        silent: images with a(x) = 0, which l2 leaves out.
        w1: the channels' mean Wasserstein-1 distance, in units of `scale`; None where that is 0.
        w1_low, w1_high: the 10th and the 90th of 100 channels in the order of their distance, in the same units.
        scale: the channels' mean standard deviation on clean images, in the units of the values.
        w1_channels: Wasserstein-1 distance of each channel, in the units of the values.
        error_channels: the largest error of each distance, the width of a bin.
        mean, std: of each channel, on clean and on adversarial images, in the units of the values.
    """

    l2: float | None
    l2_std: float | None
    distance: float
    silent: int
    w1: float | None
    w1_low: float | None
    w1_high: float | None
    scale: float
    w1_channels: list[float]
    error_channels: list[float]
    mean: tuple[list[float], list[float]]
    std: tuple[list[float], list[float]]


@dataclass(frozen=True)
class Layer:
    """One activation of the network."""

    name: str
    inputs: Moved
    outputs: Moved


@dataclass(frozen=True)
class Density:
    """Two densities over the same bins: of the clean and of the adversarial values of a channel."""

    edges: list[float]
    clean: list[float]
    adversarial: list[float]


@dataclass(frozen=True)
class Panel:
    """What a figure shows of one channel.

    Args:
        layer: its place among the layers, from 0.
        name: of the layer.
        channel: number of the channel.
        inputs, outputs: their densities.
        x, y: points of its curve; empty where the activation is no function of one value, as k-WTA is not.
        dictionary: first and last point of a KAF's dictionary, None for another activation.
    """

    layer: int
    name: str
    channel: int
    inputs: Density
    outputs: Density
    x: list[float]
    y: list[float]
    dictionary: tuple[float, float] | None


@dataclass(frozen=True)
class Images:
    """What became of each image.

    Args:
        moved: by side, ‖a(x') − a(x)‖ / ‖a(x)‖ as a mean over the layers where a(x) is not 0; NaN where it always is.
        right: whether the network is right about x, and about x'.
    """

    moved: dict[str, list[float]]
    right: tuple[list[bool], list[bool]]

    @property
    def unbroken(self) -> list[bool]:
        """The images that the network is right about, attacked or not."""
        return [clean and adversarial for clean, adversarial in zip(*self.right, strict=True)]

    @property
    def accuracies(self) -> tuple[float, float]:
        """Clean, and under the attack, which breaks no image that was wrong before."""
        clean, unbroken = self.right[0], self.unbroken
        return sum(clean) / len(clean), sum(unbroken) / len(unbroken)


class Recorder:
    """Looks at a network, batch after batch.

    Args:
        model: the network; it is put into evaluation mode while it runs.
        bins: of a channel's histogram; see `models.histograms`. Memory is 32 · bins bytes for each channel.

    Example:
        >>> recorder = Recorder(model)
        >>> for x, y in data.test.ordered(100, 500):
        ...     recorder.add(x, perturb(model, x, y, pgd(0.2, 20), generator), y)
        >>> [layer.outputs.l2 for layer in recorder.layers()]
    """

    def __init__(self, model: nn.Module, bins: int = BINS) -> None:
        self.model, self.bins = model, bins
        self.modules = taps.activations(model)
        if not self.modules:
            raise UserError(
                "the network has no activation modules: functions such as F.relu cannot be looked at; use nn.ReLU"
            )
        self._sides: dict[tuple[str, str], _Side] = {}
        self._ranks: dict[str, int] = {}
        # Of each image, a column: mean distance of inputs and of outputs, whether x and x' are right (NaN: unknown).
        self._seen = torch.zeros(4, 0, dtype=torch.float64)

    @property
    def images(self) -> int:
        """How many have been seen."""
        return self._seen.shape[1]

    @property
    def names(self) -> list[str]:
        """The activations in the order in which an image meets them; a module's second call is `name (2)`."""
        return list(self._ranks)

    def add(self, clean: Tensor, adversarial: Tensor, labels: Tensor | None = None) -> None:
        """Run the network on images [N, C, H, W] and the adversarial image of each; labels [N] for `by_image`.

        Raises:
            ValueError: the shapes differ.
            UserError: values in the network are not finite; the recorder is of no use then.
        """
        if clean.shape != adversarial.shape:
            raise ValueError(
                f"adversarial must have the shape of clean, {list(clean.shape)}, got {list(adversarial.shape)}"
            )
        calls: dict[str, int] = {}
        ratios: dict[str, list[Tensor]] = {side: [] for side in SIDES}

        def see(module: str, x: Tensor, y: Tensor) -> None:
            calls[module] = calls.get(module, 0) + 1
            name = module if calls[module] == 1 else f"{module} ({calls[module]})"
            self._ranks[name] = x.dim()
            for side, values in zip(SIDES, (x, y), strict=True):
                ratios[side].append(self._see(name, side, values))

        # Both in one batch: images do not influence each other in evaluation mode, and nothing has to be kept.
        with evaluation_mode(self.model), torch.no_grad(), taps.tapped(self.modules, see):
            logits = self.model(torch.cat([clean, adversarial]))
        moved = torch.stack([torch.stack(ratios[side]).nanmean(0) for side in SIDES])
        right = torch.full_like(moved, math.nan) if labels is None else logits.argmax(1).reshape(2, -1) == labels
        self._seen = torch.cat([self._seen, torch.cat([moved, right]).to(self._seen)], 1)

    def layers(self) -> list[Layer]:
        """Return what has been seen so far."""
        return [
            Layer(name, self._sides[name, "inputs"].moved(), self._sides[name, "outputs"].moved())
            for name in self.names
        ]

    def by_image(self) -> Images:
        """Return what became of each image; the labels of all must have been given."""
        moved, right = self._seen[:2].tolist(), self._seen[2:]
        if right.isnan().any():
            raise ValueError("labels were not given, so which images were broken is not known")
        clean, adversarial = right.bool().tolist()
        return Images(dict(zip(SIDES, moved, strict=True)), (clean, adversarial))

    def panels(self, layers: int = 5, channels: int = 4) -> list[Panel]:
        """Return evenly chosen channels of evenly chosen layers, with their curves."""
        panels = []
        for place in spread(len(self.names), layers):
            name = self.names[place]
            for channel in spread(self._sides[name, "inputs"].channels, channels):
                panels.append(self._panel(place, name, channel))
        return panels

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that has been seen, as tensors and JSON values, for `load_state`."""
        tensors = {
            f"{name}/{side}/{key}": tensor
            for (name, side), sums in self._sides.items()
            for key, tensor in sums.state().items()
        }
        return {**tensors, "images": self._seen}, {"ranks": self._ranks}

    def load_state(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Take up what another recorder of the same network had seen."""
        self._ranks, self._seen = dict(record["ranks"]), tensors["images"].cpu()
        for name in self._ranks:
            for side in SIDES:
                found = {key: tensors[f"{name}/{side}/{key}"] for key in _Side.KEYS}
                self._sides[name, side] = _Side.of_state(found, _device(self.model))

    def _see(self, name: str, side: str, values: Tensor) -> Tensor:  # [N]
        if values.dim() < 2:
            raise UserError(f"{name} works on values of shape {list(values.shape)}; wanted [N, C, *]")
        if (name, side) not in self._sides:
            self._sides[name, side] = _Side(values.shape[1], self.bins, values.device)
        try:
            return self._sides[name, side].add(values)
        except NotFinite as error:
            raise UserError(f"the {side} of {name}: {error}; the network cannot be looked at") from error

    def _panel(self, place: int, name: str, channel: int) -> Panel:
        inputs = self._sides[name, "inputs"]
        module = self.modules[name.partition(" ")[0]]
        dictionary = None
        low, high = inputs.range(channel)
        if isinstance(module, kafops.KAF):
            first, last = ends(module)
            at = channel if len(first) > 1 else 0
            dictionary = first[at].item(), last[at].item()
            margin = 0.06 * (dictionary[1] - dictionary[0])
            low, high = min(low, dictionary[0] - margin), max(high, dictionary[1] + margin)
        density = inputs.density(channel, low, high)
        x = torch.linspace(low, high, _POINTS, device=_device(self.model))
        y = curve(module, x, inputs.channels, self._ranks[name])
        return Panel(
            place, name, channel, density, self._sides[name, "outputs"].density(channel),
            [] if y is None else x.tolist(), [] if y is None else y[channel].tolist(), dictionary,
        )  # fmt: skip


class _Side:
    """Sums over the values seen so far on one side of an activation; rows are the clean channels, then the others."""

    KEYS = ("counts", "exponent", "moments", "paired")

    def __init__(self, channels: int, bins: int, device: torch.device) -> None:
        self.histogram = Histogram(2 * channels, bins, device)
        self.moments = torch.zeros(2, 2 * channels, dtype=torch.float64, device=device)  # Σ v, Σ v²
        # Over images: Σ r, Σ r², Σ d, how many have no r, how many there are; d = ‖a(x') − a(x)‖, r = d / ‖a(x)‖.
        self.paired = torch.zeros(5, dtype=torch.float64, device=device)

    @property
    def channels(self) -> int:
        return len(self.histogram.counts) // 2

    def add(self, values: Tensor) -> Tensor:  # [2N, C, *], the clean ones first -> [N]
        """Count values, and return ‖a(x') − a(x)‖ / ‖a(x)‖ of each image, NaN where a(x) = 0."""
        count, channels = len(values) // 2, values.shape[1]
        rows = values.reshape(2, count, channels, -1).transpose(1, 2).reshape(2 * channels, -1)
        self.histogram.add(rows)
        norm = torch.linalg.vector_norm
        self.moments += torch.stack([rows.sum(1, dtype=torch.float64), norm(rows, dim=1, dtype=torch.float64).square()])
        clean, adversarial = values.reshape(2, count, -1)
        distance = norm(adversarial - clean, dim=1, dtype=torch.float64)
        size = norm(clean, dim=1, dtype=torch.float64)
        every = torch.where(size > 0, distance / size, math.nan)
        ratio = every[size > 0]
        sums = (ratio.sum(), ratio.square().sum(), distance.sum(), (size == 0).sum(), torch.tensor(count))
        self.paired += torch.stack([s.to(self.paired) for s in sums])
        return every

    def state(self) -> dict[str, Tensor]:
        values = (self.histogram.counts, self.histogram.exponent, self.moments, self.paired)
        return dict(zip(self.KEYS, values, strict=True))

    @classmethod
    def of_state(cls, state: dict[str, Tensor], device: torch.device) -> "_Side":
        rows, bins = state["counts"].shape
        side = cls(rows // 2, bins, device)
        side.histogram.counts, side.histogram.exponent = state["counts"].to(device), state["exponent"].to(device)
        side.moments, side.paired = state["moments"].to(device), state["paired"].to(device)
        return side

    def moved(self) -> Moved:
        clean, adversarial = self._halves()
        distances = wasserstein(clean, adversarial)
        widths = torch.maximum(clean.width, adversarial.width)
        total = self.histogram.counts.sum(1)
        mean, square = self.moments / total
        std = (square - mean.square()).clamp(min=0).sqrt()
        scale = std[: self.channels].mean().item()
        ordered = (distances / scale).sort().values.tolist() if scale > 0 else None
        ratios, squares, distance, silent, images = self.paired.tolist()
        seen = images - silent
        l2 = ratios / seen if seen else None
        return Moved(
            l2, math.sqrt(max(squares / seen - (ratios / seen) ** 2, 0.0)) if seen else None, distance / images,
            int(silent), *_summary(ordered), scale, distances.tolist(), widths.tolist(),
            _halves(mean), _halves(std),
        )  # fmt: skip

    def range(self, channel: int) -> tuple[float, float]:
        """Return an interval that holds nearly all values of a channel, clean and adversarial."""
        rows = [channel, channel + self.channels]
        low, high = self.histogram.lower(1 - _TAIL)[rows].min().item(), self.histogram.upper(1 - _TAIL)[rows].max()
        return low, high.item()

    def density(self, channel: int, low: float | None = None, high: float | None = None) -> Density:
        """Return the densities of a channel on about `_COLUMNS` columns of whole bins that cover [low, high]."""
        if low is None or high is None:
            low, high = self.range(channel)
        clean, adversarial = self._halves(aligned=True)
        width, half = clean.width[channel].item(), clean.bins // 2
        first, last = (min(max(math.floor(end / width), -half), half - 1) for end in (low, high))
        group = max(1, math.ceil((last - first + 1) / _COLUMNS))
        first = group * math.floor(first / group)
        columns = math.ceil((last - first + 1) / group)
        places = torch.arange(-half, half, device=clean.counts.device).sub(first).div(group, rounding_mode="floor")
        inside = (places >= 0) & (places < columns)

        def of(histogram: Histogram) -> list[float]:
            counts = histogram.counts[channel]
            sums = torch.zeros(columns, dtype=torch.int64, device=counts.device)
            sums.scatter_add_(0, places[inside], counts[inside])
            return (sums.double() / (counts.sum() * group * width)).tolist()

        edges = [(first + group * i) * width for i in range(columns + 1)]
        return Density(edges, of(clean), of(adversarial))

    def _halves(self, aligned: bool = False) -> tuple[Histogram, Histogram]:
        """Return the clean histogram and the adversarial one, where asked for with the same bins."""
        parts = []
        exponents = _split(self.histogram.exponent)
        for counts, exponent in zip(_split(self.histogram.counts), exponents, strict=True):
            part = Histogram(self.channels, self.histogram.bins, counts.device)
            part.counts, part.exponent = counts, exponent
            parts.append(part.widened(torch.maximum(*exponents)) if aligned else part)
        return parts[0], parts[1]


ALL, UNBROKEN, COMMON = "all", "unbroken", "unbroken in every network"


def across(networks: Sequence[Images]) -> dict[str, dict[str, list[float]]]:
    """Return how far images are moved in each network, by which images and side: means over these images.

    "all" are all images; "unbroken" those that a network is right about under attack, of which a robust one has
    more, and harder ones; "unbroken in every network" the same images for all. NaN where there are none.
    """
    unbroken = np.array([images.unbroken for images in networks])
    chosen = {
        ALL: np.ones_like(unbroken),
        UNBROKEN: unbroken,
        COMMON: np.broadcast_to(unbroken.all(0), unbroken.shape),
    }
    return {
        which: {
            side: [_mean(np.array(images.moved[side])[mask]) for images, mask in zip(networks, masks, strict=True)]
            for side in SIDES
        }
        for which, masks in chosen.items()
    }


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def curve(module: nn.Module, x: Tensor, channels: int, rank: int) -> Tensor | None:  # [P] -> [C, P]
    """Return an activation's value at each x for each channel; None where it is no function of one value."""
    if not taps.elementwise(module):
        return None
    grid = x.view(-1, 1).expand(-1, channels).reshape(len(x), channels, *[1] * (rank - 2))
    with torch.no_grad():
        return module(grid).flatten(1).T


def spread(count: int, wanted: int) -> list[int]:
    """Return up to `wanted` indices evenly spread from the first to the last of `count`."""
    wanted = min(count, wanted)
    return [round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)]


def _summary(ordered: Sequence[float] | None) -> tuple[float | None, float | None, float | None]:
    """Return the mean, and the 10th and the 90th of 100, of numbers in order."""
    if ordered is None:
        return None, None, None
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9))
    return sum(ordered) / len(ordered), low, high


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def _halves(rows: Tensor) -> tuple[list[float], list[float]]:
    clean, adversarial = _split(rows)
    return clean.tolist(), adversarial.tolist()


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
