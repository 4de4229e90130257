"""Learned curves as a picture, over the density of their inputs."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kafops import bases
from kafops.inputs import LayerInputs, edges, ends, kaf_layers, look
from kafops.modules import KAF

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot"]

_POINTS, _BINS = 241, 90  # of a curve, of a density
_FEW = 6  # channels that have a colour and a name each
_MANY = 128  # channels that are drawn
_COLUMNS = 4
_CURVE, _MEAN, _DENSITY, _END, _BASE = "#b5432a", "#5e1f12", "#5b8db8", "#7a7a7a", "#222222"
_COLOURS = ("#b5432a", "#2f6f9f", "#4f8a3c", "#8a5aa8", "#c28a1b", "#4a4a4a")


def plot(model: nn.Module, inputs: Any = None, limit: int = 24) -> "Figure":
    """Draw the curves of a layer, or of all KAF layers of a model, over the density of their inputs.

    A panel has the curves of a layer, of at most 128 channels, evenly chosen; their mean, where they are many; the base
    beneath them; where the dictionary ends; and how many inputs are beyond, in words.

    Args:
        model: a KAF layer or a model that has some; stays as it was.
        inputs: a batch or batches as for `kafops.calibrate`, of what goes into the model or layer; None for curves
            alone.
        limit: number of layers to draw, of more evenly chosen ones.

    Returns:
        A `matplotlib.figure.Figure`: notebooks show it, `savefig` saves it, TensorBoard's `add_figure` and `wandb.log`
        take it.

    Raises:
        ImportError: there is no matplotlib, which `pip install "kafops[plot]"` brings.
        TypeError, ValueError: from `kafops.calibrate`, where model or inputs are none of these.

    Example:
        >>> kafops.plot(model, images).savefig("curves.png")
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError(
            'kafops.plot draws with matplotlib, which is not installed; pip install "kafops[plot]" brings it'
        ) from e
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(f"limit must be an integer ≥ 1, got {limit!r}")
    layers = kaf_layers(model)
    seen = {} if inputs is None else look(model, inputs)
    return draw(Figure, layers, seen, limit)


def draw(
    figure_class: "type[Figure]", layers: Mapping[str, KAF], seen: Mapping[str, LayerInputs], limit: int
) -> "Figure":
    """Draw the layers, with what was seen of their inputs."""
    names = list(layers)
    chosen = [names[i] for i in _spread(len(names), limit)]
    columns = min(_COLUMNS, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    size = (6.4, 4.4) if len(chosen) == 1 else (0.6 + 3.1 * columns, 0.7 + 2.5 * rows)
    figure = figure_class(figsize=size, dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for axes, name in zip(panels, chosen, strict=False):
        handles |= _panel(axes, name, layers[name], seen.get(name), alone=len(chosen) == 1)
    for axes in panels[len(chosen) :]:
        axes.set_visible(False)
    if len(names) > len(chosen):
        figure.suptitle(f"{len(chosen)} of {len(names)} layers", fontsize=10)
    columns = len(handles) if columns > 1 or len(handles) < 4 else 3
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure


def _panel(axes: "Axes", name: str, layer: KAF, inputs: LayerInputs | None, alone: bool) -> dict[str, Any]:
    """Draw a layer, and return what the legend says by its words."""
    from matplotlib.lines import Line2D

    low, high = (end.double().cpu() for end in ends(layer))
    reach = 1.25 * max(-low.min().item(), high.max().item())
    if inputs is not None and inputs.called:
        reach = min(max(reach, 1.05 * inputs.quantile(0.999)), 2.5 * reach)
    x = torch.linspace(-reach, reach, _POINTS)
    with torch.no_grad():
        y = layer.curves(x.to(layer.alpha.device)).double().cpu()
    channels = y.shape[1]
    handles: dict[str, Any] = {}
    if inputs is not None and inputs.called:
        handles["density of the inputs"] = _density(axes, inputs, reach)
    axes.axhline(0, color="#d8d8d8", lw=0.7, zorder=1)
    if channels <= _FEW:
        for c in range(channels):
            (line,) = axes.plot(x, y[:, c], color=_COLOURS[c], lw=1.5, zorder=3)
            handles[f"channel {c}" if channels > 1 else "curve"] = line
    else:
        drawn = _spread(channels, _MANY)
        axes.plot(x, y[:, drawn], color=_CURVE, lw=0.8, alpha=max(0.12, min(0.6, 8 / len(drawn))), zorder=2)
        (mean,) = axes.plot(x, y.mean(1), color=_MEAN, lw=1.9, zorder=4)
        handles |= {"curves, one for each channel": Line2D([], [], color=_CURVE, lw=0.9), "their mean": mean}
    if layer.base is not None:
        with torch.no_grad():
            beneath = bases.value(layer.base, x) if layer.old is None else layer.old(x)
        (line,) = axes.plot(x, beneath, color=_BASE, lw=1.1, ls=(0, (1, 1.5)), zorder=5)
        handles["base"] = line
    for end in (low.min().item(), high.max().item()):
        handles["end of the dictionary"] = axes.axvline(end, color=_END, lw=0.9, ls=(0, (5, 3)), zorder=1.5)
    _frame(axes, y, reach)
    words = f"{channels} channels" if channels > 1 else "one curve"
    if inputs is not None and inputs.called:
        words += f", {_percent(inputs.share)} of inputs outside"
    elif inputs is not None:
        words += ", not reached by the inputs"
    axes.set_title(f"{name}\n{words}", fontsize=9 if alone else 8, loc="left")
    if alone:
        axes.set_xlabel("input x", fontsize=9)
        axes.set_ylabel("f(x)", fontsize=9)
    return handles


def _density(axes: "Axes", inputs: LayerInputs, reach: float) -> Any:
    """Draw the density of the inputs, all channels together, into the lower part of a panel."""
    begins, stops = edges()
    below = torch.cat([torch.zeros(1, dtype=torch.float64), inputs.counts.sum(0).cumsum(0)])
    ticks = torch.cat([begins[:1].clamp(min=-(2.0**20)), stops.clamp(max=2.0**20)])
    places = torch.linspace(-reach, reach, _BINS + 1, dtype=torch.float64)
    heights = _interpolated(ticks, below, places).diff()
    behind = axes.twinx()
    behind.set_zorder(axes.get_zorder() - 1)
    axes.patch.set_visible(False)
    patch = behind.stairs(heights, places, fill=True, color=_DENSITY, alpha=0.35, lw=0)
    behind.set_ylim(0, 2.2 * max(heights.max().item(), 1e-300))
    behind.axis("off")
    return patch


def _frame(axes: "Axes", y: Tensor, reach: float) -> None:
    """Show what nearly all curves do; a few wild ones may leave the panel."""
    known = y[:, y.isfinite().all(0)]
    if known.shape[1] == 0:
        known = y.new_zeros(1, 1)
    low, high = (torch.quantile(end, q).item() for end, q in ((known.amin(0), 0.02), (known.amax(0), 0.98)))
    margin = 0.07 * max(high - low, 1e-6)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(low - margin, high + margin)
    axes.tick_params(labelsize=7, length=2.5, color="#9a9a9a")
    axes.locator_params(nbins=5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9a9a9a")


def _interpolated(ticks: Tensor, values: Tensor, x: Tensor) -> Tensor:
    i = torch.bucketize(x, ticks[1:-1])
    return torch.lerp(values[i], values[i + 1], (x - ticks[i]) / (ticks[i + 1] - ticks[i]))


def _percent(share: float) -> str:
    return "none" if share == 0 else "under 0.1 %" if share < 1e-3 else f"{100 * share:.2g} %"


def _spread(count: int, wanted: int) -> list[int]:
    """Return up to `wanted` numbers evenly chosen from the first to the last of `count`."""
    wanted = min(count, wanted)
    return [round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)]
