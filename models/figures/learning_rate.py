"""The loss over a learning rate that grows step by step."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from models.figures import style


@style.drawn
def draw(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], low: float | None, high: float | None
) -> Figure:
    """Draw the losses of the steps, their average, and the suggested range."""
    figure = style.figure(height=2.9)
    axes = figure.subplots()
    axes.plot(rates, losses, color=style.PALE_GREY, lw=1, label="each step")
    axes.plot(rates, smoothed, color=style.VERMILLION, lw=1.8, label="average")
    if low is not None and high is not None:
        axes.axvspan(low, high, color=style.BLUE, alpha=0.12, lw=0)
        told = ((low, f"begins to fall  \n{low:.2g}  ", "right"), (high, f"  lowest\n  {high:.2g}", "left"))
        for rate, text, side in told:
            axes.annotate(
                text, (rate, 1), (0, -2), xycoords=("data", "axes fraction"), textcoords="offset points", ha=side,
                va="top", fontsize=8, color=style.GREY,
            )  # fmt: skip
    # Where it diverges it would hide the rest.
    axes.set_ylim(0, 1.3 * min(max(smoothed), 2 * smoothed[0]))
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.legend(loc="lower left", fontsize=8)
    return figure
