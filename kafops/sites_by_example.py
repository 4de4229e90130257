"""Find the uses of activation modules by a forward pass on an example."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from kafops.sites import Findings, Use, describe_caller, functional_forms, is_activation, unchanged

_SPATIAL_DIMS = {
    F.conv1d: 1,
    F.conv2d: 2,
    F.conv3d: 3,
    F.conv_transpose1d: 1,
    F.conv_transpose2d: 2,
    F.conv_transpose3d: 3,
}
_CHANNELS_LAST = {F.linear, F.bilinear, F.embedding, F.scaled_dot_product_attention}
_CHANNELS_SECOND = {F.batch_norm, F.group_norm, F.instance_norm}
_LAST_DIMS_NORMS = {F.layer_norm, F.rms_norm}
_REORDERING = {
    getattr(holder, name)
    for holder in (torch, Tensor)
    for name in ("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "transpose_")
    if hasattr(holder, name)
} | {
    Tensor.T.__get__,  # type: ignore[attr-defined]
    Tensor.mT.__get__,  # type: ignore[attr-defined]
}
_RESHAPING = {
    getattr(holder, name)
    for holder in (torch, Tensor)
    for name in ("reshape", "view", "flatten", "unflatten", "reshape_as", "view_as", "einsum", "tensordot")
    if hasattr(holder, name)
}


def find_uses(
    model: nn.Module,
    sites: Mapping[nn.Module, list[str]],
    targets: tuple[type[nn.Module], ...],
    example_input: Any,
) -> Findings:
    """Run the model on the example, in eval mode and without gradients, and record what each site is given.

    Which dimension holds the channels is followed from the layers that define it (convolution, linear, norms) through
    the operations between, so that [N, L, C] is not mistaken for [N, C, L].
    """
    args, kwargs = _arguments(example_input)
    recorder = _Recorder(model, sites, targets)
    with unchanged(model), torch.no_grad(), _compiled_functions_in_eager(), recorder.hooks(model), recorder:
        model(*args, **kwargs)
    return recorder.findings


def _compiled_functions_in_eager() -> AbstractContextManager[Any]:
    """Let calls be seen inside functions decorated with torch.compile; where dynamo is not loaded, there are none."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split into positional and keyword arguments, cloning tensors, which an in-place model would change."""
    example_input = _cloned(example_input)
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    return (example_input if isinstance(example_input, tuple) else (example_input,)), {}


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {k: _cloned(v) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_cloned(v) for v in value)
    return value


class _Recorder(TorchFunctionMode):
    """Records the input of each site and every functional activation while a model runs."""

    def __init__(
        self, model: nn.Module, sites: Mapping[nn.Module, list[str]], targets: tuple[type[nn.Module], ...]
    ) -> None:
        super().__init__()
        self.findings = Findings()
        self._names = {m: name for name, m in model.named_modules()}
        self._sites = sites
        self._targets = targets
        self._functional = functional_forms(targets)
        self._running = [model]
        self._channel_dim = WeakTensorKeyDictionary()

    @contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        handles = []
        try:
            for m in model.modules():
                handles.append(m.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(m.register_forward_hook(self._leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module in self._sites:
            x = next(iter((*args, *kwargs.values())), None)
            self.findings.uses.append(self._use(module, x))
        self._running.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def _use(self, module: nn.Module, x: Any) -> Use:
        where = describe_caller(self._names[self._running[-1]])
        if not isinstance(x, Tensor):
            return Use(module, where, problem=f"gets a {type(x).__name__}, not a tensor")
        problem = _layout_problem(x, self._channel_dim.get(x))
        return Use(module, where, 0 if problem else x.shape[1], x.dim(), x.device, x.dtype, problem)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        running = self._running[-1]
        if func in self._functional and not is_activation(running, self._targets):
            self.findings.functional_calls.append(f"{func.__name__}() in {describe_caller(self._names[running])}")
        if isinstance(out, Tensor):
            self._channel_dim[out] = self._follow_channels(func, args, kwargs, out)
        return out

    def _follow_channels(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
    ) -> int | None:
        """Return the dimension of `out` that holds its channels, or None where that is not known."""
        if func in _SPATIAL_DIMS:
            return out.dim() - _SPATIAL_DIMS[func] - 1
        if func in _CHANNELS_LAST:
            return out.dim() - 1
        if func in _CHANNELS_SECOND:
            return 1
        if func in _RESHAPING:
            return None
        known = {self._channel_dim.get(t) for t in _tensors((*args, *kwargs.values())) if t.dim() == out.dim()} - {None}
        if len(known) > 1:
            return None
        dim = next(iter(known), None)
        if func in _LAST_DIMS_NORMS and dim is None:
            normalized = args[1] if len(args) > 1 else kwargs["normalized_shape"]
            return out.dim() - 1 if len(normalized) == 1 else None
        if func in _REORDERING and dim is not None:
            return _moved(dim, func, args, kwargs)
        return dim


def _tensors(values: tuple[Any, ...]) -> Iterator[Tensor]:
    for v in values:
        if isinstance(v, Tensor):
            yield v
        elif isinstance(v, (tuple, list)):
            yield from _tensors(tuple(v))


def _moved(dim: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Where a reordering of dimensions puts dimension `dim`, read off a tensor whose sizes all differ."""
    if not args or not isinstance(args[0], Tensor):
        return None
    sizes = torch.empty(*range(1, args[0].dim() + 1), device="meta")
    return list(func(sizes, *args[1:], **kwargs).shape).index(dim + 1)


def _layout_problem(x: Tensor, channel_dim: int | None) -> str:
    """Say why dimension 1 of x cannot be taken for its channels, or return an empty string."""
    shape = list(x.shape)
    if x.dim() < 2:
        return f"gets shape {shape}, where [N, C, *] is needed"
    if channel_dim is None and x.dim() == 3:
        return f"gets shape {shape}, of which it is not known whether it is [N, C, L] or [N, L, C]"
    if channel_dim not in (None, 1):
        return f"gets shape {shape} with its channels in dimension {channel_dim}, where [N, C, *] is needed"
    return ""
