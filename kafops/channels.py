"""Which dimension of a tensor holds its channels: told by what made it, and followed through what moves dimensions."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["ChannelDims", "from_the_end", "tensors"]

_SPATIAL_DIMS = {
    F.conv1d: 1,
    F.conv2d: 2,
    F.conv3d: 3,
    F.conv_transpose1d: 1,
    F.conv_transpose2d: 2,
    F.conv_transpose3d: 3,
}
_LAST = {F.linear, F.bilinear, F.embedding, torch.addmm, Tensor.addmm, F.multi_head_attention_forward}
_LAST |= {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
_SECOND = {F.batch_norm, F.group_norm, F.instance_norm}
_LAST_DIMS_NORMS = {F.layer_norm, F.rms_norm}


def _named(*names: str) -> set[Any]:
    return {getattr(holder, name) for holder in (torch, Tensor) for name in names if hasattr(holder, name)}


_PRODUCTS = _named("matmul", "mm", "bmm", "__matmul__")
_UNTOLD = _named("einsum", "tensordot")
_MOVING = _named(
    "permute", "transpose", "transpose_", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "reshape", "view",
    "flatten", "unflatten", "reshape_as", "view_as", "squeeze", "unsqueeze", "__getitem__", "select", "narrow", "roll",
    "flip", "unbind", "unfold", "expand", "expand_as", "repeat", "tile", "broadcast_to",
) | {Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]  # fmt: skip


class ChannelDims:
    """The channel dimensions of the tensors that a model makes while it runs.

    Of attention's heads [N, heads, L, channels of a head] the channels have two dimensions, until they are one again.
    """

    def __init__(self) -> None:
        self._dims = WeakTensorKeyDictionary()

    def take_inputs(self, values: Any) -> None:
        """Take a model's inputs to be as PyTorch has them, [N, C, H, W] and [N, C, D, H, W]; of [*, *, *] who knows."""
        for x in tensors(values):
            if x.dim() > 3:
                self._dims[x] = (1,)

    def of(self, x: Tensor) -> int | None:
        """Return the dimension, from 0 on: the last of vectors and matrices of which nothing is known."""
        known = self._dims.get(x, ())
        if len(known) == 1:
            return known[0]
        return x.dim() - 1 if not known and x.dim() in (1, 2) else None

    def follow(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """Note what is known of a function's output."""
        if func in _MOVING and args and isinstance(args[0], Tensor):
            moved = _moved(self._dims.get(args[0], ()), func, args, kwargs)
            for y, dims in zip(tensors(out), moved, strict=False):
                self._dims[y] = dims
        else:
            for y in tensors(out):
                self._dims[y] = self._of_output(func, args, kwargs, y)

    def _of_output(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor
    ) -> tuple[int, ...]:
        last = out.dim() - 1
        if func in _SPATIAL_DIMS:
            return (last - _SPATIAL_DIMS[func],)
        if func in _LAST:
            return (last,)
        if func in _SECOND:
            return (1,)
        operands = list(tensors((*args, *kwargs.values())))
        if func in _PRODUCTS or func is F.scaled_dot_product_attention:
            return self._of_product(operands[0], operands[1 if func in _PRODUCTS else 2], out)
        if func in _UNTOLD:
            return ()
        known = {self._dims.get(t) for t in operands if t.dim() == out.dim()} - {None, ()}
        if func in _LAST_DIMS_NORMS and not known:
            normalized = args[1] if len(args) > 1 else kwargs["normalized_shape"]
            return (last,) if len(normalized) == 1 else ()
        return known.pop() if len(known) == 1 else ()

    def _of_product(self, left: Tensor, right: Tensor, out: Tensor) -> tuple[int, ...]:
        """Of a product with a matrix of weights the last; of others what is not summed over, of the one that tells."""
        rank = out.dim()
        if right.dim() == 2:
            return (rank - 1,)
        of_left, of_right = self._dims.get(left, ()), self._dims.get(right, ())
        of_left = of_left if left.dim() == rank and rank - 1 not in of_left else ()
        of_right = of_right if right.dim() == rank and rank - 2 not in of_right else ()
        return of_left or of_right if not (of_left and of_right) else ()


def from_the_end(dim: int, rank: int) -> int:
    """Return the dimension as a layer is told it: 1, or counted from the end, so that a batch before it is no matter.

    Raises:
        ValueError: there is no such dimension.
    """
    if not -rank <= dim < rank:
        raise ValueError(f"{dim} is no dimension of an input of {rank}")
    dim %= rank
    return 1 if dim == 1 else dim - rank


def tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, mappings and the like, in their order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for v in values.values():
            yield from tensors(v)
    elif isinstance(values, (tuple, list)):
        for v in values:
            yield from tensors(v)


def _moved(
    dims: tuple[int, ...], func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[tuple[int, ...]]:
    """Where a function that moves, merges or cuts dimensions puts the channels: seen on a tensor of their numbers."""
    if not dims:
        return []
    shape = args[0].shape
    sizes = [n if d in dims else 1 for d, n in enumerate(shape)]
    numbers = torch.arange(math.prod(sizes), device="cpu").view(sizes).expand(shape)
    try:
        with torch.device("cpu"):
            out = func(numbers, *args[1:], **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError):  # as with indices on another device
        return []
    return [_varying(y) for y in tensors(out)]


def _varying(numbers: Tensor) -> tuple[int, ...]:
    """Return the dimensions along which numbers vary, where none comes twice in them."""
    dims = []
    for dim in range(numbers.dim()):
        first = numbers.narrow(dim, 0, min(1, numbers.shape[dim]))
        if torch.equal(first.expand_as(numbers), numbers):
            numbers = first
        else:
            dims.append(dim)
    return tuple(dims) if len(numbers.unique()) == numbers.numel() else ()
