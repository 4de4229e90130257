"""Labels beside points, placed so that they cover neither each other nor the points."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

_DISTANCES = (7, 12, 18, 25, 34, 46, 60, 78)  # points, from the mark to the nearest edge of the text
_DIRECTIONS = 16
_MARK = 5.0  # points, half the side of the square that a mark keeps free
_GAP = 1.5  # points, between texts


@dataclass(frozen=True)
class Label:
    """A text for the point (x, y), in data coordinates."""

    x: float
    y: float
    text: str
    colour: str
    bold: bool = False


def place(axes: Axes, labels: Sequence[Label], bars: Sequence[tuple[float, float, float, float]] = ()) -> None:
    """Write the labels, in their order, each where it covers least.

    Call it last, when the limits of the axes and everything else in the figure is settled. A thin line joins a label to
    a point that is not next to it.

    Args:
        axes: to draw on.
        labels: the most important first.
        bars: lines (x0, y0, x1, y1) in data coordinates to keep free too.
    """
    figure = axes.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    points = [tuple(axes.transData.transform((label.x, label.y))) for label in labels]
    taken = [_around(x, y, _MARK * scale, _MARK * scale) for x, y in points]
    for x0, y0, x1, y1 in bars:
        ends = axes.transData.transform([(x0, y0), (x1, y1)])
        taken.append(Bbox([ends.min(0) - scale, ends.max(0) + scale]))
    inside = axes.get_window_extent()
    for label, (x, y) in zip(labels, points, strict=True):
        text = axes.annotate(
            label.text, (label.x, label.y), (0, 0), textcoords="offset points", ha="center", va="center",
            fontsize=8, color=label.colour, weight="bold" if label.bold else "normal",
        )  # fmt: skip
        text.set_in_layout(False)
        extent = text.get_window_extent(renderer)
        half = extent.width / 2 + _GAP * scale, extent.height / 2 + _GAP * scale
        offsets = _offsets(half, scale)
        costs = [_cost(_around(x + dx, y + dy, *half), taken, inside) + i for i, (dx, dy) in enumerate(offsets)]
        dx, dy = offsets[min(range(len(offsets)), key=costs.__getitem__)]
        box = _around(x + dx, y + dy, *half)
        taken.append(box)
        text.set_position((dx / scale, dy / scale))
        _join(axes, label, (x, y), box, scale)


def _offsets(half: tuple[float, float], scale: float) -> list[tuple[float, float]]:
    """Return where the middle of a text may go, seen from its point: near before far, to the right and left before."""
    angles = [2 * math.pi * i / _DIRECTIONS for i in range(_DIRECTIONS)]
    angles.sort(key=lambda angle: abs(math.sin(angle)))
    return [
        (math.cos(a) * (half[0] + d * scale), math.sin(a) * (half[1] + d * scale)) for d in _DISTANCES for a in angles
    ]


def _around(x: float, y: float, width: float, height: float) -> Bbox:
    return Bbox([[x - width, y - height], [x + width, y + height]])


def _cost(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    covered = sum(_area(Bbox.intersection(box, other)) for other in taken)
    outside = _area(box) - _area(Bbox.intersection(box, inside))
    return covered + 10 * outside


def _area(box: Bbox | None) -> float:
    return 0.0 if box is None else max(0.0, box.width) * max(0.0, box.height)


def _join(axes: Axes, label: Label, point: tuple[float, float], box: Bbox, scale: float) -> None:
    """Draw a line from the edge of the mark to a text that is far from it."""
    x, y = point
    dx, dy = min(max(x, box.x0), box.x1) - x, min(max(y, box.y0), box.y1) - y
    distance = math.hypot(dx, dy)
    if distance < 12 * scale:
        return
    line = axes.annotate(
        "", (label.x, label.y), (dx / scale, dy / scale), textcoords="offset points",
        arrowprops={"arrowstyle": "-", "color": label.colour, "lw": 0.6, "alpha": 0.7, "shrinkA": 0, "shrinkB": _MARK},
    )  # fmt: skip
    line.set_in_layout(False)
