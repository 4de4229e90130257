"""What an optimizer should know: which parameters are curves, and that these want no weight decay."""

import math
import numbers
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from kafops.modules import KAF

__all__ = ["curve_parameters", "param_groups"]


def curve_parameters(model: nn.Module) -> list[Parameter]:
    """Return the parameters of all KAF layers in a model: coefficients, learned points and bandwidths, each once.

    Args:
        model: any module, converted or built with KAFs, wrapped or not.

    Raises:
        TypeError: model is not a module.
        ValueError: a layer is lazy and has no parameters yet.

    Example:
        >>> norm = torch.nn.utils.clip_grad_norm_(kafops.curve_parameters(model), 1.0)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    found = {p: None for m in model.modules() if isinstance(m, KAF) for p in m.parameters()}
    _check_known(model)
    return list(found)


def param_groups(
    model: nn.Module, weight_decay: float = 0.0, lr: float | None = None, curve_lr: float | None = None
) -> list[dict[str, Any]]:
    """Return the parameters of a model as groups for an optimizer of torch.optim, curves without weight decay.

    Decay pulls coefficients, and so whole curves, to 0, points to the middle of the dictionary and γ to 1. As with
    `nn.PReLU`, no optimizer can tell: rules that go by shape take alpha [C, D] for a weight matrix and decay it (timm,
    Hugging Face's Trainer) or orthogonalise it (Muon).

    Args:
        model: any module. Each of its parameters is in one group, once, also where modules share it.
        weight_decay: of all parameters that are no curves.
        lr: learning rate of these; None leaves it to the optimizer.
        curve_lr: learning rate of the curves; None stands for lr.

    Returns:
        Two groups, dicts with "params", "weight_decay" and, where given, "lr": all but curves, then curves. A group
        without parameters is left out.

    Raises:
        TypeError: model is not a module, or a number is none.
        ValueError: a number is negative or not finite, or a layer is lazy and has no parameters yet.

    Example:
        >>> optimizer = torch.optim.AdamW(kafops.param_groups(model, weight_decay=0.05), lr=1e-3)
    """
    for name, value in (("weight_decay", weight_decay), ("lr", lr), ("curve_lr", curve_lr)):
        if value is None and name != "weight_decay":
            continue
        if isinstance(value, bool) or not isinstance(value, (numbers.Real, Tensor)):
            raise TypeError(f"{name} must be a number ≥ 0, got {type(value).__name__} {value!r}")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number ≥ 0, got {value}")
    curves = curve_parameters(model)
    inside = set(curves)
    rates = (lr, lr if curve_lr is None else curve_lr)
    groups = (([p for p in model.parameters() if p not in inside], weight_decay), (curves, 0.0))
    return [
        {"params": parameters, "weight_decay": decay} | ({} if rate is None else {"lr": rate})
        for (parameters, decay), rate in zip(groups, rates, strict=True)
        if parameters
    ]


def _check_known(model: nn.Module) -> None:
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise ValueError(f"{lazy} has no size yet; run the model once on an input before you make an optimizer for it")
