"""Which part of its dictionary each KAF layer uses, and what share of its inputs lies outside."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from models.figures import style

if TYPE_CHECKING:
    from models.analysis.curves import Use

_SHARES = LinearSegmentedColormap.from_list("shares", ["white", "#9ecbe5", style.BLUE])


@style.drawn
def draw(clean: Sequence["Use"], adversarial: Sequence["Use"] = ()) -> Figure:
    """Draw two panels, a row for each layer: the share of channels that use each point, and the share outside.

    Args:
        clean: the layers on clean images.
        adversarial: the same on adversarial images, if these were looked at.
    """
    rows = len(clean)
    figure = style.figure(height=1.3 + 0.16 * max(rows, 8))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    _users(left, clean)
    shown = [(clean, style.BLUE, "clean"), (adversarial, style.GREY, "adversarial")]
    for number, (uses, colour, _) in enumerate(shown):
        _outside(right, uses, colour, shift=0.18 * (2 * number - 1) if adversarial else 0.0)
    right.set_xlabel("inputs outside the dictionary, %\n(bar: 80 % of the channels)")
    right.set_xlim(left=-0.02 * right.get_xlim()[1])
    style.grid(right, "x")
    handles = [style.handle(name, colour, "o", ls="-", ms=4, lw=1) for uses, colour, name in shown if uses]
    style.legend(figure, handles, 2, loc="outside upper right")
    return figure


def _users(axes: Axes, uses: Sequence["Use"]) -> None:
    width = max(len(use.users) for use in uses)
    shares = np.full((len(uses), width), np.nan)
    for row, use in enumerate(uses):
        shares[row, : len(use.users)] = use.users
    picture = axes.imshow(100 * shares, cmap=_SHARES, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    axes.set_ylabel("KAF layer, from image to logits")
    axes.set_yticks(range(len(uses)), [str(row + 1) for row in range(len(uses))], fontsize=7)
    if len(uses) > 25:
        axes.yaxis.set_major_locator(MaxNLocator(12, integer=True))
    points = uses[0].points
    if points and all(use.points == points for use in uses):
        places = np.linspace(0, width - 1, 5)
        axes.set_xticks(places, [f"{value:.3g}" for value in np.interp(places, range(width), points)])
        axes.set_xlabel("point of the dictionary δ, units of the input")
    else:
        axes.set_xlabel("point of the dictionary, in their order")
    bar = axes.get_figure().colorbar(picture, ax=axes, location="top", aspect=30, shrink=0.8)  # type: ignore[union-attr]
    bar.set_label(f"channels with at least {uses[0].USED:.1%} of their inputs there, %", fontsize=8)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7)


def _outside(axes: Axes, uses: Sequence["Use"], colour: str, shift: float) -> None:
    for row, use in enumerate(uses):
        low, high = np.quantile(use.outside, [0.1, 0.9])
        axes.plot([100 * low, 100 * high], [row + shift] * 2, color=colour, lw=1)
        axes.plot(100 * use.share, row + shift, "o", ms=3.5, color=colour)
