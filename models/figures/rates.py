"""Robust accuracy over the learning rate: a line for each activation, at the best of its activation rates."""

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from models.figures import style


@style.drawn
def draw(networks: dict[str, dict[str, dict[float, list[float]]]], common: float) -> Figure:
    """Draw a panel for each network.

    Args:
        networks: by label, activation and learning rate, robust accuracies of the seeds.
        common: the learning rate that the study has in common, marked.
    """
    names = list(dict.fromkeys(a for activations in networks.values() for a in activations))
    rates = sorted({lr for activations in networks.values() for lines in activations.values() for lr in lines})
    figure = style.figure(height=3.0 + 0.16 * (len(names) // 3))
    panels = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    for axes, (network, activations) in zip(panels, networks.items(), strict=True):
        axes.axvline(common, color=style.PALE_GREY, lw=4, zorder=0)
        for name, of_rates in activations.items():
            look = style.line(names.index(name))
            points = sorted(of_rates.items())
            means = [100 * sum(values) / len(values) for _, values in points]
            axes.plot([lr for lr, _ in points], means, marker="o", ms=3.5, label=name, **look)
            for lr, values in points:
                axes.plot([lr] * len(values), [100 * v for v in values], ".", ms=3, color=look["color"], alpha=0.5)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(rates))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(rates, [f"{lr:g}" for lr in rates])
        style.grid(axes, "y")
        axes.set_title(network)
        axes.set_xlabel("learning rate")
    panels[0].set_ylabel("robust accuracy on held-out images, %")
    handles = {h.get_label(): h for axes in panels for h in axes.get_legend_handles_labels()[0]}
    style.legend(figure, list(handles.values()))
    return figure
