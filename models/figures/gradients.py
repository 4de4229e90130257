"""Gradient norms over layers as networks start, and over epochs."""

import itertools
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from models.figures import style

_PALETTE = (style.GREY, style.BLUE, "#56b4e9", "#cc79a7", "#e69f00", "#009e73", "#f0e442", style.VERMILLION)


def starts(found: list[dict[str, Any]]) -> bytes:
    """Draw the gradient norm of each convolution relative to the last one's: a panel a network, a line an activation.

    The line is of the first seed.
    """
    networks = list(dict.fromkeys(s["network"] for s in found))
    activations = list(dict.fromkeys(s["activation"] for s in found))
    first = {(s["network"], s["activation"]): s for s in reversed(found)}
    columns = min(3, len(networks))
    rows = -(-len(networks) // columns)
    with style.context():
        figure = style.figure(height=0.3 + 0.22 * -(-len(activations) // _columns(activations)) + 1.75 * rows)
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for axes, network in itertools.zip_longest(grid.flat, networks):
            if network is None:
                axes.set_axis_off()
                continue
            for activation in activations:
                norms = first[network, activation]["weights"]
                shares = [n / norms[-1] if n and norms[-1] else None for n in norms]
                axes.plot(range(1, len(norms) + 1), shares, lw=1.1, **_look(activations, activation))
            axes.set_yscale("log")
            axes.set_title(_short(network), fontsize=8)
            axes.axhline(1, color=style.PALE_GREY, lw=0.8, zorder=0)
            axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        for axes in grid[-1]:
            axes.set_xlabel("convolution")
        for axes in grid[:, 0]:
            axes.set_ylabel("gradient, to the last", fontsize=8)
        _legend(figure, activations)
        return style.png(figure)


def training(results: list[tuple[str, str, dict[str, Any]]]) -> bytes:
    """Draw the ratio of the first gradient norm to the last one's over epochs: (network, activation, result) each."""
    networks = list(dict.fromkeys(network for network, _, _ in results))
    activations = list(dict.fromkeys(activation for _, activation, _ in results))
    with style.context():
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
        return style.png(figure)


def _epochs(axes: Axes, result: dict[str, Any], look: dict[str, Any]) -> None:
    points = [(g["epoch"], g["ratio"]) for g in result["gradients"]]
    axes.plot(*zip(*points, strict=True), lw=1, **look)
    if "error" in result:
        axes.plot(*points[-1], "x", color=look["color"], ms=6, mew=1.6)


def _legend(figure: Any, activations: list[str]) -> None:
    handles = [Line2D([], [], label=a, **_look(activations, a)) for a in activations]
    figure.legend(handles=handles, loc="outside upper left", ncols=_columns(activations), fontsize=8, handlelength=2)


def _columns(activations: list[str]) -> int:
    """Return how many labels fit side by side."""
    return 4 if max(map(len, activations)) <= 14 else 2


def _look(activations: list[str], activation: str) -> dict[str, Any]:
    """Return colour and dashes; every other line is dashed, so that lines on one another are both seen."""
    number = activations.index(activation)
    return {"color": _PALETTE[number % len(_PALETTE)], "ls": ((0, (4, 2)) if number % 2 else "-")}


def _short(network: str) -> str:
    """Return a network's name, and of its options those of the residual blocks."""
    name, _, options = network.partition(":")
    shown = (o.removeprefix("form=") for o in options.split(",") if o.startswith(("form=", "branch=")))
    return ", ".join([name, *shown])
