"""Time and memory of a training step, by implementation of the activation."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from models.figures import style

_LABELS = {
    "relu": ("ReLU", style.GREY),
    "fused": ("KAF, fused", style.VERMILLION),
    "compiled": ("KAF, torch.compile", style.PALE_VERMILLION),
    "reference": ("KAF, plain PyTorch", style.PALE_VERMILLION),
}


@style.drawn
def draw(cost: dict[str, Any]) -> Figure:
    """Draw what `models.evaluation.step_cost.measure` found: bars for the median time and memory kept for backward."""
    done = cost["implementations"]
    names = [name for name in _LABELS if name in done]
    figure = style.figure(height=0.9 + 0.36 * len(names))
    time, memory = figure.subplots(1, 2, sharey=True)
    for place, name in enumerate(names):
        result, colour = done[name], _LABELS[name][1]
        if "error" in result:
            time.annotate("  failed, see the report", (0, place), va="center", color=style.GREY)
            continue
        milliseconds, megabytes = 1e3 * result["median_seconds"], result["kept_bytes"] / 1e6
        low, high = (1e3 * s for s in result["spread_seconds"])
        error = [[milliseconds - low], [high - milliseconds]]
        time.barh(place, milliseconds, 0.62, color=colour, xerr=error, error_kw={"elinewidth": 1, "capsize": 2})
        _label(time, high, place, f"{milliseconds:.0f} ms", result.get("time_ratio"))
        memory.barh(place, megabytes, 0.62, color=colour)
        _label(memory, megabytes, place, f"{megabytes:.0f} MB", result.get("memory_ratio"))
    time.set_yticks(range(len(names)), [_LABELS[name][0] for name in names])
    time.set_ylim(len(names) - 0.4, -0.6)
    time.set_title("time of a training step")
    memory.set_title("memory kept for backward")
    for axes in (time, memory):
        axes.set_xlim(0, 1.6 * axes.dataLim.x1)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        style.bare(axes)
    return figure


def _label(axes: Axes, x: float, place: int, value: str, ratio: float | None) -> None:
    text = value if ratio is None or ratio == 1 else f"{value}  ({ratio:.3g}×)"
    axes.annotate(text, (x, place), (4, 0), textcoords="offset points", va="center", fontsize=8, color=style.GREY)
