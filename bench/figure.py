"""The ratios of a benchmark run as horizontal bars on log axes, with the targets marked."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.paired import Spread
from bench.result import Result
from models.figures import style

_COLOURS = {True: style.BLUE, False: style.VERMILLION, None: style.PALE_GREY}
_WIDTH = 9.0  # inches: the labels take half


def draw(results: Sequence[Result], machine: dict[str, Any]) -> bytes:
    """Draw every row's ratio: a bar to the median, a line from p20 to p80, a tick at the target. Returns a PNG.

    Above are rows that shall be faster than their baseline, as baseline / kafops; below the others, as kafops /
    baseline.
    """
    faster = [r for r in results if r.inverse]
    others = [r for r in results if not r.inverse]
    with style.context():
        figure = style.figure(height=1.6 + 0.22 * len(results))
        figure.set_figwidth(_WIDTH)
        panels = figure.subplots(2, 1, height_ratios=[len(faster) + 2, len(others) + 2])
        _bars(panels[0], [(r, _inverted(r.ratio), r.limit and 1 / r.limit) for r in faster])
        _title(panels[0], "times faster than the baseline: the bar shall reach its tick")
        _bars(panels[1], [(r, r.ratio, r.limit) for r in others])
        _title(panels[1], "cost as a multiple of the baseline's: the bar shall not pass its tick")
        figure.suptitle(
            f"{machine['processor']}, {machine['backend'].rsplit(' ', 1)[-1]}, {machine['threads']} threads.  "
            "Blue: target met, orange: missed, grey: no target",
            fontsize=9,
            color=style.GREY,
        )
        return style.png(figure)


def _title(axes: Axes, text: str) -> None:
    """Write a title that ends where the bars do: it may be wider than they are, and has all the labels' width too."""
    axes.set_title(text, loc="right")


def _inverted(s: Spread) -> Spread:
    return Spread(1 / s.median, 1 / s.p80, 1 / s.p20)


def _bars(axes: Axes, rows: Sequence[tuple[Result, Spread, float | None]]) -> None:
    values = [1.0, *(value for _, s, limit in rows for value in (s.p20, s.p80, limit) if value)]
    axes.set_xscale("log")
    axes.set_xlim(0.9 * min(values), 1.2 * max(values))
    for place, (r, s, limit) in enumerate(rows):
        axes.barh(place, s.median - 1, 0.62, left=1, color=_COLOURS[r.met])
        axes.plot([s.p20, s.p80], [place, place], color="black", linewidth=1)
        if limit is not None:
            axes.plot([limit, limit], [place - 0.42, place + 0.42], color="black", linewidth=2)
        text = f"{s.median:.2f}" if s.median < 10 else f"{s.median:.3g}"
        axes.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), va="center", color=style.GREY)
    axes.axvline(1, color=style.GREY, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{r.what}, against {r.baseline_name}" for r, _, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    wide = max(values) > 100 * min(values)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if wide else (1.0, 2.0, 3.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    style.bare(axes)
