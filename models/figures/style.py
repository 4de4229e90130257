"""One look for all figures: sizes that stay readable at phone width, and one palette for colour-blind readers too."""

import functools
import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, ParamSpec

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# From the Okabe-Ito palette; its yellow cannot be read on white.
GREY, BLUE, VERMILLION, PALE_VERMILLION, PALE_GREY = "#4d4d4d", "#0072b2", "#d55e00", "#eeb48c", "#d9d9d9"
GREEN, PINK, ORANGE, SKY = "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
PALETTE = (GREY, BLUE, GREEN, VERMILLION, PINK, ORANGE, SKY)
MARKS = ("o", "s", "D", "^", "v")
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
COLOURS = {"relu": GREY, "silu": BLUE, "kaf": VERMILLION, "kaf_isometric": VERMILLION}
WIDTH = 5.6  # inches; on a phone this leaves 9 points readable

P = ParamSpec("P")

_RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
}


def line(number: int) -> dict[str, Any]:
    """Return colour and dashes of the number-th of up to 21 lines, no two alike."""
    return {"color": PALETTE[number % len(PALETTE)], "ls": DASHES[number // len(PALETTE) % len(DASHES)]}


def figure(height: float) -> Figure:
    """Make an empty figure of the common width, `height` inches high."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def png(drawing: Figure) -> bytes:
    """Render a figure; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def drawn(draw: Callable[P, Figure]) -> Callable[P, bytes]:
    """Make a function draw within the common look, and return its figure as PNG."""

    @functools.wraps(draw)
    def rendered(*args: P.args, **kwargs: P.kwargs) -> bytes:
        with context():
            return png(draw(*args, **kwargs))

    return rendered


def context() -> AbstractContextManager[None]:
    """Return the context manager within which figures are drawn."""
    return mpl.rc_context(_RC)


def grid(axes: Axes, axis: Literal["x", "y", "both"]) -> None:
    """Draw pale lines behind everything, at the ticks of an axis."""
    axes.grid(axis=axis, color=PALE_GREY, lw=0.6)
    axes.set_axisbelow(True)


def rows(axes: Axes, labels: Sequence[str], above: float = 0.5, **text: Any) -> None:
    """Make an axis of named rows from top to bottom, with `above` of a row free above the first."""
    axes.set_yticks(range(len(labels)), labels, **text)
    axes.set_ylim(len(labels) - 0.5, -above)
    grid(axes, "x")
    bare(axes)


def handle(label: str, colour: str, mark: str = "", hollow: bool = False, **look: Any) -> Line2D:
    """Return a line or mark for a legend."""
    look = {"ls": "" if mark else "-", "ms": 5, "mfc": "white" if hollow else colour, **look}
    return Line2D([], [], color=colour, marker=mark or None, label=label, **look)


def legend(figure: Figure, handles: Sequence[Artist] | None = None, columns: int = 3, **options: Any) -> None:
    """Write a legend above everything."""
    shown = {} if handles is None else {"handles": handles}
    figure.legend(**{"loc": "outside upper left", "ncols": columns, "fontsize": 8, **shown, **options})


def bare(axes: Axes) -> None:
    """Remove the left axis, where labels say enough."""
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
