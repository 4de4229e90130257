"""What share of its inputs a KAF layer gets from outside its dictionary, where curves end."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kafops
from models.evaluation import BATCH_SIZE, evaluation_mode
from models.histograms import Histogram, NotFinite
from models.taps import tapped
from models.training.curves import kaf_layers

LIMIT = 0.05
"""The share above which a layer's boundary is too small for its inputs."""
INSIDE = 0.999
"""The share of a layer's inputs that a suggested boundary encloses."""
_FAR = 10.0  # times the boundary: so far out is not for a larger dictionary to reach


@dataclass(frozen=True)
class Outside:
    """The layer of a network with the largest share of inputs outside its dictionary, and a boundary for all.

    Args:
        layer: name of its module.
        share: of its inputs, in [0, 1].
        low, high: where its dictionary begins and ends, in the units of the inputs: ±boundary, unless it is learned.
        suggested: a boundary that encloses 99.9 % of the inputs of every layer; None where some are not finite.
        base: whether its curves lie on one.
    """

    layer: str
    share: float
    low: float
    high: float
    suggested: float | None
    base: bool = False

    @property
    def warning(self) -> str | None:
        """What to do about it, where the share is above 5 %."""
        if self.share <= LIMIT:
            return None
        seen = (
            f"{self.share:.1%} of the inputs of {self.layer} lie outside its dictionary [{self.low:.3g}, "
            f"{self.high:.3g}], where a curve falls to {'its base' if self.base else '0'} and learns nothing. "
        )
        if self.suggested is None or self.suggested > _FAR * self.high:
            reach = "some are not finite" if self.suggested is None else f"up to ±{self.suggested:g}"
            return seen + (
                f"They are out of scale ({reach}): the activation needs a norm before it, or the statistics of the one "
                "that is there have not settled; a lower --lr may help."
            )
        return seen + (
            f"A larger boundary helps: boundary={self.suggested:g} as an option of --activation encloses 99.9 % of the "
            "inputs of every layer."
        )


def ends(layer: kafops.KAF) -> tuple[Tensor, Tensor]:  # [C] or [1] each
    """Return the first and the last point of each channel's dictionary, ±boundary unless the points are learned."""
    return layer.points().detach().aminmax(dim=1)


def rounded_up(boundary: float) -> float:
    """Return a boundary rounded up to two digits, as one would give it."""
    if boundary <= 0:
        return boundary
    unit = 10.0 ** (math.floor(math.log10(boundary)) - 1)
    return float(f"{math.ceil(boundary / unit - 1e-9) * unit:.6g}")


def measure(model: nn.Module, images: Tensor, batch_size: int = BATCH_SIZE) -> Outside | None:
    """Measure on images [N, C, H, W] in [0, 1], in evaluation mode; None for a network without KAF layers.

    Draws no random number and leaves the network as it was.
    """
    layers = kaf_layers(model)
    if not layers:
        return None
    counts = {name: [0, 0] for name in layers}
    sizes = {name: Histogram(1, device=images.device) for name in layers}
    finite = True

    def see(name: str, x: Tensor, y: Tensor) -> None:
        nonlocal finite
        low, high = (end.view(-1, *[1] * (x.dim() - 2)) for end in ends(layers[name]))
        counts[name][0] += x.numel() - int(((x >= low) & (x <= high)).sum())  # so that a NaN is outside
        counts[name][1] += x.numel()
        try:
            sizes[name].add(x.abs().reshape(1, -1))
        except NotFinite:
            finite = False

    with evaluation_mode(model), torch.no_grad(), tapped(layers, see):
        for batch in images.split(batch_size):
            model(batch)
    shares = {name: outside / max(total, 1) for name, (outside, total) in counts.items()}
    worst = max(shares, key=shares.__getitem__)
    reach = [size.upper(INSIDE).item() for size in sizes.values() if size.counts.any()]
    suggested = rounded_up(max(reach)) if finite and reach else None
    low, high = ends(layers[worst])
    return Outside(worst, shares[worst], low.min().item(), high.max().item(), suggested, layers[worst].base is not None)
