"""Accuracies with their intervals: named rows, and curves along what makes an attack stronger."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from models.figures import style

Record = Mapping[str, Any]
"""An accuracy as results have it: "accuracy", a share in [0, 1], and "interval", its two ends."""


@dataclass(frozen=True)
class Row:
    """One accuracy, or that on clean images and that under attack."""

    label: str
    colour: str
    marks: Sequence[Record]


@dataclass(frozen=True)
class Panel:
    """Rows under a title."""

    title: str
    xlabel: str
    rows: Sequence[Row]


@style.drawn
def rows(panels: Sequence[Panel]) -> Figure:
    """Draw rows of points with their intervals; of two, the first is hollow: the accuracy on clean images."""
    step = 0.5 if any(len(row.marks) > 1 for panel in panels for row in panel.rows) else 0.3
    heights = [0.75 + 0.2 * bool(panel.title) + step * len(panel.rows) for panel in panels]
    figure = style.figure(sum(heights))
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        style.rows(axes, [row.label for row in panel.rows])
        axes.set_ylim(len(panel.rows) - 0.3, -0.7)
        for place, row in enumerate(panel.rows):
            *clean, last = row.marks
            shift = 0.12 if clean else 0.0  # so that intervals do not lie on one another
            ends = [100 * mark["accuracy"] for mark in (row.marks[0], last)]
            axes.plot(ends, [place - shift, place + shift], color=row.colour, alpha=0.35, lw=3)
            for mark in clean:
                _point(axes, place - shift, mark, row.colour, fill="white", above=6)
            _point(axes, place + shift, last, row.colour, fill=row.colour, above=-13 if clean else 6)
        lowest = 100 * min(mark["interval"][0] for row in panel.rows for mark in row.marks)
        axes.set_xlim(max(0.0, 10 * math.floor(lowest / 10 - 0.2)) - 1, 101)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.set_title(panel.title)
        axes.set_xlabel(panel.xlabel)
    return figure


def _point(axes: Axes, place: float, mark: Record, colour: str, fill: str, above: int) -> None:
    at, (low, high) = (100 * mark["accuracy"], place), (100 * end for end in mark["interval"])
    if high > low:
        axes.errorbar(*at, xerr=[[at[0] - low], [high - at[0]]], fmt="none", ecolor=colour, capsize=3, elinewidth=1.5)
    axes.plot(*at, "o", ms=6, color=colour, mfc=fill, mew=1.5)
    axes.annotate(f"{at[0]:.1f}", at, (0, above), textcoords="offset points", ha="center", color=colour, fontsize=8)


@style.drawn
def along(curves: Mapping[str, Sequence[Record]], eps: float) -> Figure:
    """Draw accuracies along what makes an attack stronger, "eps", "steps" and "restarts", with their intervals.

    Args:
        curves: by what is changed, each with "at", its value.
        eps: radius of the attack where it is not what is changed.
    """
    figure = style.figure(height=2.5)
    panels = figure.subplots(1, 3, sharey=True)
    looks = (("eps", "PGD-20", "radius ε"), ("steps", f"ε = {eps:.3g}", "steps"), ("restarts", "PGD-20", "restarts"))
    for axes, (name, title, xlabel) in zip(panels, looks, strict=True):
        x = [point["at"] for point in curves[name]]
        low, high = 100 * np.array([point["interval"] for point in curves[name]]).T
        axes.fill_between(x, low, high, color=style.BLUE, alpha=0.15, lw=0)
        axes.plot(x, [100 * point["accuracy"] for point in curves[name]], "o-", color=style.BLUE, ms=3.5, lw=1.5)
        if name == "eps":
            axes.axvline(eps, color=style.GREY, lw=0.8, ls=(0, (3, 2)))
        if name == "steps":
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(x[::2], [f"{place:g}" for place in x[::2]])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=x[-1] > 1))
        axes.set_title(title)
        axes.set_xlabel(xlabel)
        style.grid(axes, "y")
    panels[0].set_ylim(0, 100)
    panels[0].set_ylabel("accuracy, %")
    return figure
