"""What goes into the KAF layers of a model, counted while it runs.

A channel's inputs are counted in bins of which sixteen make an octave, from 2^-12 to 2^20 on either side of 0. So they
need neither a second look nor a range to be known, and a bin's edge is a short number: 7, 7.25, 7.5, 7.75, 8, 8.5.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kafops.channels import tensors
from kafops.modules import KAF
from kafops.sites import compiled_functions_in_eager, unchanged

__all__ = ["LayerInputs", "ends", "kaf_layers", "look", "observed"]

_FIRST, _LAST, _PART = -12, 20, 16  # the octaves' exponents, and the bins in each
_HALF = (_LAST - _FIRST) * _PART + 1  # bins on either side of 0, of which one has all below 2^_FIRST
_BITS = 23 - _PART.bit_length() + 1  # of a float32 that do not matter


@dataclass(eq=False)
class LayerInputs:
    """The inputs of one layer; its rows are channels, or one where all share a curve.

    Attributes:
        name, layer: the layer.
        counts: [C, bins], float64, in the bins of `edges()`.
        outside: how many are not within the dictionary, NaN among them, [C].
        total: how many there are, [C].
        finite: whether all are.
    """

    name: str
    layer: KAF
    counts: Tensor
    outside: Tensor
    total: Tensor
    finite: bool = True

    @classmethod
    def none(cls, name: str, layer: KAF) -> "LayerInputs":
        """Return the inputs of a layer that was not called yet."""
        rows, device = layer.alpha.shape[0], layer.alpha.device
        counts = torch.zeros(rows, 2 * _HALF, dtype=torch.float64, device="cpu")
        return cls(name, layer, counts, *torch.zeros(2, rows, dtype=torch.int64, device=device))

    @property
    def called(self) -> bool:
        """Whether there were any."""
        return bool(self.total.any())

    @property
    def share(self) -> float:
        """The share of the inputs that is not within the dictionary."""
        return self.outside.sum().item() / self.total.sum().item()

    @property
    def shares(self) -> Tensor:  # [C], float64
        """That share in each channel."""
        return self.outside.double().cpu() / self.total.double().cpu()

    def add(self, x: Tensor) -> None:
        """Count what the layer is given."""
        rows = len(self.total)
        x = x.detach()
        values = (x.reshape(1, -1) if rows == 1 else x.movedim(self.layer.channel_dim, 0).reshape(rows, -1)).float()
        low, high = (end[:, None].to(values) for end in ends(self.layer))
        inside = ((values >= low) & (values <= high)).sum(1)
        self.total += values.shape[1]
        self.outside += values.shape[1] - inside
        self.finite &= bool(values.isfinite().all())
        size = (values.abs().nan_to_num().view(torch.int32) >> _BITS) - ((127 + _FIRST) * _PART - 1)
        size = size.clamp(0, _HALF - 1)
        bins = torch.where(values < 0, _HALF - 1 - size, _HALF + size)
        bins += 2 * _HALF * torch.arange(rows, dtype=bins.dtype, device=bins.device)[:, None]
        self.counts += torch.bincount(bins.flatten(), minlength=self.counts.numel()).view_as(self.counts).cpu()

    def quantile(self, share: float) -> float:
        """Return the least edge that at least this share of all sizes |x| lies below: infinite above 2^20."""
        counts = self.counts.sum(0)
        sizes = counts[_HALF:] + counts[:_HALF].flip(0)
        enough = sizes.cumsum(0) >= share * sizes.sum()
        return edges()[1][_HALF:][enough][0].item()

    def count_outside(self, low: Tensor, high: Tensor) -> Tensor:  # [C], [C] -> [C], float64
        """Return how many inputs are not in [low, high]; of a bin that an end cuts, all."""
        begins, stops = edges()
        outside = (begins < low[:, None]) | (stops > high[:, None])
        return (self.counts * outside).sum(1)


@cache
def edges() -> tuple[Tensor, Tensor]:  # [bins], [bins], float64
    """Return where the bins begin and end, ascending."""
    octaves = 2.0 ** torch.arange(_FIRST, _LAST, dtype=torch.float64, device="cpu")[:, None]
    parts = octaves * (1 + torch.arange(_PART, dtype=torch.float64, device="cpu") / _PART)
    begins = torch.cat([parts.new_zeros(1), parts.flatten()])
    stops = torch.cat([begins[1:], begins.new_full((1,), torch.inf)])
    return torch.cat([-stops.flip(0), begins]), torch.cat([-begins.flip(0), stops])


def ends(layer: KAF) -> tuple[Tensor, Tensor]:  # [C] or [1] each
    """Return where the dictionary of each channel begins and ends."""
    if layer.dictionary is None or layer.dictionary_size == 1:
        end = torch.tensor([layer.boundary], dtype=torch.float64, device="cpu")
        return -end, end
    low, high = layer.dictionary.detach().aminmax(dim=1)
    return low, high


def kaf_layers(model: nn.Module) -> dict[str, KAF]:
    """Return the KAF layers of a model, or the one that it is, by name.

    Raises:
        TypeError: model is not a module.
        ValueError: it has no KAF layer, or one that is lazy and has no size yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    layers = {name or type(m).__name__: m for name, m in model.named_modules() if isinstance(m, KAF)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no KAF layer; kafops.replace_activations puts them into a model that is there"
        )
    lazy = [name for name, layer in layers.items() if is_lazy(layer.alpha)]
    if lazy:
        raise ValueError(f"{lazy[0]} has no size yet; run the model once on an input before")
    return layers


@contextmanager
def observed(layers: Mapping[str, KAF]) -> Iterator[dict[str, LayerInputs]]:
    """Within the block, count what the layers are given."""
    seen = {name: LayerInputs.none(name, layer) for name, layer in layers.items()}
    with _hooks(seen.values(), {}):
        yield seen


def look(model: nn.Module, inputs: Any, instead: Mapping[KAF, Any] | None = None) -> dict[str, LayerInputs]:
    """Run a model on inputs, in eval mode and without gradients, and count what its KAF layers are given.

    The model stays as it was, in all that `sites.unchanged` brings back.

    Args:
        model: a model with KAF layers.
        inputs: a batch or batches, as for `kafops.calibrate`.
        instead: functions to compute in the place of layers meanwhile.

    Raises:
        TypeError, ValueError: as `kaf_layers`; inputs are no batches, there is none, or the model fails on one.
    """
    seen = {name: LayerInputs.none(name, layer) for name, layer in kaf_layers(model).items()}
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    number = 0
    with unchanged(model), torch.no_grad(), compiled_functions_in_eager(), _hooks(seen.values(), instead or {}):
        for number, batch in enumerate(_batches(inputs), 1):
            args, kwargs = _arguments(batch, device)
            try:
                model(*args, **kwargs)
            except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as e:
                if isinstance(e, torch.OutOfMemoryError):
                    raise
                raise ValueError(
                    f"the model fails on batch {number}, {_described(batch)}: {type(e).__name__}: {e}\na batch must be "
                    "a tensor, a tuple or list whose first element is the model's input, or a mapping of the "
                    "arguments of its forward by name; a tuple or list given as inputs is one of batches"
                ) from e
    if not number:
        raise ValueError("inputs hold no batch: a loader that is empty, or an iterator that was read to its end")
    return seen


@contextmanager
def _hooks(seen: Iterable[LayerInputs], instead: Mapping[KAF, Any]) -> Iterator[None]:
    def hook(of: LayerInputs) -> Any:
        def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
            x = args[0] if args else kwargs["x"]
            of.add(x)
            return _value(instead[of.layer], x) if of.layer in instead else None

        return see

    handles = [of.layer.register_forward_hook(hook(of), with_kwargs=True) for of in seen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _value(function: Any, x: Tensor) -> Tensor:
    if isinstance(function, nn.Module):  # copied for float64, on the CPU
        return function(x.to("cpu", torch.float64)).to(x)
    return function(x.clone()).to(x)


def _batches(inputs: Any) -> Iterable[Any]:
    if isinstance(inputs, (Tensor, Mapping)):
        return [inputs]
    if isinstance(inputs, (str, bytes)) or not hasattr(inputs, "__iter__"):
        raise TypeError(
            f"inputs must be a batch (a tensor, or a mapping of arguments by name) or an iterable of batches, such as "
            f"a DataLoader or a list, got {type(inputs).__name__}"
        )
    return inputs


def _arguments(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what to call a model with, on its device: of a tuple or list the first element, as loaders have labels."""
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError(f"a batch must not be an empty {type(batch).__name__}")
        batch = batch[0]
    batch = _moved(batch, device)
    return ((), dict(batch)) if isinstance(batch, Mapping) else ((batch,), {})


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: _moved(v, device) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(v, device) for v in value)
    return value


def _described(batch: Any) -> str:
    kind = type(batch).__name__
    shapes = ", ".join(f"{list(t.shape)} {t.dtype}".replace("torch.", "") for t in tensors(batch))
    return f"a {kind} with {shapes}" if shapes else f"a {kind}"
