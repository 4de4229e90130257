"""Dictionaries put where the inputs are, and curves fitted anew on them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kafops import bases, kernels
from kafops.init import Target
from kafops.inputs import LayerInputs, edges, kaf_layers, look
from kafops.modules import KAF

__all__ = ["Calibration", "CalibrationReport", "calibrate"]

_RIDGE = 1e-8  # of |alpha|², beside the mean square of the error
_SPREAD = 1e-3  # of the weight lies evenly over the range, the rest where inputs are
_EVEN = 256  # places
_AT_ONCE = 32  # channels
_F64: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


@dataclass(frozen=True)
class Calibration:
    """What was done to one layer.

    Attributes:
        boundary: half-width of its dictionary, before and after.
        outside: share of its inputs outside the dictionary, before and after.
        worst: that share in the channel where it is the largest, after.
        error: root mean square over the inputs of what the curve now is off by: from the function that it is the fit
            to, where it is still as it started, else from the curve that it was.
        restarted: whether it was as it started, and starts anew on the new range.
    """

    boundary: tuple[float, float]
    outside: tuple[float, float]
    worst: float
    error: float
    restarted: bool


class CalibrationReport(dict[str, Calibration]):
    """A `Calibration` for each layer by name; `str()` gives a table.

    Attributes:
        unreached: names of the layers that the batches did not reach, which stayed as they were.
    """

    def __init__(self, calibrations: Mapping[str, Calibration], unreached: list[str]) -> None:
        super().__init__(calibrations)
        self.unreached = unreached

    def __str__(self) -> str:
        rows = [("layer", "boundary", "inputs outside", "worst channel", "error of the curve")]
        for name, c in self.items():
            boundary, outside = f"{c.boundary[0]:g} → {c.boundary[1]:g}", f"{c.outside[0]:.2%} → {c.outside[1]:.2%}"
            rows.append((name, boundary, outside, f"{c.worst:.2%}", f"{c.error:.2g}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        if self.unreached:
            lines.append(f"not reached by the inputs, and left as they were: {', '.join(self.unreached)}")
        return "\n".join(lines)

    __repr__ = __str__


def calibrate(model: nn.Module, inputs: Any, quantile: float = 0.999) -> CalibrationReport:
    """Put the dictionary of every KAF layer of a model where the layer's inputs are, and fit its curves to that.

    A curve ends at the boundary of its dictionary: beyond, it is its base, or 0 without one. This runs the model on
    inputs and sets each layer's `boundary` to the quantile of the sizes |x| of what the layer is given, all channels
    together, rounded up to a number that is short (by 1/16 at most); a quantile below 2⁻¹² is no range, and leaves the
    boundary as it was. Bandwidths follow, so that γΔ² stays, and learned
    points are stretched, each channel's to the boundary. Then

    - a curve that is still the fit to a function, as it started (`init="relu"`, `"same"`, any function), is fitted to
      that function on the new range, and while the inputs are looked at, the function itself is computed in its place,
      so that later layers see what the network was trained on;
    - any other curve is fitted to itself, by least squares over the inputs.

    The parameters stay the objects that they were, and their gradients, training mode, statistics of norms and random
    generators as they were. Calibrate before training: an optimizer's momenta know nothing of it, and a model under
    DDP or FSDP would be calibrated on one process alone.

    Args:
        model: any module that has KAF layers, or such a layer; each layer once, however often it is called.
        inputs: a batch or an iterable of batches, such as a DataLoader, perhaps within a progress bar. A batch is a
            tensor; a tuple or list, of which the first element goes into the model, as loaders give labels too; or a
            mapping, the arguments of the model's forward by name. It is moved to the device of the model.
        quantile: share of the inputs that are to be within the dictionary, in (0, 1], default 0.999. 1 for all.

    Returns:
        A `CalibrationReport`: by the names of layers their boundaries and the shares outside, before and after; `print`
        shows it as a table.

    Raises:
        TypeError, ValueError: an argument is none of these; model has no KAF layer, a lazy one, or one whose alpha is
            pruned or parametrized; there is no batch; the model fails on a batch; inputs of a layer are not finite, or
            beyond 2^20. The model then is as it was.

    Example:
        >>> model = torchvision.models.resnet18()
        >>> converted = kafops.replace_activations(model, kafops.KAF, example_input=images, base="same")
        >>> report = kafops.calibrate(model, loader)
    """
    if isinstance(quantile, bool) or not isinstance(quantile, (int, float)):
        raise TypeError(f"quantile must be a number in (0, 1], got {type(quantile).__name__}")
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must be in (0, 1], got {quantile}")
    layers = kaf_layers(model)
    for name, layer in layers.items():
        if layer._parameters.get("alpha") is None:
            raise ValueError(f"alpha of {name} is pruned or parametrized, and cannot be set; remove that first")
    functions = {layer: function for layer in layers.values() if (function := _fitted_function(layer))}
    seen = look(model, inputs, functions)
    reached = {name: of for name, of in seen.items() if of.called}
    plans = {name: _plan(of, quantile, functions.get(of.layer)) for name, of in reached.items()}
    report = {name: _report(reached[name], plan) for name, plan in plans.items()}
    for plan in plans.values():
        plan.layer._move_boundary(plan.boundary)
        plan.layer._fill((plan.alpha, plan.gamma), plan.points)
    return CalibrationReport(report, [name for name in seen if name not in reached])


class _Plan(NamedTuple):
    """What a layer is to be."""

    layer: KAF
    boundary: float
    alpha: Tensor  # [C, D]
    gamma: Tensor  # [C]
    points: Tensor  # [C, D] or [1, D]
    error: float
    restarted: bool


def _fitted_function(layer: KAF) -> Target | None:
    """Return the function that the layer's curves are the fit to, as long as they are as they started."""
    function = layer._init.function(layer._grid())
    if function is None:  # random starts draw numbers
        return None
    start = layer._initial_values(layer.num_parameters)
    if start is None:
        return None
    alpha, gamma = start
    pairs = [(layer.alpha, alpha), (layer.bandwidths(), gamma)]
    if layer.dictionary is not None:
        pairs.append((layer.dictionary, layer._grid()))
    return function if all(_close(*pair) for pair in pairs) else None


def _close(stored: Tensor, start: Tensor) -> bool:
    """Whether a parameter is where it started, but for rounding, on another machine too."""
    slack = max(1e-5, 2 * torch.finfo(stored.dtype).eps) * start.abs().max()
    return bool(((stored.detach().to(**_F64) - start).abs() <= slack).all())


def _plan(of: LayerInputs, quantile: float, function: Target | None) -> _Plan:
    layer = of.layer
    if not of.finite:
        raise ValueError(f"inputs of {of.name} are not finite; see where the model makes the first NaN or infinity")
    boundary = of.quantile(quantile)
    if math.isinf(boundary):
        raise ValueError(f"inputs of {of.name} are beyond 2^20 where the quantile {quantile:g} is; normalise them")
    if boundary == edges()[1][len(edges()[1]) // 2]:  # all are next to 0, which is no range
        boundary = layer.boundary
    alpha, gamma, points = (t.detach().to(**_F64) for t in (layer.alpha, layer.bandwidths(), layer.points()))
    if function is not None:  # as they were before they were rounded
        gamma, points = layer._start_gamma.expand(len(alpha)), layer._grid()[None]
    reach = torch.full((1,), layer.boundary, **_F64)
    if layer.dictionary is not None:
        reach = torch.where(points.any(1), points.abs().amax(1), reach)
    stretch = boundary / reach
    new_gamma, new_points = gamma / stretch**2, points / reach[:, None] * boundary

    x, share = _samples(of, max(layer.boundary, boundary, reach.max().item()))
    parts = []
    for rows in torch.arange(len(alpha)).split(_AT_ONCE):
        wanted = None
        design = _kernels(layer, new_gamma[rows], _rows(new_points, rows), x)
        if function is None:
            wanted = _curve(_kernels(layer, gamma[rows], _rows(points, rows), x), alpha[rows])
            new = alpha[rows] if (stretch == 1).all() else _fit(design, share[rows], wanted)
        else:
            init = layer._init.for_dictionary(new_points[0], layer._grid())
            new = init(new_points[0], new_gamma[rows])
            wanted = (function(x.clone()) - bases.value(layer._fused_base, x)).expand(len(rows), -1)
        inside = share[rows, : x.shape[0] - _EVEN]
        parts.append((new, (inside * (_curve(design, new) - wanted)[:, : inside.shape[1]] ** 2).sum()))
    error = torch.stack([square for _, square in parts]).sum() / of.total.gt(0).sum().cpu()
    return _Plan(
        layer,
        boundary,
        torch.cat([new for new, _ in parts]),
        new_gamma,
        new_points,
        error.sqrt().item(),
        function is not None,
    )


def _samples(of: LayerInputs, reach: float) -> tuple[Tensor, Tensor]:  # [M], [C, M]
    """Return places, and the share of each channel's inputs that is there, with a little of it spread evenly."""
    used = of.counts.any(0)
    begins, stops = (edge[used] for edge in edges())
    middles = (begins.clamp(min=-(2.0**20)) + stops.clamp(max=2.0**20)) / 2
    even = torch.linspace(-1.25 * reach, 1.25 * reach, _EVEN, **_F64)
    share = of.counts[:, used] / of.total.cpu().clamp(min=1)[:, None]
    return torch.cat([middles, even]), torch.cat([share, share.new_full((len(share), _EVEN), _SPREAD / _EVEN)], 1)


def _kernels(layer: KAF, gamma: Tensor, points: Tensor, x: Tensor) -> Tensor:  # [c], [c or 1, D], [M] -> [c, M, D]
    return kernels.value(layer.kernel, gamma.sqrt()[:, None, None] * (x[:, None] - points[:, None]))


def _rows(points: Tensor, rows: Tensor) -> Tensor:
    return points if len(points) == 1 else points[rows]


def _curve(design: Tensor, alpha: Tensor) -> Tensor:  # [c, M, D], [c, D] -> [c, M]
    return (design @ alpha[:, :, None]).squeeze(2)


def _fit(design: Tensor, share: Tensor, wanted: Tensor) -> Tensor:  # [c, M, D], [c, M], [c, M] -> [c, D]
    weighted = design * share[:, :, None]
    system = weighted.mT @ design + _RIDGE * torch.eye(design.shape[2], **_F64)
    return torch.linalg.solve(system, weighted.mT @ wanted[:, :, None]).squeeze(2)


def _report(of: LayerInputs, plan: _Plan) -> Calibration:
    layer, total = plan.layer, of.total.cpu()
    if plan.layer.dictionary is None or layer.dictionary_size == 1:
        high = torch.tensor([plan.boundary], **_F64)
        low = -high
    else:
        low, high = plan.points.aminmax(dim=1)
    outside = of.count_outside(low, high)
    return Calibration(
        (layer.boundary, plan.boundary),
        (of.share, (outside.sum() / total.sum()).item()),
        (outside / total.clamp(min=1)).max().item(),
        plan.error,
        plan.restarted,
    )
