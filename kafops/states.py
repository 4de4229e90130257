"""States for converted networks: of calibrated ones, from before the conversion, of the authors' own layer."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kafops.modules import KAF

__all__ = ["Loaded", "load_state_dict"]


class Loaded(NamedTuple):
    """What became of a state_dict; `str()` says it in words.

    Attributes:
        missing_keys, unexpected_keys: what state or model lacks, as `nn.Module.load_state_dict` returns it, without the
            keys of the layers in without_curves.
        without_curves: names of the KAF layers of which the state has nothing; they are as they were.
        boundaries: of the layers that took theirs from the state, by name, before and after.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]
    without_curves: list[str]
    boundaries: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        lines = []
        if self.without_curves:
            lines.append(
                f"the state_dict has no curves, as one from before a conversion; these stay as they were: "
                f"{_some(self.without_curves)}"
            )
        if self.boundaries:
            changed = (f"{name} ({before:g} → {after:g})" for name, (before, after) in self.boundaries.items())
            lines.append(f"boundaries taken from the state_dict: {_some(changed)}")
        lines += _mismatches(self.missing_keys, self.unexpected_keys)
        return "\n".join(lines) or "all keys match"


def load_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
) -> Loaded:
    """Load a state_dict into a model with KAF layers, as `model.load_state_dict` does, and these besides:

    - one of a calibrated network into one freshly made: each layer takes its boundary from the state, which
      `model.load_state_dict` refuses, since the same coefficients on another range are another curve;
    - one from before the conversion, which has no curves: all the rest is loaded, and the curves stay as they are;
    - one of the authors' own layer (ispamm/kernel-activation-functions, PyTorch), into layers of the same names: its
      alpha [1, C, 1, 1, D] or [1, C, D] becomes [C, D], and boundary and γ are those of its `dict` and `gamma`.

    Args:
        model: any module.
        state_dict: names to tensors; is not changed.
        strict: raise where a key is missing or unexpected, but for curves that are all missing.
        assign: as in `nn.Module.load_state_dict`.

    Returns:
        A `Loaded`; `print` it.

    Raises:
        TypeError: model is not a module, or state_dict no mapping.
        ValueError: kernel or base of a layer are not those of the state; the authors' layer has another kernel than the
            Gaussian, or points that are not even.
        RuntimeError: shapes differ, or keys are missing or unexpected where strict. As with
            `nn.Module.load_state_dict`, what fits is loaded then.

    Example:
        >>> model = torchvision.models.resnet18()
        >>> report = kafops.replace_activations(model, kafops.KAF, example_input=images, base="same")
        >>> torch.save(model.state_dict(), "calibrated.pt")
        >>> loaded = kafops.load_state_dict(model, torch.load("calibrated.pt"))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict must be a mapping of names to tensors, as model.state_dict() is, got "
            f"{type(state_dict).__name__}"
        )
    state: OrderedDict[str, Any] = OrderedDict(state_dict)
    if hasattr(state_dict, "_metadata"):
        state._metadata = state_dict._metadata  # type: ignore[attr-defined]
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, KAF)}
    for name, layer in layers.items():
        _translate(state, _prefix(name), layer)
    without = [name for name in layers if not any(key.startswith(_prefix(name)) for key in state)]
    if len(without) < len(layers) and strict:
        without = []  # of some layers there is nothing, so that is no state from before
    before = {name: layer.boundary for name, layer in layers.items()}
    with _taking_boundaries(layers.values()):
        missing, unexpected = model.load_state_dict(state, strict=False, assign=assign)
    expected = tuple(map(_prefix, without))
    missing = [key for key in missing if not (expected and key.startswith(expected))]
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"the state_dict does not fit {type(model).__name__}:\n" + "\n".join(_mismatches(missing, unexpected))
        )
    moved = {name: (before[name], m.boundary) for name, m in layers.items() if m.boundary != before[name]}
    return Loaded(missing, list(unexpected), without, moved)


def _prefix(name: str) -> str:
    return name + "." if name else ""


@contextmanager
def _taking_boundaries(layers: Iterable[KAF]) -> Iterator[None]:
    layers = list(layers)
    for layer in layers:
        layer._takes_boundary = True
    try:
        yield
    finally:
        for layer in layers:
            layer._takes_boundary = False


def _translate(state: dict[str, Any], prefix: str, layer: KAF) -> None:
    """Put what the authors' layer has in a state into our words."""
    alpha = state.get(prefix + "alpha")
    if not isinstance(alpha, Tensor) or alpha.dim() not in (3, 5) or prefix + "dict" not in state:
        return
    where = f"{prefix}dict in the state_dict, of the authors' own layer,"
    channels, size = alpha.shape[1], alpha.shape[-1]
    stored, gamma = state.pop(prefix + "dict"), state.pop(prefix + "gamma", None)
    points = stored.double().reshape(-1, size)
    boundary = float(f"{points.abs().max().item():.6g}")
    if layer.dictionary is not None:
        state[prefix + "dictionary"] = points.expand(channels, size)
    elif not torch.allclose(
        points,
        torch.linspace(-boundary, boundary, size, dtype=torch.float64, device=points.device),
        atol=1e-5 * boundary,
        rtol=0,
    ):
        raise ValueError(f"{where} must be even on [-b, b], or the layer have learn_dictionary=True; got {points}")
    if gamma is None and stored.dim() > 1:
        raise ValueError(f"{where} comes without gamma, so its kernel is not the Gaussian, which alone can be loaded")
    if gamma is None:  # of 2017, when it was no part of the state
        gamma = ((size - 1) / (2 * boundary)) ** 2 / torch.tensor([8.0], dtype=torch.float64)
    gamma = gamma.double().flatten()
    if not torch.allclose(gamma, gamma[0], rtol=1e-5, atol=0):
        raise ValueError(f"{prefix}gamma in the state_dict must be one value for all points, got {gamma.tolist()}")
    state[prefix + "alpha"] = alpha.reshape(channels, size)
    learned = layer.log_gamma is not None
    state[prefix + ("log_gamma" if learned else "gamma")] = (gamma[0].log() if learned else gamma[0]).expand(channels)
    state[prefix + "curve"] = torch.tensor([boundary, 0, 0], dtype=torch.float64)


def _mismatches(missing: list[str], unexpected: list[str]) -> list[str]:
    kinds = (("missing in the state_dict", missing), ("not in the model", unexpected))
    return [f"{what}: {_some(keys)}" for what, keys in kinds if keys]


def _some(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
