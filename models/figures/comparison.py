"""Accuracy and robustness of runs beside those published: a panel for each attack."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from models.activations import ACTIVATIONS
from models.evaluation import Accuracy
from models.figures import labels, style
from models.figures.labels import Label
from models.recipes import Published
from models.recipes.comparison import Comparison, attack_name

_OTHERS = style.BLUE


def draw(comparisons: Sequence[Comparison], rows: Sequence[Published]) -> bytes:
    """Draw clean against robust accuracy: published hollow, the runs filled, with the bars of their 95 % intervals.

    Args:
        comparisons: of the runs.
        rows: what is published for their recipes.
    """
    wanted = _panels(comparisons, rows)
    with style.context():
        figure = style.figure(height=0.5 + 3.5 * len(wanted))
        panels = figure.subplots(len(wanted), 1, squeeze=False)[:, 0]
        shown = []
        for axes, (recipe, attack) in zip(panels, wanted, strict=True):
            of_recipe = [comparison for comparison in comparisons if comparison.recipe.name == recipe]
            alike = [row for row in rows if (row.recipe, row.attack) == (recipe, attack)]
            shown.append((axes, *_panel(axes, attack, of_recipe, alike)))
            axes.set_title(recipe)
        panels[-1].set_xlabel("clean accuracy, %")
        handles = [_handle("o", "white", "published"), _handle("o", style.GREY, "runs, with 95 % intervals")]
        if any(row.remembered for row in rows):
            handles.insert(1, _handle("D", "white", "published, from memory"))
        figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=8, handletextpad=0.2)
        for axes, texts, bars in shown:
            labels.place(axes, texts, bars)
        return style.png(figure)


def _panels(comparisons: Sequence[Comparison], rows: Sequence[Published]) -> list[tuple[str, str]]:
    """Return recipe and attack of each panel: the attacks of the runs, if some of them are published those only."""
    found = []
    for recipe in dict.fromkeys(comparison.recipe.name for comparison in comparisons):
        runs = [comparison.measured for comparison in comparisons if comparison.recipe.name == recipe]
        ours = list(dict.fromkeys(attack_name(text) for run in runs for text in run.robust))
        theirs = {row.attack for row in rows if row.recipe == recipe and row.robust is not None}
        found += [(recipe, attack) for attack in ours if attack in theirs] or [(recipe, attack) for attack in ours]
    return found


def _panel(
    axes: Axes, attack: str, comparisons: Sequence[Comparison], rows: Sequence[Published]
) -> tuple[list[Label], list[tuple[float, float, float, float]]]:
    """Draw the points of one attack; return their labels and the bars, runs first."""
    texts: list[Label] = []
    bars: list[tuple[float, float, float, float]] = []
    for comparison in comparisons:
        for text, robust in comparison.measured.robust.items():
            if attack_name(text) == attack:
                label, crossing = _run(axes, comparison, robust)
                texts.append(label)
                bars += crossing
    texts += [_published(axes, row, rows) for row in rows if row.clean is not None and row.robust is not None]
    axes.set_ylabel(f"accuracy under {attack}, %")
    axes.grid(color=style.PALE_GREY, lw=0.6)
    axes.set_axisbelow(True)
    axes.margins(0.14, 0.16)
    axes.set_xlim(_within_0_and_100(axes.get_xlim()))
    axes.set_ylim(_within_0_and_100(axes.get_ylim()))
    return texts, bars


def _within_0_and_100(limits: tuple[float, float]) -> tuple[float, float]:
    low, high = limits
    room = 0.04 * (high - low)
    return max(low, -room), min(high, 100 + room)


def _run(axes: Axes, comparison: Comparison, robust: Accuracy) -> tuple[Label, list[tuple[float, float, float, float]]]:
    measured = comparison.measured
    colour = _colour(measured.settings.activation)
    x, y = 100 * measured.clean.value, 100 * robust.value
    (left, right), (low, high) = ([100 * end for end in a.interval] for a in (measured.clean, robust))
    axes.errorbar(
        x, y, xerr=[[x - left], [right - x]], yerr=[[y - low], [high - y]], fmt="o", ms=6, color=colour, elinewidth=1,
        capsize=2, zorder=3,
    )  # fmt: skip
    return Label(x, y, measured.run, colour, bold=True), [(left, y, right, y), (x, low, x, high)]


def _published(axes: Axes, row: Published, rows: Sequence[Published]) -> Label:
    colour = _colour(row.activation)
    x, y = 100 * (row.clean or 0.0), 100 * (row.robust or 0.0)
    axes.plot(x, y, "D" if row.remembered else "o", ms=5.5, color=colour, mfc="white", mew=1.2, zorder=2.5)
    words = []
    if len({other.activation for other in rows}) > 1:
        words.append(ACTIVATIONS.parse(row.activation)[0])
    if len({other.network for other in rows}) > 1:
        words.append(row.network.partition(":")[0])
    if len({other.label for other in rows}) > 1 or not words:
        words.append(row.label)
    return Label(x, y, " ".join(words), colour)


def _colour(activation: str) -> str:
    name = ACTIVATIONS.parse(activation)[0]
    if name.startswith("kaf"):
        return style.VERMILLION
    return style.GREY if name == "relu" else _OTHERS


def _handle(mark: str, fill: str, label: str) -> Line2D:
    return Line2D([], [], ls="", marker=mark, color=style.GREY, mfc=fill, mew=1.2, label=label)
