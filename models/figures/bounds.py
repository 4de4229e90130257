"""Lipschitz constants from below and from above, and accuracies that are proved beside those that attacks leave."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from models.figures import style
from models.figures.accuracy import Mark

_METHODS = {"interval propagation": style.GREEN, "global Lipschitz": style.GREY, "local Lipschitz": style.VERMILLION}
_LINE = 0.09  # of the height of the upper panel, a line of text
_LEAST_RADIUS = 1e-7  # where the axis of radii begins, at the latest


@dataclass(frozen=True)
class Bounds:
    """Of one network's Lipschitz constant: found, proved (None where infinite), and proved around the median image."""

    lower: float
    upper: float | None
    local: float | None


@dataclass(frozen=True)
class Certified:
    """Radii in L-infinity that are proved, one for each image, by method; and accuracies under attack by radius."""

    radii: Mapping[str, Sequence[float]]
    attack: str
    attacked: Sequence[tuple[float, Mark]]  # the first at radius 0


@dataclass(frozen=True)
class Row:
    """Networks that differ in their seed alone; accuracies are shares in [0, 1].

    Args:
        label: what they are.
        bounds, clean, attacked, certified: one for each.
        at: the radius of `certified`.
    """

    label: str
    bounds: Sequence[Bounds]
    clean: Sequence[float]
    attacked: Sequence[float]
    certified: Sequence[float]
    at: float


@style.drawn
def network(layers: Sequence[tuple[str, float | None]], bounds: Bounds, certified: Certified) -> Figure:
    """Draw how the bound of one network grows over its layers, above what is found, and its accuracies over radii.

    Args:
        layers: name, and the bound up to there; None where it is infinite.
        bounds: of the whole network.
        certified: what is proved, and what attacks leave.
    """
    figure = style.figure(height=5.2)
    upper, lower = figure.subplots(2, 1)
    _growth(upper, layers, bounds)
    _accuracies(lower, certified)
    return figure


@style.drawn
def networks(rows: Sequence[Row], eps: float) -> Figure:
    """Draw for each row what is found and proved of the Lipschitz constant, and accuracy: clean, attacked, proved.

    Args:
        rows: from top to bottom; a thin mark for each network, lines between the geometric or arithmetic means.
        eps: of the attack.
    """
    crowded = any(len(row.bounds) > 1 for row in rows)
    figure = style.figure(height=1.25 + (0.4 if crowded else 0.34) * len(rows))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for axes in (left, right):
        style.rows(axes, [row.label for row in rows], above=0.7, fontsize=8)
    _constants(left, rows, 5 if crowded else 8)
    for place, row in enumerate(rows):
        _shares(right, place, row)
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
            style.handle(f"attacked at ε = {eps:.3g}", style.BLUE, "o", ms=4),
            style.handle(f"proved at ε = {rows[0].at:.3g}", style.VERMILLION, "D", ms=4),
        ],
    }
    for axes, handles in legends.items():
        axes.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(-0.02, 1), fontsize=7, handletextpad=0.1, borderaxespad=0
        )
    return figure


@style.drawn
def over_radius(groups: Mapping[str, Sequence[Sequence[tuple[float, Mark]]]], attack: str) -> Figure:
    """Draw accuracy under an attack over its radius: a line for each group's mean over seeds, a dot for each seed."""
    figure = style.figure(height=2.9 + 0.2 * -(-len(groups) // 3))
    axes = figure.subplots()
    for number, (label, runs) in enumerate(groups.items()):
        look = style.line(number)
        radii = sorted({eps for run in runs for eps, _ in run})
        values = [[100 * mark.value for run in runs for eps, mark in run if eps == radius] for radius in radii]
        axes.plot(radii, [sum(v) / len(v) for v in values], lw=1.5, label=label, **look)
        shift = 0.004 * max(radii) * (number - (len(groups) - 1) / 2)  # so that dots of groups are side by side
        for radius, of_seeds in zip(radii, values, strict=True):
            axes.plot([radius + shift] * len(of_seeds), of_seeds, ".", ms=4, color=look["color"])
    axes.set_ylim(0, 102)
    axes.set_xlabel("radius ε in L∞")
    axes.set_ylabel(f"accuracy under {attack}, %")
    style.grid(axes, "y")
    style.legend(figure, handlelength=2.4)
    return figure


def _growth(axes: Axes, layers: Sequence[tuple[str, float | None]], bounds: Bounds) -> None:
    finite = [(number, bound) for number, (_, bound) in enumerate(layers, 1) if bound]
    last = len(layers)
    axes.plot([0.5, last], [bounds.lower] * 2, color=style.BLUE, lw=1, ls=(0, (3, 2)))
    axes.plot([x for x, _ in finite], [y for _, y in finite], "o-", color=style.GREY, ms=2.5, lw=1.2)
    if bounds.lower > 0 or finite:
        axes.set_yscale("log")
    axes.set_xlim(0.5, 1.34 * last)
    told = [(bounds.lower, "found", style.BLUE)]
    if bounds.upper is None:
        first = next((name for name, bound in layers if bound is None), "")
        axes.set_title(f"Lipschitz constant: no bound from {first} on, which jumps")
    else:
        axes.set_title("Lipschitz constant: bound up to each layer")
        told.append((bounds.upper, "proved for all", style.GREY))
    if bounds.local is not None:
        axes.plot([last], [bounds.local], "D", ms=5, color=style.VERMILLION)
        told.append((bounds.local, "around images", style.VERMILLION))
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


def _accuracies(axes: Axes, certified: Certified) -> None:
    (_, clean), *attacked = certified.attacked
    x, marks = [eps for eps, _ in attacked], [mark for _, mark in attacked]
    proved = [radius for radii in certified.radii.values() for radius in radii if radius > 0]
    first = max(min(proved, default=1e-3), _LEAST_RADIUS) / 2
    first = min(first, min(x) / 2)  # a network of one answer has all radii proved
    axes.axhline(100 * clean.value, color=style.GREY, lw=0.8, ls=(0, (1, 2)), label="clean")
    for name, radii in certified.radii.items():
        _stairs(axes, radii, first, name)
    low, high = zip(*(mark.ends for mark in marks), strict=True)
    axes.fill_between(x, low, high, color=style.BLUE, alpha=0.15, lw=0)
    under = f"under {certified.attack}"
    axes.plot(x, [100 * mark.value for mark in marks], "o-", ms=3, lw=1.4, color=style.BLUE, label=under)
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


def _constants(axes: Axes, rows: Sequence[Row], size: float) -> None:
    axes.set_xscale("log")
    values = [v for row in rows for b in row.bounds for v in (b.lower, b.local, b.upper) if v]
    # A network that does not move has the bound 0, which no logarithmic axis has: it is told at its left end.
    low, high = min(values, default=1.0), max(values, default=1.0)
    if low == high:
        low, high = low / 2, high * 2
    end = high * (high / low) ** 0.12
    for place, row in enumerate(rows):
        for bounds, y in zip(row.bounds, _places(place, len(row.bounds)), strict=True):
            lower, to = max(bounds.lower, low), max(end if bounds.upper is None else bounds.upper, low)
            axes.plot([lower, to], [y, y], color=style.PALE_GREY, lw=1.5, zorder=1)
            axes.plot(lower, y, "o", ms=4, color=style.BLUE)
            if bounds.local is not None:
                axes.plot(max(bounds.local, low), y, "D", ms=3.5, color=style.VERMILLION)
            mark, large = (">", 5) if bounds.upper is None else ("|", size)
            axes.plot(to, y, mark, ms=large, color=style.GREY)
        found, uppers = _mean([b.lower for b in row.bounds]), [b.upper for b in row.bounds if b.upper is not None]
        proved = _mean(uppers) if len(uppers) == len(row.bounds) else None
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


def _shares(axes: Axes, place: int, row: Row) -> None:
    kinds = ((row.clean, "o", style.GREY, "white"), (row.attacked, "o", style.BLUE, style.BLUE),
             (row.certified, "D", style.VERMILLION, style.VERMILLION))  # fmt: skip
    for values, mark, colour, fill in kinds:
        for value, y in zip(values, _places(place, len(values)), strict=True):
            axes.plot(100 * value, y, mark, ms=4 if mark == "o" else 3.5, color=colour, mfc=fill)
