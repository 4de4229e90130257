"""A study's comparisons, accuracies, differences to the baseline, robust against clean; accuracy over eps."""

from typing import Any

import numpy as np
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from models.figures import style

Panels = list[tuple[Axes, dict[str, Any]]]
"""Axes with the activations that they show."""
_BELOW = 0.28  # of a row, where dots of seeds are below its line
_BEYOND = 0.3  # of what seeds span, by which an axis is longer where an interval then ends on it


@style.drawn
def accuracies(summary: dict[str, Any]) -> Figure:
    """Draw for each activation its mean accuracy, clean and under each attack, and a dot for each seed."""
    measures = [m for m in summary["measures"] if m != "worst"]
    colours = {m: style.line(i)["color"] for i, m in enumerate(measures)}
    rows = summary["activations"]
    figure, panels = _panels(summary, rows)
    for axes, activations in panels:
        for name, entry in activations.items():
            place = rows.index(name)
            values = [100 * entry[m]["mean"] for m in measures]
            axes.plot([min(values), max(values)], [place] * 2, color=style.PALE_GREY, lw=3, zorder=1)
            for i, m in enumerate(measures):
                _marks(axes, entry[m], place, colours[m], style.MARKS[i % len(style.MARKS)], hollow=m == "clean")
        axes.set_xlabel("accuracy, %")
        axes.set_xlim(-2, 102)
    looks = zip(measures, style.MARKS * len(measures), strict=False)
    handles = [style.handle(m, colours[m], mark, hollow=m == "clean") for m, mark in looks]
    style.legend(figure, handles, len(measures), handletextpad=0.2)
    return figure


@style.drawn
def comparisons(summary: dict[str, Any]) -> Figure:
    """Draw the differences that were named beforehand, with the intervals of Holm's procedure.

    Axes for each panel, and a row for each pair and attack, filled where a difference was found.
    """
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in summary["comparisons"]:
        panels.setdefault(row["panel"], []).append(row)
    most = max(map(len, panels.values()))
    figure = style.figure(height=(0.6 + 0.28 * most) * len(panels))
    columns = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, rows) in zip(columns, panels.items(), strict=True):
        axes.set_title(label)
        style.rows(axes, [f"{' − '.join(row['pair'])}, {row['attack']}" for row in rows])
        axes.axvline(0, color=style.GREY, lw=0.8)
        for place, row in enumerate(rows):
            corrected = row["corrected"] or {"low": row["mean"], "high": row["mean"], "found": False}
            axes.plot([100 * corrected[end] for end in ("low", "high")], [place] * 2, color=style.BLUE, lw=1.5)
            fill = style.BLUE if corrected["found"] else "white"
            axes.plot(100 * row["mean"], place, "o", ms=5, color=style.BLUE, mfc=fill)
    columns[-1].set_xlabel("difference, points")
    marks = (("a difference", False), ("none found", True))
    style.legend(figure, [style.handle(text, style.BLUE, "o", hollow=hollow) for text, hollow in marks], 2)
    return figure


@style.drawn
def differences(summary: dict[str, Any], measure: str) -> Figure:
    """Draw each activation's paired difference to the baseline under one attack, with its 95 % interval.

    The interval is for the choice of seeds and of images both. Small dots are seeds; all of these are shown, the
    narrower half of the intervals too, and an interval that goes on far beyond both is cut off with an arrow.
    """
    baseline = summary["baseline"]
    names = [a for a in summary["activations"] if a != baseline]
    figure, panels = _panels(summary, names)
    shown = []
    for axes, activations in panels:
        axes.axvline(0, color=style.GREY, lw=0.8)
        for place, name in enumerate(names):
            entry = activations.get(name, {}).get(measure, {})
            if "difference" in entry:
                seeds = _seeds(activations[name], activations[baseline], measure)
                shown.append((axes, place, entry["difference"], seeds, _colour(name)))
        axes.set_xlabel(f"difference to {baseline}, points")
    points = [100 * value for _, _, d, seeds, _ in shown for value in (d["mean"], *seeds)]
    intervals = [(100 * d["low"], 100 * d["high"]) for _, _, d, _, _ in shown if d["low"] is not None]
    intervals.sort(key=lambda interval: interval[1] - interval[0])
    ends = [end for interval in intervals for end in interval]
    points += ends[: 2 * ((len(intervals) + 1) // 2)]
    low, high = min([*points, 0.0]), max([*points, 0.0])
    more = _BEYOND * (high - low)
    low, high = (
        f([end for end in (edge, *ends) if low - more <= end <= high + more]) for f, edge in ((min, low), (max, high))
    )
    margin = 0.12 * max(high - low, 1.0)
    for axes, place, difference, seeds, colour in shown:
        _interval(axes, difference, place, colour, low - margin, high + margin)
        axes.plot([100 * s for s in seeds], [place + _BELOW] * len(seeds), ".", ms=3.5, color=colour, alpha=0.6)
    for axes, _ in panels:
        axes.set_xlim(low - margin, high + margin)
    return figure


@style.drawn
def robust_against_clean(summary: dict[str, Any], measure: str) -> Figure:
    """Draw each activation's mean accuracy under one attack over that on clean images, with a dot for each seed.

    Names cover no mean and no other name; where there is no room, they may cover dots.
    """
    figure, panels = _grid(summary, height=3.4)
    halo = [withStroke(linewidth=2, foreground="white")]
    names = []  # of each axes: the texts, the marks of means and the dots of seeds, from which the texts are kept away
    for axes, activations in panels:
        axes.set_xlabel("clean accuracy, %")
        if (place := axes.get_subplotspec()) is not None and place.is_first_col():
            axes.set_ylabel("accuracy under attack, %")
        style.grid(axes, "both")
        axes.margins(0.12)  # room for names
        if not activations:  # none is done at this rate yet
            continue
        texts, means, dots = [], [], []
        for name, entry in activations.items():
            colour, (x, y) = _colour(name), (100 * entry[m]["mean"] for m in ("clean", measure))
            clean, robust = ([100 * value for value in entry[m]["values"]] for m in ("clean", measure))
            for seed in zip(clean, robust, strict=True):
                axes.plot(*zip((x, y), seed, strict=True), color=colour, lw=0.6, alpha=0.35)
                axes.plot(*seed, ".", ms=3.5, color=colour, alpha=0.45)
                dots.append(seed)
            means.append((x, y))
            texts.append(axes.text(x, y, name, fontsize=8, color=colour, ha="center", va="center", path_effects=halo))
            texts[-1].set_in_layout(False)
        x, y = zip(*means, strict=True)
        marks = axes.scatter(x, y, s=25, c=[_colour(name) for name in activations], zorder=3)
        names.append((axes, texts, marks, dots))
    looks = (("not KAF", style.BLUE), ("KAF", style.VERMILLION))
    kafs = [name.startswith("kaf") for _, activations in panels for name in activations]
    if any(kafs) and not all(kafs):
        style.legend(figure, [style.handle(text, colour, "o") for text, colour in looks], 2)
    figure.draw_without_rendering()  # from here on everything but the names stays where it is
    for axes, texts, marks, dots in names:
        adjust_text(
            texts, *zip(*dots, strict=True), objects=marks, ax=axes, expand=(1.1, 1.4), iter_lim=3000,
            min_arrow_len=14, arrowprops={"arrowstyle": "-", "color": style.GREY, "lw": 0.6},
        )  # fmt: skip
    return figure


@style.drawn
def over_radii(summary: dict[str, Any], measure: str) -> Figure:
    """Draw mean accuracy under one attack over eps, a line for each activation and a dot for each seed.

    A row of axes for each rate, and one for each network and training method.
    """
    names = summary["activations"]
    lines = [(rate, _by_method(panels)) for rate, panels in summary["rates"].items()]
    titles = list(dict.fromkeys(title for _, methods in lines for title in methods))
    columns = min(len(titles), 2)
    down = -(-len(titles) // columns)
    figure = style.figure(height=0.5 + 2.1 * down * len(lines))
    grid = figure.subplots(down * len(lines), columns, sharex=True, sharey=True, squeeze=False)
    for row, (rate, methods) in enumerate(lines):
        places = grid[row * down : (row + 1) * down].flat
        for axes in places[len(titles) :]:
            axes.set_axis_off()
        for axes, title in zip(places, titles, strict=False):
            axes.set_title(title if len(lines) == 1 else f"{title}, {rate} rate")
            style.grid(axes, "both")
            for name in names:
                found = [
                    (p["eps"], p["activations"][name][measure]) for p in methods[title] if name in p["activations"]
                ]
                look = style.line(names.index(name))
                axes.plot([eps for eps, _ in found], [100 * e["mean"] for _, e in found], marker="o", ms=3.5, **look)
                for eps, entry in found:
                    values = [100 * value for value in entry["values"]]
                    axes.plot([eps] * len(values), values, ".", ms=3, color=look["color"], alpha=0.5)
    for axes in grid[-1]:
        axes.set_xlabel("ε of training and attack")
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy under attack, %")
    style.legend(figure, [Line2D([], [], label=n, marker="o", ms=3.5, **style.line(i)) for i, n in enumerate(names)])
    return figure


def _by_method(panels: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for panel in panels.values():
        found.setdefault(", ".join(filter(None, (panel["network"], panel["method"]))), []).append(panel)
    return found


def _seeds(entry: dict[str, Any], baseline: dict[str, Any], measure: str) -> list[float]:
    """Return the difference of each seed that both have."""
    of, to = (dict(zip(e["seeds"], e[measure]["values"], strict=True)) for e in (entry, baseline))
    return [of[seed] - to[seed] for seed in of if seed in to]


def _colour(name: str) -> str:
    return style.VERMILLION if name.startswith("kaf") else style.BLUE


def _panels(summary: dict[str, Any], rows: list[str]) -> tuple[Figure, Panels]:
    """Return a figure with rows, and its axes with the activations that each shows."""
    figure, panels = _grid(summary, height=0.7 + 0.3 * len(rows), shared=True)
    for axes, _ in panels:
        style.rows(axes, rows)
    return figure, panels


def _grid(summary: dict[str, Any], height: float, shared: bool = False) -> tuple[Figure, Panels]:
    rates = summary["rates"]
    networks = list(dict.fromkeys(network for by_network in rates.values() for network in by_network))
    figure = style.figure(height=0.4 + height * len(rates))
    grid = figure.subplots(len(rates), len(networks), sharex=shared, sharey=shared, squeeze=False)
    panels = []
    for line, (rate, by_network) in zip(grid, rates.items(), strict=True):
        for axes, network in zip(line, networks, strict=True):
            axes.set_title(network if len(rates) == 1 else f"{network}, {rate} rate")
            panels.append((axes, by_network.get(network, {}).get("activations", {})))
    return figure, panels


def _marks(axes: Axes, entry: dict[str, Any], place: int, colour: str, mark: str, hollow: bool) -> None:
    spread = np.linspace(-0.18, 0.18, len(entry["values"])) if len(entry["values"]) > 1 else [0.0]
    for value, shift in zip(entry["values"], spread, strict=True):
        axes.plot(100 * value, place + shift, ".", ms=3, color=colour, alpha=0.6, zorder=2)
    axes.plot(100 * entry["mean"], place, mark, ms=5.5, color=colour, mfc="white" if hollow else colour, zorder=3)


def _interval(
    axes: Axes, difference: dict[str, Any], place: int, colour: str, low: float, high: float
) -> None:  # what the axis shows
    if difference["low"] is not None:
        ends = [100 * difference["low"], 100 * difference["high"]]
        axes.plot(np.clip(ends, low, high), [place] * 2, color=colour, lw=1.5)
        inside = 0.025 * (high - low)
        for end, edge, mark in ((ends[0], low + inside, "<"), (ends[1], high - inside, ">")):
            if not low <= end <= high:
                axes.plot(edge, place, mark, ms=6, color=colour)
    axes.plot(100 * difference["mean"], place, "o", ms=5, color=colour)
