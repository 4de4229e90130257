"""How learned curves evolve: a strip of small multiples coloured by epoch, and an animation."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from models.figures import style

if TYPE_CHECKING:
    from models.analysis.curves import Evolution, Use

_COLUMNS = 4
_LINES, _FRAMES = 12, 60  # at most, of the strip and the animation
_COLOURS = LinearSegmentedColormap.from_list("epochs", [style.PALE_GREY, style.PALE_VERMILLION, style.VERMILLION])
_START = (0, (3, 2))


@style.drawn
def strip(evolutions: Sequence["Evolution"], epochs: Sequence[int], layers: int, uses: Sequence["Use"] = ()) -> Figure:
    """Draw each channel's curve at up to 12 epochs, over the share of its inputs near each point of its dictionary.

    Titles say what share of the inputs lies outside the dictionary, where no density is drawn.

    Args:
        evolutions: the layers, a row for each.
        epochs: of their curves, in order.
        layers: how many KAF layers the network has.
        uses: what the layers do with their dictionaries; the shares are left out of layers that are not here.
    """
    shown = _chosen(len(epochs), _LINES)
    scale = Normalize(epochs[0], max(epochs[-1], epochs[0] + 1))
    inputs = {use.name: use for use in uses if use.points}
    figure, rows = _grid(evolutions, layers, 1.2 if inputs else 1.05)
    for evolution, row in zip(evolutions, rows, strict=True):
        for place, axes in enumerate(row):
            if evolution.name in inputs:
                use, channel = inputs[evolution.name], evolution.channels[place]
                _inputs(axes, use, channel)
                axes.set_title(f"channel {channel}\n{100 * use.outside[channel]:.2g} % outside", fontsize=8)
            for number in shown:
                last = number == shown[-1]
                colour = style.GREY if number == 0 else _COLOURS(scale(epochs[number]))
                axes.plot(
                    evolution.x, evolution.curves[number][place], color=colour, lw=1.5 if last else 0.9,
                    ls=_START if number == 0 else "-", zorder=2.5 if number == 0 else 2,
                )  # fmt: skip
    handles: list[Artist] = [
        style.handle(f"epoch {epochs[0]}", style.GREY, ls=_START, lw=0.9),
        style.handle(f"epoch {epochs[-1]}", style.VERMILLION, lw=1.5),
    ]
    if inputs:
        handles.append(Patch(color=style.BLUE, alpha=0.16, lw=0, label="density of the inputs now"))
    style.legend(figure, handles)
    if len(epochs) > 2:
        bar = figure.colorbar(
            ScalarMappable(scale, _COLOURS), ax=figure.axes[: _COLUMNS * len(rows)], location="bottom", aspect=50,
            pad=0.02, shrink=0.6, label="epoch",
        )  # fmt: skip
        bar.outline.set_visible(False)
        bar.ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def animation(evolutions: Sequence["Evolution"], epochs: Sequence[int], layers: int) -> bytes:
    """Return a GIF with a frame for each of up to 60 epochs, the first dashed in each; see `strip`."""
    shown = _chosen(len(epochs), _FRAMES)
    with style.context():
        figure, rows = _grid(evolutions, layers)
        moving = []
        for evolution, row in zip(evolutions, rows, strict=True):
            for place, axes in enumerate(row):
                axes.plot(evolution.x, evolution.curves[0][place], color=style.GREY, lw=0.9, ls=_START)
                (line,) = axes.plot(evolution.x, evolution.curves[0][place], color=style.VERMILLION, lw=1.6)
                moving.append((line, evolution, place))
        title = figure.suptitle(" ", x=0.02, ha="left", fontsize=10, color=style.VERMILLION)
        canvas = FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # so that nothing jumps between frames
        frames = []
        for number in shown:
            for line, evolution, place in moving:
                line.set_ydata(evolution.curves[number][place])
            title.set_text(f"epoch {epochs[number]} of {epochs[-1]}   (dashed: epoch {epochs[0]})")
            canvas.draw()
            frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()).quantize(48))
    buffer = io.BytesIO()
    pause = int(min(max(6000 / len(frames), 80), 600))  # ms
    frames[0].save(
        buffer, format="GIF", save_all=True, append_images=frames[1:], loop=0, optimize=True,
        duration=[*[pause] * (len(frames) - 1), 2000],
    )  # fmt: skip
    return buffer.getvalue()


def _chosen(count: int, most: int) -> list[int]:
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def _grid(evolutions: Sequence["Evolution"], layers: int, height: float = 1.05) -> tuple[Figure, list[list[Axes]]]:
    figure = style.figure(height=height * len(evolutions) + 1.1)
    grid = figure.subplots(len(evolutions), _COLUMNS, sharex="row", sharey="row", squeeze=False)
    rows = []
    for evolution, row in zip(evolutions, grid, strict=True):
        count = len(evolution.channels)
        for axes in row[count:]:
            axes.set_visible(False)
        values = np.array(evolution.curves)
        margin = 0.06 * max(float(np.ptp(values)), 1e-6)
        row[0].set_ylim(values.min() - margin, values.max() + margin)
        row[0].set_xlim(evolution.x[0], evolution.x[-1])
        for axes, channel in zip(row, evolution.channels, strict=False):
            axes.axhline(0, color=style.PALE_GREY, lw=0.6)
            axes.set_title(f"channel {channel}", fontsize=8)
            axes.set_xticks([evolution.low, (evolution.low + evolution.high) / 2, evolution.high])
            axes.xaxis.set_major_formatter("{x:.3g}")
            axes.tick_params(labelsize=7)
        row[0].yaxis.set_major_locator(MaxNLocator(3, min_n_ticks=2))
        row[0].set_ylabel(f"KAF {evolution.layer + 1} of {layers}\noutput", fontsize=8)
        rows.append(list(row[:count]))
    for axes in rows[-1]:
        axes.set_xlabel("input", fontsize=8)
    return figure, rows


def _inputs(axes: Axes, use: "Use", channel: int) -> None:
    """Fill the share of the channel's inputs in each cell of its dictionary, behind the curves."""
    points = np.array(use.points)
    edges = np.concatenate([points[:1], (points[1:] + points[:-1]) / 2, points[-1:]])
    heights = np.array(use.cells[channel]) / np.diff(edges)
    behind = axes.twinx()
    behind.set_zorder(axes.get_zorder() - 1)
    axes.patch.set_visible(False)
    behind.stairs(heights, edges, fill=True, color=style.BLUE, alpha=0.16, lw=0)
    behind.set_ylim(0, 1.6 * max(float(heights.max()), 1e-9))
    behind.axis("off")
