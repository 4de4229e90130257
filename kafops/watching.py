"""Numbers about the curves of a model, for whoever logs them while it trains."""

from typing import Any

import torch
from torch import nn

from kafops.inputs import ends, kaf_layers, look
from kafops.modules import KAF
from kafops.plotting import plot

__all__ = ["watch"]

_POINTS = 201


def watch(model: nn.Module, inputs: Any = None, figure: bool = False) -> dict[str, Any]:
    """Return numbers about the curves of a model by name, to be logged after each epoch.

    Of each KAF layer, under "kaf/<name of the layer>/": `alpha`, the largest |α|; `slope`, the largest |f′| of its
    channels on the dictionary, seen on a grid (`KAF.bounds` certifies one); `gamma_min` and `gamma_max`, where γ is
    learned; and with inputs `outside`, the share of the layer's inputs outside the dictionary, and `outside_worst`,
    that of the channel where it is the largest. Under "kaf/" alone the largest `alpha`, `slope` and `outside` of all
    layers.

    Args:
        model: a model that has KAF layers; stays as it was. It runs in eval mode, where there are inputs.
        inputs: a batch or batches as for `kafops.calibrate`; None leaves out what is known of inputs.
        figure: also return "kaf/curves", the `Figure` that `kafops.plot` draws.

    Returns:
        Names to floats, and to a figure where asked for.

    Raises:
        TypeError, ValueError, ImportError: as `kafops.plot`.

    Example:
        Lightning, in a LightningModule; Trainer, in a TrainerCallback that was given it as an attribute (no callback
        has it of itself); TensorBoard; Weights & Biases:

        >>> def on_train_epoch_end(self):
        ...     self.log_dict(kafops.watch(self, self.example))
        >>> def on_epoch_end(self, args, state, control, model, **kwargs):
        ...     self.trainer.log(kafops.watch(model))
        >>> for name, value in kafops.watch(model, images).items():
        ...     writer.add_scalar(name, value, epoch)
        >>> wandb.log(kafops.watch(model, images, figure=True))
    """
    layers = kaf_layers(model)
    seen = {} if inputs is None else look(model, inputs)
    found: dict[str, Any] = {}
    for name, layer in layers.items():
        numbers = {"alpha": layer.alpha.detach().abs().max().item(), "slope": _steepest(layer)}
        if layer.log_gamma is not None:
            least, largest = layer.bandwidths().detach().aminmax()
            numbers |= {"gamma_min": least.item(), "gamma_max": largest.item()}
        of = seen.get(name)
        if of is not None and of.called:
            numbers["outside"] = of.share
            numbers["outside_worst"] = of.shares.max().item()
        found |= {f"kaf/{name}/{key}": value for key, value in numbers.items()}
    for key in ("alpha", "slope", "outside"):
        values = [value for name, value in found.items() if name.endswith("/" + key)]
        if values:
            found[f"kaf/{key}"] = torch.tensor(values, dtype=torch.float64).max().item()  # NaN, where one is
    if figure:
        found["kaf/curves"] = plot(model, inputs)
    return found


def _steepest(layer: KAF) -> float:
    """Return the largest |f′| on a grid over the dictionary."""
    low, high = (end.to(layer.alpha.device).double() for end in ends(layer))
    share = torch.linspace(0, 1, _POINTS, dtype=torch.float64, device=low.device)[:, None]
    grid = (low + share * (high - low)).expand(-1, layer.alpha.shape[0]).to(layer.bandwidths().dtype)
    with torch.inference_mode(False), torch.enable_grad():
        grid = grid.clone().requires_grad_()
        (slopes,) = torch.autograd.grad(layer.curves(grid).sum(), grid)
    return slopes.abs().max().item()
