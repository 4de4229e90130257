"""Draws the predictions of `bench.gpu_static` under each GPU's roof."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from bench.gpu_costs import BACKENDS, POINTS, Row
from bench.gpus import GPUS, ISSUE, Gpu
from models.figures import style

_COLOURS = {"cuda": style.BLUE, "triton": style.VERMILLION}
_MARKERS = {
    "forward": "o",
    "backward": "s",
    "forward, free dictionary": "D",
    "backward, free dictionary": "P",
    "double backward": "^",
}
_RANGE = 3.0, 300.0


_NOTE: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 8, "color": style.GREY}


def draw(rows: Sequence[Row]) -> bytes:
    """Draw the share of the memory's bandwidth that each kernel is predicted to reach. Returns a PNG."""
    with style.context():
        figure = style.figure(height=6.2)
        panels = figure.subplots(2, 2, sharex=True, sharey=True)
        rows = [row for row in rows if row.work.title in _MARKERS]
        for axes, gpu in zip(panels.flat, GPUS, strict=True):
            _panel(axes, gpu, [row for row in rows if row.binary.architecture == gpu.architecture.name])
        panels[0, 0].annotate("more than this GPU\ncan do", (0.96, 0.8), xycoords="axes fraction", **_NOTE)
        for axes in panels[1]:
            axes.set_xlabel("instructions per byte moved")
        for axes in panels[:, 0]:
            axes.set_ylabel("share of memory bandwidth")
        figure.legend(handles=_legend(rows), loc="outside lower center", ncols=3, fontsize=8)
        figure.suptitle(
            f"Compiled, not run: GPU kernels under their roofs, D = {POINTS}", fontsize=10, x=0.01, ha="left"
        )
        return style.png(figure)


def _panel(axes: Axes, gpu: Gpu, rows: Sequence[Row]) -> None:
    x = np.geomspace(*_RANGE, 400)
    ridge = gpu.seconds(1, ISSUE) ** -1 / gpu.bandwidth  # instructions that are issued while a byte is moved
    roof = np.minimum(1, ridge / x)
    axes.fill_between(x, roof, 2, color=style.PALE_GREY, alpha=0.5, linewidth=0)
    axes.plot(x, roof, color=style.GREY, linewidth=1.2)
    axes.annotate(f"{ridge:.1f} / byte", (ridge, 1), (2, 4), textcoords="offset points", fontsize=8)
    for row in rows:
        at = row.cost.slots / row.work.moved(row.dtype), 1 / row.on(gpu).ratio
        colour = _COLOURS[row.backend]
        face = {"float32": colour}.get(row.dtype, "white")
        size = {"cuda": 6.5, "triton": 4.5}[row.backend]
        axes.plot(*at, _MARKERS[row.work.title], color=colour, markerfacecolor=face, markersize=size)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*_RANGE)
    axes.set_ylim(0.045, 1.4)
    axes.xaxis.set_major_locator(FixedLocator([3, 10, 30, 100]))
    axes.yaxis.set_major_locator(FixedLocator([0.05, 0.1, 0.2, 0.5, 1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{gpu.name}, {gpu.bandwidth / 1e12:.2f} TB/s")


def _legend(rows: Sequence[Row]) -> list[Line2D]:
    used = dict.fromkeys(row.backend for row in rows)
    entries = [Line2D([], [], marker="o", linestyle="", color=_COLOURS[b], label=BACKENDS[b]) for b in used]
    for name, marker in _MARKERS.items():
        entries.append(Line2D([], [], marker=marker, linestyle="", color=style.GREY, label=name))
    for name, face in (("float32", style.GREY), ("bfloat16", "white")):
        entries.append(Line2D([], [], marker="o", linestyle="", color=style.GREY, markerfacecolor=face, label=name))
    return entries
