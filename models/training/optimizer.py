"""Which parameter decays and how fast it learns."""

from typing import Any

import torch
from torch import nn

from models.training.recipe import Recipe

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return SGD over the groups of `parameter_groups`; each group's `scale` is a factor of the learning rate."""
    groups = parameter_groups(model, recipe.weight_decay, recipe.decay, recipe.activation_lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)


def parameter_groups(
    model: nn.Module, weight_decay: float, decay: str = "weights", activation_lr: float = 1.0
) -> list[dict[str, Any]]:
    """Split parameters into weights, norms and biases, and activation parameters.

    Weights of convolutions and linear layers decay, of linear layers alone with decay="linear". The rest does only with
    decay="all": decay would pull learned curves towards 0. Activation parameters are those of no convolution, linear
    layer or norm.
    """
    weights: dict[nn.Parameter, None] = {}
    rest: dict[nn.Parameter, None] = {}
    activations: dict[nn.Parameter, None] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                decays = name == "weight" and (decay != "linear" or isinstance(module, nn.Linear))
                (weights if decays else rest)[parameter] = None
            elif isinstance(module, _NORMS):
                rest[parameter] = None
            else:
                activations[parameter] = None
    other = weight_decay if decay == "all" else 0.0
    groups = [
        {"name": "weights", "params": list(weights), "weight_decay": weight_decay, "scale": 1.0},
        {"name": "norms and biases", "params": list(rest), "weight_decay": other, "scale": 1.0},
        {"name": "activations", "params": list(activations), "weight_decay": other, "scale": activation_lr},
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group its multiple of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
