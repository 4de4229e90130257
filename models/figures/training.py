"""Accuracy by epoch: in training, and on held-out images clean and attacked."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from models.figures import style

_SERIES = (
    ("accuracy", "in training", style.GREY),
    ("clean", "held out, clean", style.BLUE),
    ("robust", "held out, robust", style.VERMILLION),
)


@style.drawn
def draw(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw what there is of "accuracy", "clean" and "robust" in the lines of a metrics.jsonl."""
    figure = style.figure(height=2.6)
    axes = figure.subplots()
    for name, label, colour in _SERIES:
        points = [(line["epoch"], 100 * line[name]) for line in history if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, ms=3.5, lw=1.5, label=label)
    axes.set_ylim(0, 102)
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy, %")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    style.grid(axes, "y")
    style.legend(figure)
    return figure
