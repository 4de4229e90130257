"""What an evaluation found: accuracy under each attack, and along radius, steps and restarts."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from models.evaluation import Accuracy
from models.figures import style


@dataclass(frozen=True)
class Row:
    """The accuracy under one attack, in the colour of its kind."""

    label: str
    accuracy: Accuracy
    colour: str = style.BLUE


@dataclass(frozen=True)
class Curve:
    """Accuracies along something that makes the attack stronger."""

    title: str
    xlabel: str
    points: Sequence[tuple[float, Accuracy]]
    mark: float | None = None  # a place on the x-axis to point out
    log: bool = False


def draw_attacks(rows: Sequence[Row]) -> bytes:
    """Draw a point with its 95 % interval for each attack."""
    with style.context():
        figure = style.figure(height=0.75 + 0.3 * len(rows))
        axes = figure.subplots()
        for place, row in enumerate(rows):
            (low, high), value = row.accuracy.interval, row.accuracy.value
            error = [[100 * (value - low)], [100 * (high - value)]]
            axes.errorbar(100 * value, place, xerr=error, fmt="o", ms=6, color=row.colour, capsize=3, elinewidth=1.5)
            axes.annotate(
                f"{100 * value:.1f}", (100 * value, place), (0, 6), textcoords="offset points", ha="center", fontsize=8,
                color=row.colour,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.7)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("accuracy, %   (bars: 95 % intervals)")
        axes.grid(axis="x", color=style.PALE_GREY, lw=0.6)
        axes.set_axisbelow(True)
        style.bare(axes)
        return style.png(figure)


def draw_curves(curves: Sequence[Curve]) -> bytes:
    """Draw the curves side by side on one scale, with their 95 % intervals."""
    with style.context():
        figure = style.figure(height=2.5)
        panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
        for axes, curve in zip(panels, curves, strict=True):
            _curve(axes, curve)
        panels[0].set_ylim(0, 100)
        panels[0].set_ylabel("accuracy, %")
        return style.png(figure)


def _curve(axes: Axes, curve: Curve) -> None:
    x = [place for place, _ in curve.points]
    low, high = zip(*(accuracy.interval for _, accuracy in curve.points), strict=True)
    axes.fill_between(x, [100 * v for v in low], [100 * v for v in high], color=style.BLUE, alpha=0.15, lw=0)
    axes.plot(x, [100 * accuracy.value for _, accuracy in curve.points], "o-", color=style.BLUE, ms=3.5, lw=1.5)
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
    axes.grid(axis="y", color=style.PALE_GREY, lw=0.6)
