"""Accuracies with their intervals: named rows, and curves along what makes an attack stronger."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from models.figures import style


@dataclass(frozen=True)
class Mark:
    """An accuracy as a share in [0, 1], and the ends of its interval where it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """Of the interval, in %."""
        low, high = (self.value if end is None else end for end in (self.low, self.high))
        return 100 * low, 100 * high


@dataclass(frozen=True)
class Row:
    """One accuracy, or that on clean images and that under attack."""

    label: str
    colour: str
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Panel:
    """Rows under a title."""

    title: str
    xlabel: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Curve:
    """Accuracies along something that makes the attack stronger."""

    title: str
    xlabel: str
    points: Sequence[tuple[float, Mark]]
    mark: float | None = None  # a place on the x-axis to point out
    log: bool = False


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
            ends = [100 * row.marks[0].value, 100 * last.value]
            axes.plot(ends, [place - shift, place + shift], color=row.colour, alpha=0.35, lw=3)
            for mark in clean:
                _point(axes, place - shift, mark, row.colour, fill="white", above=6)
            _point(axes, place + shift, last, row.colour, fill=row.colour, above=-13 if clean else 6)
        lowest = min(mark.ends[0] for row in panel.rows for mark in row.marks)
        axes.set_xlim(max(0.0, 10 * math.floor(lowest / 10 - 0.2)) - 1, 101)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.set_title(panel.title)
        axes.set_xlabel(panel.xlabel)
    return figure


def _point(axes: Axes, place: float, mark: Mark, colour: str, fill: str, above: int) -> None:
    at, (low, high) = (100 * mark.value, place), mark.ends
    if high > low:
        axes.errorbar(*at, xerr=[[at[0] - low], [high - at[0]]], fmt="none", ecolor=colour, capsize=3, elinewidth=1.5)
    axes.plot(*at, "o", ms=6, color=colour, mfc=fill, mew=1.5)
    axes.annotate(f"{at[0]:.1f}", at, (0, above), textcoords="offset points", ha="center", color=colour, fontsize=8)


@style.drawn
def along(curves: Sequence[Curve]) -> Figure:
    """Draw curves side by side on one scale, with their 95 % intervals."""
    figure = style.figure(height=2.5)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, curve in zip(panels, curves, strict=True):
        x = [place for place, _ in curve.points]
        low, high = zip(*(mark.ends for _, mark in curve.points), strict=True)
        axes.fill_between(x, low, high, color=style.BLUE, alpha=0.15, lw=0)
        axes.plot(x, [100 * mark.value for _, mark in curve.points], "o-", color=style.BLUE, ms=3.5, lw=1.5)
        if curve.mark is not None:
            axes.axvline(curve.mark, color=style.GREY, lw=0.8, ls=(0, (3, 2)))
        if curve.log:
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(x[::2], [f"{place:g}" for place in x[::2]])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=x[-1] > 1))
        axes.set_title(curve.title)
        axes.set_xlabel(curve.xlabel)
        style.grid(axes, "y")
    panels[0].set_ylim(0, 100)
    panels[0].set_ylabel("accuracy, %")
    return figure
