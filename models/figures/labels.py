"""Labels beside points, placed so that they cover neither each other nor the points."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patheffects import withStroke
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
    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError("the axes belong to no figure")
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
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip
        text.set_in_layout(False)
        extent = text.get_window_extent(renderer)
        half = extent.width / 2 + _GAP * scale, extent.height / 2 + _GAP * scale
        offsets = _offsets(half, scale)
        boxes = [_around(x + dx, y + dy, *half) for dx, dy in offsets]
        leaders = [_leader((x, y), box, scale) for box in boxes]
        costs = [
            _cost(box, taken, inside) + sum(_cost(dot, taken, inside) for dot in leader) + rank
            for rank, (box, leader) in enumerate(zip(boxes, leaders, strict=True))
        ]
        best = min(range(len(offsets)), key=costs.__getitem__)
        taken += [boxes[best], *leaders[best]]
        dx, dy = offsets[best]
        text.set_position((dx / scale, dy / scale))
        if leaders[best]:
            _join(axes, label, (x, y), boxes[best], scale)


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
    return 3 * covered + 10 * outside


def _area(box: Bbox | None) -> float:
    return 0.0 if box is None else max(0.0, box.width) * max(0.0, box.height)


def _leader(point: tuple[float, float], box: Bbox, scale: float) -> list[Bbox]:
    """Return small squares along the line from a mark to a text, none for a text that is next to it."""
    dx, dy = _towards(point, box)
    distance = math.hypot(dx, dy)
    if distance < 12 * scale:
        return []
    side = 1.5 * scale
    first, count = 1.6 * _MARK * scale / distance, round(distance / (2 * side))
    shares = [first + (1 - first) * i / count for i in range(count)]
    return [_around(point[0] + share * dx, point[1] + share * dy, side, side) for share in shares]


def _towards(point: tuple[float, float], box: Bbox) -> tuple[float, float]:
    """Return the way from a point to the nearest edge of a box."""
    return min(max(point[0], box.x0), box.x1) - point[0], min(max(point[1], box.y0), box.y1) - point[1]


def _join(axes: Axes, label: Label, point: tuple[float, float], box: Bbox, scale: float) -> None:
    dx, dy = _towards(point, box)
    line = axes.annotate(
        "", (label.x, label.y), (dx / scale, dy / scale), textcoords="offset points",
        arrowprops={"arrowstyle": "-", "color": label.colour, "lw": 0.6, "alpha": 0.7, "shrinkA": 0, "shrinkB": _MARK},
    )  # fmt: skip
    line.set_in_layout(False)
