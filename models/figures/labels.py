"""Labels beside points, placed so that they cover neither each other nor the points."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patheffects import withStroke

Box = tuple[float, float, float, float]
"""Left, bottom, right and top."""

_DISTANCES = (7, 12, 18, 25, 34, 46, 60, 78)  # points, from the middle of the mark to the edge of the text
_DIRECTIONS = 16
_MARK = 5.0  # points, half the side of the square that a mark keeps free
_HALO = 11.0  # points, half the side of the square in which a text would seem to be of the mark in it
_GAP = 1.5  # points, around a text
_NEAR = 12.0  # points; a text farther away is joined to its mark by a line


@dataclass(frozen=True)
class Label:
    """A text for the point (x, y), in data coordinates."""

    x: float
    y: float
    text: str
    colour: str
    bold: bool = False


def place(axes: Axes, labels: Sequence[Label], bars: Sequence[Box] = ()) -> None:
    """Write the labels, in their order, each where it covers least, and join those that are far away to their points.

    Call it last, when the limits of the axes and everything else in the figure is settled.

    Args:
        axes: to draw on.
        labels: the most important first.
        bars: lines from (left, bottom) to (right, top) in data coordinates, to keep free too.
    """
    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError("the axes belong to no figure")
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    scale = figure.dpi / 72  # pixels a point
    points = axes.transData.transform([(label.x, label.y) for label in labels]) / scale
    taken = [_square(point, _MARK) for point in points]
    halos = [_square(point, _HALO) for point in points]
    for left, bottom, right, top in bars:
        (x0, y0), (x1, y1) = axes.transData.transform([(left, bottom), (right, top)]) / scale
        taken.append((x0 - 1, y0 - 1, x1 + 1, y1 + 1))
    area = axes.get_window_extent()
    inside = area.x0 / scale, area.y0 / scale, area.x1 / scale, area.y1 / scale
    for number, (label, (x, y)) in enumerate(zip(labels, points, strict=True)):
        text = axes.annotate(
            label.text, (label.x, label.y), (0, 0), textcoords="offset points", ha="center", va="center",
            fontsize=8, color=label.colour, weight="bold" if label.bold else "normal",
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip
        text.set_in_layout(False)
        extent = text.get_window_extent(renderer)
        half = extent.width / scale / 2 + _GAP, extent.height / scale / 2 + _GAP
        others = halos[:number] + halos[number + 1 :]
        choice = _best(_choices((x, y), half), taken, others, inside)
        text.set_position((choice.dx, choice.dy))
        taken += [choice.box, *choice.dots]
        if choice.dots:
            _join(axes, label, _way((x, y), choice.box))


@dataclass(frozen=True)
class _Choice:
    """A place for a text: the way there from the point, the box of the text, and squares along the line to it."""

    dx: float
    dy: float
    box: Box
    dots: list[Box]


def _choices(point: tuple[float, float], half: tuple[float, float]) -> list[_Choice]:
    """Return where a text of half that width and height may go: near before far, right and left before the rest."""
    angles = [2 * math.pi * i / _DIRECTIONS for i in range(_DIRECTIONS)]
    angles.sort(key=lambda angle: abs(math.sin(angle)))
    (x, y), (width, height) = point, half
    choices = []
    for distance in _DISTANCES:
        for angle in angles:
            dx, dy = math.cos(angle) * (width + distance), math.sin(angle) * (height + distance)
            box = x + dx - width, y + dy - height, x + dx + width, y + dy + height
            choices.append(_Choice(dx, dy, box, _dots(point, box)))
    return choices


def _dots(point: tuple[float, float], box: Box) -> list[Box]:
    """Return squares along the line from a mark to a text, none for a text that is near."""
    dx, dy = _way(point, box)
    distance = math.hypot(dx, dy)
    if distance < _NEAR:
        return []
    start, side = 1.6 * _MARK, 1.5
    shares = np.arange(start, distance, 2 * side) / distance
    return [_square((point[0] + share * dx, point[1] + share * dy), side) for share in shares.tolist()]


def _way(point: tuple[float, float], box: Box) -> tuple[float, float]:
    """Return the way from a point to the nearest edge of a box."""
    left, bottom, right, top = box
    return min(max(point[0], left), right) - point[0], min(max(point[1], bottom), top) - point[1]


def _square(point: tuple[float, float], half: float) -> Box:
    return point[0] - half, point[1] - half, point[0] + half, point[1] + half


def _best(choices: Sequence[_Choice], taken: Sequence[Box], others: Sequence[Box], inside: Box) -> _Choice:
    """Return the choice that covers least of what is taken, near other marks, or outside; of equal ones the first."""
    boxes = np.array([choice.box for choice in choices])
    owners = np.array([i for i, choice in enumerate(choices) for _ in choice.dots], dtype=int)
    dots = np.array([dot for choice in choices for dot in choice.dots]).reshape(-1, 4)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    cost = _covered(boxes, taken) + 0.5 * _covered(boxes, others) + 10 * (area - _covered(boxes, [inside]))
    cost += np.bincount(owners, _covered(dots, taken), len(choices))
    return choices[int(np.argmin(cost + 0.3 * np.arange(len(choices))))]


def _covered(boxes: np.ndarray, others: Sequence[Box]) -> np.ndarray:  # [N, 4] -> [N]
    """Return the area that each box has in common with all others together."""
    a, b = boxes[:, None], np.array(others).reshape(-1, 4)[None]
    width = np.minimum(a[..., 2], b[..., 2]) - np.maximum(a[..., 0], b[..., 0])
    height = np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1])
    return (width.clip(0) * height.clip(0)).sum(1)


def _join(axes: Axes, label: Label, way: tuple[float, float]) -> None:
    line = axes.annotate(
        "", (label.x, label.y), way, textcoords="offset points",
        arrowprops={"arrowstyle": "-", "color": label.colour, "lw": 0.6, "alpha": 0.7, "shrinkA": 0, "shrinkB": _MARK},
    )  # fmt: skip
    line.set_in_layout(False)
