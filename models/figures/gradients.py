"""Gradient norms over layers as networks start, and over epochs."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from models.figures import style

Start = dict[str, Any]
"""Names and norms of a network as it starts, as `models.study.depth.start` returns them."""


def starts(found: Sequence[Start]) -> bytes:
    """Draw the gradient norm of each convolution relative to the last one's: a panel a network, a line an activation.

    The line is of the first seed.
    """
    return _panels(found, lambda start: _relative(start["weights"]), "convolution", "gradient, to the last")


def signals(found: Sequence[Start]) -> bytes:
    """Draw the size of the signal behind each residual block, or activation where there are none, as `starts` does."""
    return _panels(found, lambda start: _known(start["signals"]), "block", "size of the signal")


@style.drawn
def _panels(found: Sequence[Start], line: Callable[[Start], list[float]], along: str, measured: str) -> Figure:
    networks = list(dict.fromkeys(s["network"] for s in found))
    activations = list(dict.fromkeys(s["activation"] for s in found))
    first = {(s["network"], s["activation"]): s for s in reversed(found)}
    columns = min(3, len(networks))
    rows = -(-len(networks) // columns)
    panel = 3.2 if len(networks) == 1 else 1.75
    figure = style.figure(height=0.3 + 0.22 * -(-len(activations) // _columns(activations)) + panel * rows)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, network in itertools.zip_longest(grid.flat, networks):
        if network is None:
            axes.set_axis_off()
            continue
        for activation in activations:
            _draw(axes, line(first[network, activation]), **_look(activations, activation))
        _scale(axes)
        axes.set_title(_short(network), fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel(along)
    for axes in grid[:, 0]:
        axes.set_ylabel(measured, fontsize=8)
    _legend(figure, activations)
    return figure


@style.drawn
def layers(results: list[tuple[str, str, dict[str, Any]]]) -> Figure:
    """Draw norms layer by layer at the start, dotted, and at the end: (network, activation, layers) each.

    Above gradients of convolutions relative to the last one's, below sizes of signals; a column a network.
    """
    networks = list(dict.fromkeys(network for network, _, _ in results))
    activations = list(dict.fromkeys(activation for _, activation, _ in results))
    figure = style.figure(height=4.6)
    grid = figure.subplots(2, len(networks), sharey="row", squeeze=False)
    for name, activation, found in results:
        above, below = grid[:, networks.index(name)]
        colour = {"color": _look(activations, activation)["color"]}
        for when, dashes in (("start", ":"), ("end", "-")):
            _draw(above, _relative(found[when]["weights"]), **colour, ls=dashes)
            _draw(below, _known(found[when]["signals"]), **colour, ls=dashes)
    for name, (above, below) in zip(networks, grid.T, strict=True):
        above.set(title=name, xlabel="convolution")
        below.set(xlabel="block")
        _scale(above)
        _scale(below)
    grid[0, 0].set_ylabel("gradient, to the last")
    grid[1, 0].set_ylabel("size of the signal")
    handles = [style.handle(a, _look(activations, a)["color"]) for a in activations]
    handles += [style.handle(label, "black", ls=ls) for label, ls in (("start", ":"), ("end", "-"))]
    style.legend(figure, handles, len(handles) if _columns(activations) == 4 else 3, handlelength=1.5)
    return figure


def _draw(axes: Axes, values: list[float], **look: Any) -> None:
    axes.plot(range(1, len(values) + 1), values, lw=1.1, **look)


def _scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.axhline(1, color=style.PALE_GREY, lw=0.8, zorder=0)
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))


def _relative(norms: list[float | None]) -> list[float]:
    """Return norms relative to the last one; NaN, which is not drawn, for what is unknown or 0."""
    last = norms[-1]
    return [n / last if n and last else math.nan for n in norms]


def _known(sizes: list[float | None]) -> list[float]:
    return [size or math.nan for size in sizes]


@style.drawn
def training(results: list[tuple[str, str, dict[str, Any]]]) -> Figure:
    """Draw the ratio of the first gradient norm to the last one's over epochs: (network, activation, result) each."""
    networks = list(dict.fromkeys(network for network, _, _ in results))
    activations = list(dict.fromkeys(activation for _, activation, _ in results))
    figure = style.figure(height=2.9)
    panels = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    for axes, network in zip(panels, networks, strict=True):
        axes.axhspan(0.1, 10, color=style.PALE_GREY, alpha=0.4, lw=0)
        for name, activation, result in results:
            if name == network:
                _epochs(axes, result, _look(activations, activation))
        axes.set_yscale("log")
        axes.set_title(network)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    panels[0].set_ylabel("gradient norm, first to last")
    _legend(figure, activations)
    return figure


def _epochs(axes: Axes, result: dict[str, Any], look: dict[str, Any]) -> None:
    points = [(g["epoch"], g["ratio"]) for g in result["gradients"]]
    axes.plot(*zip(*points, strict=True), lw=1, **look)
    if "error" in result:
        axes.plot(*points[-1], "x", color=look["color"], ms=6, mew=1.6)


def _legend(figure: Figure, activations: list[str]) -> None:
    handles = [Line2D([], [], label=a, **_look(activations, a)) for a in activations]
    style.legend(figure, handles, _columns(activations), handlelength=2)


def _columns(activations: list[str]) -> int:
    """Return how many labels fit side by side."""
    return 4 if max(map(len, activations)) <= 14 else 2


def _look(activations: list[str], activation: str) -> dict[str, Any]:
    """Return colour and dashes; every other line is dashed and above the others, so that lines on one another are seen.

    The palette has an odd number of colours: the second line of a colour is dashed where the first is not.
    """
    number = activations.index(activation)
    dashes = {"ls": (0, (4, 2)), "zorder": 2.5} if number % 2 else {"ls": "-"}
    return {"color": style.PALETTE[number % len(style.PALETTE)], **dashes}


def _short(network: str) -> str:
    """Return a network's name, and of its options those of the residual blocks."""
    name, _, options = network.partition(":")
    shown = (o.removeprefix("form=") for o in options.split(",") if o.startswith(("form=", "branch=")))
    return ", ".join([name, *shown])
