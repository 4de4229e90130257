"""The loss over a learning rate that grows step by step."""

from models.figures import style
from models.training.range_test import Range


def draw(found: Range) -> bytes:
    """Draw the losses of the steps, their average, and the suggested range."""
    with style.context():
        figure = style.figure(height=2.9)
        axes = figure.subplots()
        axes.axvspan(found.steepest, found.high, color=style.BLUE, alpha=0.12, lw=0)
        axes.plot(found.rates, found.losses, color=style.PALE_GREY, lw=1, label="each step")
        axes.plot(found.rates, found.smoothed, color=style.VERMILLION, lw=1.8, label="average")
        for rate, text in ((found.steepest, "fastest fall"), (found.high, "lowest")):
            axes.annotate(
                f"{text}\n{rate:.2g}", (rate, 1), (0, -2), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="center", va="top", fontsize=8, color=style.GREY,
            )  # fmt: skip
        top = max(found.smoothed) * 1.25
        axes.set_ylim(0, top)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("training loss")
        axes.legend(loc="lower left", fontsize=8)
        return style.png(figure)
