"""Clean and robust accuracy of each network, with 95 % intervals."""

from dataclasses import dataclass

from matplotlib.axes import Axes

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
            _point(axes, place, row.clean, row.colour, "white")
            _point(axes, place, row.robust, row.colour, row.colour)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.6)
        axes.set_xlim(0, 102)
        axes.set_xlabel(f"accuracy, %   (● under {attack}   ○ clean   bars: 95 % intervals)")
        axes.grid(axis="x", color=style.PALE_GREY, lw=0.6)
        axes.set_axisbelow(True)
        style.bare(axes)
        return style.png(figure)


def _point(axes: Axes, place: int, accuracy: Accuracy, colour: str, fill: str) -> None:
    low, high = accuracy.interval
    error = [[100 * (accuracy.value - low)], [100 * (high - accuracy.value)]]
    at = (100 * accuracy.value, place)
    axes.errorbar(*at, xerr=error, fmt="o", color=colour, capsize=3, elinewidth=1.5)
    axes.plot(*at, "o", ms=7, color=colour, mfc=fill, mew=1.5)
    axes.annotate(f"{at[0]:.1f}", at, (0, 8), textcoords="offset points", ha="center", color=colour, fontsize=8)
