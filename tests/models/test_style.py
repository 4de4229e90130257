import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from models.figures import gradients, labels, style
from models.figures.labels import Label


def test_no_two_lines_are_alike() -> None:
    assert len({tuple(style.line(i).items()) for i in range(21)}) == 21
    names = [f"activation {i}" for i in range(14)]
    assert len({tuple(gradients._look(names, name).items()) for name in names}) == 14


@pytest.mark.parametrize("colour", style.PALETTE)
def test_a_line_can_be_seen_on_white(colour: str) -> None:
    """Contrast by WCAG 2.2: text needs 3 to 4.5 and a line less, but yellow's 1.3 is not enough."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    assert 1.05 / (luminance + 0.05) > 2


def test_figures_take_numbers_only() -> None:
    """They import nothing of networks, runs or files."""
    names = [f"models.figures.{path.stem}" for path in Path(style.__file__).parent.glob("[a-z]*.py")]
    program = (
        f"import sys, {', '.join(names)}; print(*(m for m in sys.modules if m.split('.')[0] in ('torch', 'models')))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert set(loaded) == {"models", "models.figures", *names}


def test_labels_cover_neither_each_other_nor_points() -> None:
    """Twelve points in a cluster, closer to each other than the labels are high."""
    drawing = Figure(figsize=(5, 3.5))
    axes = drawing.subplots()
    points = [(x, y) for x in range(4) for y in range(3)]
    axes.set_xlim(-8, 12)
    axes.set_ylim(-12, 14)
    labels.place(axes, [Label(x, y, f"label {x}{y}", "black") for x, y in points])
    texts = [t for t in axes.texts if isinstance(t, Annotation) and t.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == 12
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    marks = axes.transData.transform(points)
    assert not any(box.contains(*mark) for box in boxes for mark in marks)
    inside = axes.get_window_extent()
    assert all(inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) for box in boxes)
