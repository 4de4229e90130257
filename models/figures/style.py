"""One look for all figures: sizes that stay readable at phone width, and one palette for colour-blind readers too."""

import io
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# From the Okabe-Ito palette; its yellow cannot be read on white.
GREY, BLUE, VERMILLION, PALE_VERMILLION, PALE_GREY = "#4d4d4d", "#0072b2", "#d55e00", "#eeb48c", "#d9d9d9"
GREEN, PINK, ORANGE, SKY = "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
PALETTE = (GREY, BLUE, GREEN, VERMILLION, PINK, ORANGE, SKY)
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
COLOURS = {"relu": GREY, "silu": BLUE, "kaf": VERMILLION, "kaf_isometric": VERMILLION}
WIDTH = 5.6  # inches; on a phone this leaves 9 points readable

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


def context() -> AbstractContextManager[None]:
    """Return the context manager within which figures are drawn."""
    return mpl.rc_context(_RC)


def png(drawing: Figure) -> bytes:
    """Render a figure; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def bare(axes: Axes) -> None:
    """Remove the left axis, where labels say enough."""
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
