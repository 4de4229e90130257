"""A study's accuracies and their differences to the baseline: a row of panels for each rate, one for each network."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from models.figures import style

_MARKS = ("o", "s", "D", "^", "v")


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
                _marks(axes, entry[m], place, colours[m], _MARKS[i % len(_MARKS)], hollow=m == "clean")
        axes.set_xlabel("accuracy, %")
        axes.set_xlim(-2, 102)
    looks = zip(measures, _MARKS * len(measures), strict=False)
    handles = [style.handle(m, colours[m], mark, hollow=m == "clean") for m, mark in looks]
    style.legend(figure, handles, len(measures), handletextpad=0.2)
    return figure


@style.drawn
def differences(summary: dict[str, Any], measure: str) -> Figure:
    """Draw each activation's paired difference to the baseline under one attack, with its 95 % interval.

    The interval is for the choice of seeds and of images both.
    """
    baseline = summary["baseline"]
    names = [a for a in summary["activations"] if a != baseline]
    figure, panels = _panels(summary, names)
    for axes, activations in panels:
        axes.axvline(0, color=style.GREY, lw=0.8)
        for place, name in enumerate(names):
            difference = activations.get(name, {}).get(measure, {}).get("difference")
            if difference is not None:
                _interval(axes, difference, place, style.VERMILLION if name.startswith("kaf") else style.BLUE)
        axes.set_xlabel(f"difference to {baseline}, points")
    return figure


def _panels(summary: dict[str, Any], rows: list[str]) -> tuple[Figure, list[tuple[Axes, dict[str, Any]]]]:
    """Return a figure, and its axes with the activations that each shows."""
    rates = summary["rates"]
    networks = list(dict.fromkeys(network for by_network in rates.values() for network in by_network))
    figure = style.figure(height=0.4 + len(rates) * (0.7 + 0.3 * len(rows)))
    grid = figure.subplots(len(rates), len(networks), sharex=True, sharey=True, squeeze=False)
    shown = []
    for line, (rate, by_network) in zip(grid, rates.items(), strict=True):
        for axes, network in zip(line, networks, strict=True):
            style.rows(axes, rows)
            axes.set_title(network if len(rates) == 1 else f"{network}, {rate} rate")
            shown.append((axes, by_network.get(network, {}).get("activations", {})))
    return figure, shown


def _marks(axes: Axes, entry: dict[str, Any], place: int, colour: str, mark: str, hollow: bool) -> None:
    spread = np.linspace(-0.18, 0.18, len(entry["values"])) if len(entry["values"]) > 1 else [0.0]
    for value, shift in zip(entry["values"], spread, strict=True):
        axes.plot(100 * value, place + shift, ".", ms=3, color=colour, alpha=0.6, zorder=2)
    axes.plot(100 * entry["mean"], place, mark, ms=5.5, color=colour, mfc="white" if hollow else colour, zorder=3)


def _interval(axes: Axes, difference: dict[str, Any], place: int, colour: str) -> None:
    if difference["low"] is not None:
        axes.plot([100 * difference["low"], 100 * difference["high"]], [place] * 2, color=colour, lw=1.5)
    axes.plot(100 * difference["mean"], place, "o", ms=5, color=colour)
