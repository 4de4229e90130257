"""Learned curves before and after training, a few channels of a few layers, over the density of their inputs."""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

import kafops
from models.evaluation import evaluation_mode
from models.figures import style

LAYERS, CHANNELS, RANGE, POINTS = 5, 4, 4.5, 181


@dataclass(frozen=True)
class LayerCurves:
    """What the figure shows of one layer; rows are the chosen channels."""

    title: str
    boundary: float
    channels: list[int]
    before: Tensor  # [channels, POINTS]
    after: Tensor  # [channels, POINTS]
    inputs: list[Tensor]  # per channel, values that reached the curve


def collect(before: nn.Module, after: nn.Module, images: Tensor) -> list[LayerCurves]:
    """Sample the curves of evenly chosen layers and channels of two states of one network, and `after`'s inputs."""
    old, new = _layers(before), _layers(after)
    chosen = _spread(len(new), LAYERS)
    inputs = _inputs([new[i] for i in chosen], after, images)
    collected = []
    for i, x in zip(chosen, inputs, strict=True):
        channels = _spread(new[i].num_parameters, CHANNELS)
        collected.append(
            LayerCurves(
                f"activation\n{i + 1} of {len(new)}",
                new[i].boundary,
                channels,
                sample(old[i])[channels],
                sample(new[i])[channels],
                [x[:, c].flatten() for c in channels],
            )
        )
    return collected


def sample(layer: kafops.KAF) -> Tensor:  # [C, POINTS]
    """Return the curves of a layer on an even grid over [-RANGE, RANGE]."""
    grid = torch.linspace(-RANGE, RANGE, POINTS).view(-1, 1, 1, 1).expand(-1, layer.num_parameters, 1, 1)
    with torch.no_grad():
        return layer(grid)[:, :, 0, 0].T


def draw(layers: list[LayerCurves]) -> bytes:
    """Draw the small multiples."""
    with style.context():
        figure = style.figure(height=1.05 * len(layers) + 0.7)
        grid = figure.subplots(len(layers), CHANNELS, sharex=True, sharey="row", squeeze=False)
        for row, layer in zip(grid, layers, strict=True):
            for axes in row[len(layer.channels) :]:
                axes.set_visible(False)
            for place, axes in enumerate(row[: len(layer.channels)]):
                _panel(axes, layer, place)
            row[0].set_ylabel(layer.title, fontsize=8)
            row[0].yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
        for axes in grid[-1]:
            axes.set_xlabel("input")
        _legend(figure)
        return style.png(figure)


def _panel(axes: Axes, layer: LayerCurves, place: int) -> None:
    x = np.linspace(-RANGE, RANGE, POINTS)
    axes.axhline(0, color=style.PALE_GREY, lw=0.6)
    axes.plot(x, layer.before[place], color=style.GREY, lw=1, ls=(0, (3, 2)))
    axes.plot(x, layer.after[place], color=style.VERMILLION, lw=1.6)
    density, edges = np.histogram(layer.inputs[place], bins=60, range=(-RANGE, RANGE))
    behind = axes.twinx()
    behind.set_zorder(axes.get_zorder() - 1)
    axes.patch.set_visible(False)
    behind.stairs(density, edges, fill=True, color=style.BLUE, alpha=0.16, lw=0)
    behind.set_ylim(0, 1.6 * max(density.max(), 1))
    behind.axis("off")
    axes.set_xlim(-RANGE, RANGE)
    axes.set_xticks([-layer.boundary, 0, layer.boundary])
    axes.tick_params(labelsize=7)
    axes.set_title(f"channel {layer.channels[place]}", fontsize=8)


def _legend(figure: Figure) -> None:
    handles = [
        Line2D([], [], color=style.GREY, lw=1, ls=(0, (3, 2)), label="before training"),
        Line2D([], [], color=style.VERMILLION, lw=1.6, label="after"),
        Patch(color=style.BLUE, alpha=0.16, lw=0, label="density of the inputs, clean test images"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=8)


def _layers(network: nn.Module) -> list[kafops.KAF]:
    return [module for module in network.modules() if isinstance(module, kafops.KAF)]


def _inputs(layers: list[kafops.KAF], network: nn.Module, images: Tensor) -> list[Tensor]:
    seen: dict[nn.Module, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda module, arguments: seen.__setitem__(module, arguments[0]))
        for layer in layers
    ]
    try:
        with evaluation_mode(network), torch.no_grad():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[layer] for layer in layers]


def _spread(count: int, wanted: int) -> list[int]:
    """Return up to `wanted` indices evenly spread from the first to the last of `count`."""
    wanted = min(count, wanted)
    return [round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)]
