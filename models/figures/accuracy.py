"""Clean and robust accuracy of each network, with 95 % intervals."""

import math
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from models.evaluation import Accuracy
from models.figures import style


@dataclass(frozen=True)
class Row:
    """One network's line in the figure."""

    label: str
    colour: str
    clean: Accuracy
    robust: Accuracy


def draw(rows: list[Row], attack: str) -> bytes:
    """Draw a dumbbell per network: open circle clean accuracy, full circle accuracy under `attack`."""
    with style.context():
        figure = style.figure(height=0.95 + 0.5 * len(rows))
        axes = figure.subplots()
        for place, row in enumerate(rows):
            axes.plot([100 * row.robust.value, 100 * row.clean.value], [place] * 2, color=row.colour, alpha=0.35, lw=3)
            _point(axes, place, row.clean, row.colour, fill="white", above=8)
            _point(axes, place, row.robust, row.colour, fill=row.colour, above=-15)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.6)
        axes.set_xlim(_floor(rows), 101)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel(f"accuracy, %   (● under {attack}   ○ clean   bars: 95 % intervals)")
        axes.grid(axis="x", color=style.PALE_GREY, lw=0.6)
        axes.set_axisbelow(True)
        style.bare(axes)
        return style.png(figure)


def _point(axes: Axes, place: int, accuracy: Accuracy, colour: str, fill: str, above: int) -> None:
    low, high = accuracy.interval
    error = [[100 * (accuracy.value - low)], [100 * (high - accuracy.value)]]
    at = (100 * accuracy.value, place)
    axes.errorbar(*at, xerr=error, fmt="none", ecolor=colour, capsize=3, elinewidth=1.5)
    axes.plot(*at, "o", ms=7, color=colour, mfc=fill, mew=1.5)
    axes.annotate(f"{at[0]:.1f}", at, (0, above), textcoords="offset points", ha="center", color=colour, fontsize=8)


def _floor(rows: list[Row]) -> float:
    """Return where the axis begins: the ten below the lowest interval."""
    lowest = min(accuracy.interval[0] for row in rows for accuracy in (row.clean, row.robust))
    return max(0.0, 10 * math.floor(10 * lowest - 0.2))
