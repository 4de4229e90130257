"""The loss over a learning rate that grows step by step."""

from matplotlib.axes import Axes

from models.figures import style
from models.runs.lr_range import Range


def draw(found: Range) -> bytes:
    """Draw the losses of the steps, their average, and the suggested range."""
    with style.context():
        figure = style.figure(height=2.9)
        axes = figure.subplots()
        axes.plot(found.rates, found.losses, color=style.PALE_GREY, lw=1, label="each step")
        axes.plot(found.rates, found.smoothed, color=style.VERMILLION, lw=1.8, label="average")
        if found.low is not None and found.high is not None:
            axes.axvspan(found.low, found.high, color=style.BLUE, alpha=0.12, lw=0)
            _mark(axes, found.low, f"begins to fall  \n{found.low:.2g}  ", "right")
            _mark(axes, found.high, f"  lowest\n  {found.high:.2g}", "left")
        # Where it diverges it would hide the rest.
        axes.set_ylim(0, 1.3 * min(max(found.smoothed), 2 * found.smoothed[0]))
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("training loss")
        axes.legend(loc="lower left", fontsize=8)
        return style.png(figure)


def _mark(axes: Axes, rate: float, text: str, side: str) -> None:
    axes.annotate(
        text, (rate, 1), (0, -2), xycoords=("data", "axes fraction"), textcoords="offset points", ha=side, va="top",
        fontsize=8, color=style.GREY,
    )  # fmt: skip
