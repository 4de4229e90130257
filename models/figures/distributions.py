"""Activations clean against adversarial: densities channel by channel, and distances along the depth of networks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from models.figures import style

_SIDES = ("inputs", "outputs")
_COLUMNS = 4
_SPIKE = 4.0  # times the second highest column, above which the highest one is cut off and its share written down
_PALETTE = (style.VERMILLION, style.BLUE, style.GREY, style.GREEN, style.PINK, style.ORANGE, style.SKY)
_BANDS = 3  # networks, above which their spreads would only hide each other


Content = Mapping[str, Any]
"""What a distributions.json holds, or an entry in it."""


@style.drawn
def inputs(panels: Sequence[Content], layers: int) -> Figure:
    """Draw the densities of what goes into the activations, with the learned curves over them on the right axis.

    Args:
        panels: channel after channel, layer after layer; a layer is a row.
        layers: how many activations the network has.
    """
    handles = []
    if any(panel["x"] for panel in panels):
        handles.append(Line2D([], [], color=style.VERMILLION, lw=1.4, label="f, right axis"))
    if any(panel["dictionary"] for panel in panels):
        handles.append(Line2D([], [], color=style.VERMILLION, lw=0.8, ls=(0, (2, 2)), label="ends of the dictionary"))
    figure, rows = _small_multiples(panels, layers, "inputs", handles)
    for row in rows:
        values = [y for panel, _ in row for y in panel["y"]]
        for panel, axes in row:
            if values:
                _curve(axes, panel, min(values), max(values), labelled=panel is row[-1][0])
    return figure


@style.drawn
def outputs(panels: Sequence[Content], layers: int) -> Figure:
    """Draw the densities of what comes out of the activations; arguments are those of `inputs`."""
    cut = Line2D([], [], ls="", label="a → b %: share in a column that is cut off")
    return _small_multiples(panels, layers, "outputs", [cut])[0]


@style.drawn
def depth(results: Mapping[str, Content]) -> Figure:
    """Draw paired and Wasserstein distances over the depth of networks, of the inputs and the outputs of activations.

    Where all have as many activations the axis counts these, else it is the share of the depth. With up to three
    networks bands show the spread: a standard deviation over images, and 80 % of the channels.
    """
    activations = [result["settings"]["activation"] for result in results.values()]
    looks, shares = _looks(activations), len({len(result["layers"]) for result in results.values()}) > 1
    figure = style.figure(height=3.7 + 0.2 * -(-len(results) // 2))
    grid = figure.subplots(2, 2, sharex=True, sharey="row")
    for axes, side in zip(grid[0], _SIDES, strict=True):
        axes.set_title(f"{side} of the activations")
    for result, look in zip(results.values(), looks, strict=True):
        count = len(result["layers"])
        x = np.arange(1, count + 1) / (count if shares else 1)
        for column, side in enumerate(_SIDES):
            moved = [layer[side] for layer in result["layers"]]
            l2, std, w1, low, high = (_percent(moved, name) for name in ("l2", "l2_std", "w1", "w1_low", "w1_high"))
            for axes, line, ends in zip(grid[:, column], (l2, w1), ((l2 - std, l2 + std), (low, high)), strict=True):
                if len(results) <= _BANDS:
                    axes.fill_between(x, np.maximum(ends[0], 0), ends[1], color=look["color"], alpha=0.13, lw=0)
                axes.plot(x, line, marker="o" if count <= 30 else "", ms=3, lw=1.5, **look)
    for axes in grid.flat:
        style.grid(axes, "y")
        axes.set_ylim(bottom=0)
        if not shares:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    grid[0, 0].set_ylabel("‖a(x′) − a(x)‖ / ‖a(x)‖, %")
    grid[1, 0].set_ylabel("Wasserstein-1, % of std")
    for axes in grid[1]:
        axes.set_xlabel("share of the depth" if shares else "activation, from image to logits")
    handles: list[Line2D | Patch] = [
        Line2D([], [], **look, lw=1.6, label=f"{label} ({activation})")
        for label, activation, look in zip(results, activations, looks, strict=True)
    ]
    if len(results) <= _BANDS:
        spread = "bands: ± std of images, 80 % of channels"
        handles.append(Patch(color=style.PALE_GREY, lw=0, label=spread))
    style.legend(figure, handles, 2)
    return figure


@style.drawn
def against(runs: Sequence[Content]) -> Figure:
    """Draw robust accuracy over how far images are moved: a column for each kind of images, inputs above outputs.

    Args:
        runs: entries of "runs" in the distributions.json of several.
    """
    names = [run["activation"] + (", frozen" if run["frozen"] else "") for run in runs]
    activations, rates = list(dict.fromkeys(names)), sorted({run["lr"] for run in runs})
    colours = {name: style.PALETTE[number % len(style.PALETTE)] for number, name in enumerate(activations)}
    marks = {rate: style.MARKS[number % len(style.MARKS)] for number, rate in enumerate(rates)}
    kinds = list(runs[0]["moved"])
    moved = [value for run in runs for of_sides in run["moved"].values() for value in of_sides.values() if value]
    across, up = _around(moved or [0.0, 1.0]), _around([run["accuracy"]["attacked"] for run in runs])
    figure = style.figure(height=4.8 + 0.2 * (-(-(len(activations) + len(rates)) // 4)))
    grid = figure.subplots(len(_SIDES), len(kinds), sharex=True, sharey=True, squeeze=False)
    for row, side in zip(grid, _SIDES, strict=True):
        for axes, kind in zip(row, kinds, strict=True):
            for name, run in zip(names, runs, strict=True):
                if (value := run["moved"][kind][side]) is not None:
                    look = {"color": colours[name], "mfc": "none", "mew": 1.3}
                    axes.plot(100 * value, 100 * run["accuracy"]["attacked"], marks[run["lr"]], ms=5, **look)
            axes.set_xlim(*across)
            axes.set_ylim(*up)
            style.grid(axes, "both")
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.set_xlabel(f"{side} move by, %")
        row[0].set_ylabel("accuracy under attack, %")
    for axes, kind in zip(grid[0], kinds, strict=True):
        axes.set_title(f"images: {kind}".replace(" in ", "\nin "), fontsize=8)
    handles = [style.handle(name, colour, "s", ms=6) for name, colour in colours.items()]
    handles += [style.handle(f"learning rate {rate:g}", style.GREY, mark, mfc="none") for rate, mark in marks.items()]
    style.legend(figure, handles, 4, handletextpad=0.2)
    return figure


def _around(shares: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis, in %, that show shares with some room, and no more of below 0."""
    low, high = 100 * min(shares), 100 * max(shares)
    room = 0.08 * max(high - low, 10.0)
    return max(low - room, -room), high + room


def _looks(activations: Sequence[str]) -> list[dict[str, Any]]:
    """Return colour and dashes of each network's line; where colours run out, the next of one is dashed otherwise."""
    colours = _colours(activations)
    return [{"color": c, "ls": style.DASHES[colours[:i].count(c) % len(style.DASHES)]} for i, c in enumerate(colours)]


def _colours(activations: Sequence[str]) -> list[str]:
    """Return a colour for each network: the house's for its activation, where no other network has it."""
    colours: list[str] = []
    for name in (activation.partition(":")[0] for activation in activations):
        own = style.COLOURS.get(name, style.VERMILLION if name.startswith("kaf") else style.BLUE)
        free = [colour for colour in (own, *_PALETTE) if colour not in colours]
        colours.append(free[0] if free else _PALETTE[len(colours) % len(_PALETTE)])
    return colours


def _percent(moved: Sequence[Content], name: str) -> np.ndarray:
    """Return what each has by that name, a share, in %; NaN where there is nothing."""
    return 100 * np.array([entry[name] for entry in moved], dtype=float)


def _small_multiples(
    panels: Sequence[Content], layers: int, side: str, more: list[Line2D]
) -> tuple[Figure, list[list[tuple[Content, Axes]]]]:
    """Draw the densities of one side; return the figure, and its panels with their axes, row by row."""
    places = list(dict.fromkeys(panel["layer"] for panel in panels))
    figure = style.figure(height=1.1 * len(places) + 0.9)
    grid = figure.subplots(len(places), _COLUMNS, squeeze=False)
    rows = []
    for place, its_axes in zip(places, grid, strict=True):
        row = list(zip([panel for panel in panels if panel["layer"] == place], its_axes, strict=False))
        for axes in its_axes[len(row) :]:
            axes.set_visible(False)
        for panel, axes in row:
            _densities(axes, panel[side])
            axes.set_title(f"channel {panel['channel']}", fontsize=8)
        row[0][1].set_ylabel(f"activation\n{place + 1} of {layers}\ndensity", fontsize=8)
        rows.append(row)
    figure.supxlabel(f"{side[:-1]} of the activation", fontsize=9, color=style.GREY)
    clean = Patch(color=style.BLUE, alpha=0.3, lw=0, label="clean")
    handles = [clean, Line2D([], [], color=style.GREY, lw=1, label="adversarial"), *more]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, fontsize=7.5, handlelength=1.3, columnspacing=1)
    return figure, rows


def _densities(axes: Axes, density: Content) -> None:
    axes.stairs(density["clean"], density["edges"], fill=True, color=style.BLUE, alpha=0.3, lw=0)
    axes.stairs(density["adversarial"], density["edges"], color=style.GREY, lw=1)
    axes.set_xlim(density["edges"][0], density["edges"][-1])
    axes.set_ylim(0, _top(axes, density))
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(3, min_n_ticks=2))
    axes.yaxis.set_major_locator(MaxNLocator(2, min_n_ticks=2))


def _top(axes: Axes, density: Content) -> float:
    """Return how high the axis goes, and write down the share in a column that it cuts off."""
    columns = np.maximum(density["clean"], density["adversarial"])
    order = np.sort(columns)
    if len(columns) < 3 or order[-1] <= _SPIKE * order[-2] or order[-2] == 0:
        return 1.1 * float(order[-1])
    top, place = 1.6 * float(order[-2]), int(np.argmax(columns))
    width = density["edges"][place + 1] - density["edges"][place]
    shares = (100 * width * values[place] for values in (density["clean"], density["adversarial"]))
    left = place < len(columns) / 2
    text = "{:.0f} → {:.0f} %".format(*shares)
    axes.annotate(
        text, (density["edges"][place + 1 if left else place], top), (3 if left else -3, -2),
        textcoords="offset points", ha="left" if left else "right", va="top", fontsize=6.5, color=style.GREY,
    )  # fmt: skip
    return top


def _curve(axes: Axes, panel: Content, low: float, high: float, labelled: bool) -> None:
    front = axes.twinx()
    margin = 0.08 * max(high - low, 1e-6)
    front.set_ylim(low - margin, high + margin)
    front.plot(panel["x"], panel["y"], color=style.VERMILLION, lw=1.4)
    axes.set_xlim(min(panel["x"][0], panel["inputs"]["edges"][0]), max(panel["x"][-1], panel["inputs"]["edges"][-1]))
    for end in panel["dictionary"] or ():
        axes.axvline(end, color=style.VERMILLION, lw=0.8, ls=(0, (2, 2)), alpha=0.7)
    front.tick_params(axis="y", labelsize=7, colors=style.VERMILLION)
    front.spines["right"].set(visible=True, color=style.VERMILLION)
    front.yaxis.set_major_locator(MaxNLocator(3, min_n_ticks=2))
    if labelled:
        front.set_ylabel("f", color=style.VERMILLION, rotation=0, va="center")
    else:
        front.set_yticklabels([])
