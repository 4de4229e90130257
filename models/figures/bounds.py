"""Lipschitz constants from below and from above, and accuracies that are proved beside those that attacks leave."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from models.figures import style

_METHODS = {"interval propagation": style.GREEN, "global Lipschitz": style.GREY, "local Lipschitz": style.VERMILLION}
_LINE = 0.09  # of the height of the upper panel, a line of text
_LEAST_RADIUS = 1e-7  # where the axis of radii begins, at the latest


Result = Mapping[str, Any]
"""The content of a bounds.json."""


def certified(result: Result, at: float) -> float:
    """Return the accuracy that is proved at a radius, a share."""
    return next(point["linf"] for point in result["certified"] if point["eps"] == at)


def at_eps(result: Result) -> float:
    """Return the accuracy under the attack at its radius, a share."""
    return next(point["accuracy"] for point in result["attacked"] if point["eps"] == result["identity"]["eps"])


@style.drawn
def network(result: Result, images: Sequence[Mapping[str, float]]) -> Figure:
    """Draw how the bound of one network grows over its layers, above what is found, and its accuracies over radii.

    Args:
        result: of the network.
        images: the radii that are proved around each, by method: the content of images.json.
    """
    figure = style.figure(height=5.2)
    upper, lower = figure.subplots(2, 1)
    _growth(upper, result)
    _accuracies(lower, result, images)
    return figure


@style.drawn
def networks(groups: Mapping[str, Sequence[Result]], at: float) -> Figure:
    """Draw for each group what is found and proved of the Lipschitz constant, and accuracy: clean, attacked, proved.

    Args:
        groups: networks that differ in their seed alone, by what they are, from top to bottom; a thin mark for each
            network, and the geometric means of constants in numbers.
        at: radius of what is proved.
    """
    rows = list(groups.values())
    crowded = any(len(row) > 1 for row in rows)
    figure = style.figure(height=1.25 + (0.4 if crowded else 0.34) * len(rows))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for axes in (left, right):
        style.rows(axes, list(groups), above=0.7, fontsize=8)
    _constants(left, rows, 5 if crowded else 8)
    for place, row in enumerate(rows):
        _shares(right, place, row, at)
    right.set_xlim(-4, 104)
    right.set_xlabel("accuracy, %")
    legends = {
        left: [
            style.handle("found", style.BLUE, "o", ms=4),
            style.handle("proved around the median image", style.VERMILLION, "D", ms=4),
            style.handle("proved for all images", style.GREY, "|", ms=9),
        ],
        right: [
            style.handle("clean", style.GREY, "o", hollow=True, ms=4),
            style.handle(f"attacked at ε = {rows[0][0]['identity']['eps']:.3g}", style.BLUE, "o", ms=4),
            style.handle(f"proved at ε = {at:.3g}", style.VERMILLION, "D", ms=4),
        ],
    }
    for axes, handles in legends.items():
        axes.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(-0.02, 1), fontsize=7, handletextpad=0.1, borderaxespad=0
        )
    return figure


@style.drawn
def over_radius(groups: Mapping[str, Sequence[Result]]) -> Figure:
    """Draw accuracy under an attack over its radius: a line for each group's mean over seeds, a dot for each seed."""
    figure = style.figure(height=2.9 + 0.2 * -(-len(groups) // 3))
    axes = figure.subplots()
    for number, (label, them) in enumerate(groups.items()):
        look, points = style.line(number), [point for result in them for point in result["attacked"]]
        radii = sorted({point["eps"] for point in points})
        values = [[100 * point["accuracy"] for point in points if point["eps"] == radius] for radius in radii]
        axes.plot(radii, [sum(v) / len(v) for v in values], lw=1.5, label=label, **look)
        shift = 0.004 * max(radii) * (number - (len(groups) - 1) / 2)  # so that dots of groups are side by side
        for radius, of_seeds in zip(radii, values, strict=True):
            axes.plot([radius + shift] * len(of_seeds), of_seeds, ".", ms=4, color=look["color"])
    axes.set_ylim(0, 102)
    axes.set_xlabel("radius ε in L∞")
    axes.set_ylabel(f"accuracy under {next(iter(groups.values()))[0]['attack']['name']}, %")
    style.grid(axes, "y")
    style.legend(figure, handlelength=2.4)
    return figure


def _growth(axes: Axes, result: Result) -> None:
    layers, jumped = [], False  # without those of which nothing is known
    for layer in result["layers"]:
        jumped = jumped or layer["kind"] == "winners"
        if jumped or layer["bound"] is not None:
            layers.append((layer["name"], layer["bound"]))
    found, proved, around = result["lower"], result["upper"], result["local"]["p50"]
    finite = [(number, bound) for number, (_, bound) in enumerate(layers, 1) if bound]
    last = len(layers)
    axes.plot([0.5, last], [found] * 2, color=style.BLUE, lw=1, ls=(0, (3, 2)))
    axes.plot([x for x, _ in finite], [y for _, y in finite], "o-", color=style.GREY, ms=2.5, lw=1.2)
    if found > 0 or finite:
        axes.set_yscale("log")
    axes.set_xlim(0.5, 1.34 * last)
    told = [(found, "found", style.BLUE)]
    if proved is None:
        first = next((name for name, bound in layers if bound is None), "")
        axes.set_title(f"Lipschitz constant: no bound from {first} on, which jumps")
    else:
        axes.set_title("Lipschitz constant: bound up to each layer")
        told.append((proved, "proved for all", style.GREY))
    if around is not None:
        axes.plot([last], [around], "D", ms=5, color=style.VERMILLION)
        told.append((around, "around images", style.VERMILLION))
    ticks = MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]).tick_values(1, last)
    axes.set_xticks([tick for tick in ticks if 1 <= tick <= last])
    axes.set_xlabel("activation, sum, pooling, last layer")
    axes.set_ylabel("logits per image, L2")
    axes.yaxis.set_minor_locator(NullLocator())
    _tell(axes, last, told)


def _tell(axes: Axes, x: float, told: Sequence[tuple[float, str, str]]) -> None:
    """Write values beside the last layer, from the lowest up, so far apart that they can be read."""
    logarithmic = axes.get_yscale() == "log"
    low, high = (math.log(limit) if logarithmic else limit for limit in axes.get_ylim())
    least = 0.0
    for value, name, colour in sorted(told):
        place = max((math.log(value) - low) / (high - low) if value > 0 else 0.0, least)
        axes.annotate(
            f"{name}: {value:.3g}", (x, place), (8, 0), xycoords=axes.get_xaxis_transform(),
            textcoords="offset points", va="center", fontsize=8, color=colour,
        )  # fmt: skip
        least = place + _LINE


def _accuracies(axes: Axes, result: Result, images: Sequence[Mapping[str, float]]) -> None:
    (clean, *attacked), wide = result["attacked"], math.sqrt(result["pixels"])
    x = [point["eps"] for point in attacked]
    radii_of = {
        "interval propagation": [image["intervals"] for image in images],
        "global Lipschitz": [image["lipschitz"] / wide for image in images],
        "local Lipschitz": [image["local"] / wide for image in images],
    }
    proved = [radius for radii in radii_of.values() for radius in radii if radius > 0]
    first = max(min(proved, default=1e-3), _LEAST_RADIUS) / 2
    first = min(first, min(x) / 2)  # a network of one answer has all radii proved
    axes.axhline(100 * clean["accuracy"], color=style.GREY, lw=0.8, ls=(0, (1, 2)), label="clean")
    for name, radii in radii_of.items():
        _stairs(axes, radii, first, name)
    low, high = 100 * np.array([point["interval"] for point in attacked]).T
    axes.fill_between(x, low, high, color=style.BLUE, alpha=0.15, lw=0)
    under = f"under {result['attack']['name']}"
    axes.plot(x, [100 * point["accuracy"] for point in attacked], "o-", ms=3, lw=1.4, color=style.BLUE, label=under)
    axes.set_xscale("log")
    axes.set_xlim(first, max(x))
    axes.set_ylim(0, 105)
    axes.set_xlabel("radius ε in L∞")
    axes.set_ylabel("accuracy, %")
    axes.set_title("Accuracy: proved by three methods, and under attack (band: 95 % interval)", pad=32)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 0.98), ncols=3, fontsize=7.5, borderaxespad=0, columnspacing=1,
        handlelength=1.4, handletextpad=0.4,
    )  # fmt: skip
    style.grid(axes, "y")


def _stairs(axes: Axes, radii: Sequence[float], first: float, name: str) -> None:
    """Draw the share of images whose radius is at least x."""
    steps = np.sort([radius for radius in radii if radius > first])
    shares = 100 * np.arange(len(steps), 0, -1) / len(radii)
    label = name if len(steps) else f"{name}: {f'below {first:.0e}' if any(radii) else 'none'}"
    x, y = ([first, *steps], [*shares, 0.0]) if len(steps) else ([], [])
    axes.step(x, y, where="post", color=_METHODS[name], lw=1.6, label=label)


def _constants(axes: Axes, rows: Sequence[Sequence[Result]], size: float) -> None:
    axes.set_xscale("log")
    values = [v for row in rows for r in row for v in (r["lower"], r["local"]["p50"], r["upper"]) if v]
    # A network that does not move has the bound 0, which no logarithmic axis has: it is told at its left end.
    low, high = min(values, default=1.0), max(values, default=1.0)
    if low == high:
        low, high = low / 2, high * 2
    end = high * (high / low) ** 0.12
    for place, row in enumerate(rows):
        for result, y in zip(row, _places(place, len(row)), strict=True):
            upper, around = result["upper"], result["local"]["p50"]
            lower, to = max(result["lower"], low), max(end if upper is None else upper, low)
            axes.plot([lower, to], [y, y], color=style.PALE_GREY, lw=1.5, zorder=1)
            axes.plot(lower, y, "o", ms=4, color=style.BLUE)
            if around is not None:
                axes.plot(max(around, low), y, "D", ms=3.5, color=style.VERMILLION)
            mark, large = (">", 5) if upper is None else ("|", size)
            axes.plot(to, y, mark, ms=large, color=style.GREY)
        found, uppers = _mean([r["lower"] for r in row]), [r["upper"] for r in row if r["upper"] is not None]
        proved = _mean(uppers) if len(uppers) == len(row) else None
        told = [(found, f"{found:.2g}", style.BLUE)]
        told.append((end, "∞", style.GREY) if proved is None else (proved, f"{proved:.2g}", style.GREY))
        for x, text, colour in told:
            at = max(x, low), place - 0.16
            axes.annotate(text, at, (0, 4), textcoords="offset points", ha="center", fontsize=7, color=colour)
    axes.set_xlim(low / (high / low) ** 0.1, end * (high / low) ** 0.1)
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("Lipschitz constant, image to logits in L2")


def _places(place: int, count: int) -> list[float]:
    """Return where the networks of a row are."""
    return (place + np.linspace(-0.16, 0.16, count)).tolist() if count > 1 else [place]


def _mean(values: Sequence[float]) -> float:
    """Return the geometric mean, 0 where a value is."""
    if min(values) <= 0:
        return 0.0
    return math.exp(sum(math.log(value) for value in values) / len(values))


def _shares(axes: Axes, place: int, row: Sequence[Result], at: float) -> None:
    places = _places(place, len(row))
    for result, y in zip(row, places, strict=True):
        axes.plot(100 * result["attacked"][0]["accuracy"], y, "o", ms=4, color=style.GREY, mfc="white")
    for result, y in zip(row, places, strict=True):
        axes.plot(100 * at_eps(result), y, "o", ms=4, color=style.BLUE)
    for result, y in zip(row, places, strict=True):
        axes.plot(100 * certified(result, at), y, "D", ms=3.5, color=style.VERMILLION)
