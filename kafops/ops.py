"""The operators: schemas, fake kernels, autograd formulas and vmap rules. Kernels are registered by the backends.

One family serves both dictionaries: with `dictionary` given its points are used, without it D points evenly spaced on
[-boundary, boundary]. Gradients that `needs` does not ask for come back as empty tensors of shape [0].
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Needs:
    """Which gradients an operator shall compute: a sum of these bits, plain ints because an IntFlag is slow."""

    X = 1
    ALPHA = 2
    GAMMA = 4
    DICTIONARY = 8
    GRAD = 16


_library = torch.library.Library("kafops", "DEF")
_ARGUMENTS = "Tensor x, Tensor alpha, Tensor gamma, Tensor? dictionary, float boundary"
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(f"kaf({_ARGUMENTS}) -> Tensor", tags=_TAGS)
_library.define(f"kaf_backward(Tensor grad, {_ARGUMENTS}, int needs) -> (Tensor, Tensor, Tensor, Tensor)", tags=_TAGS)
_library.define(
    "kaf_double_backward(Tensor? grad_x, Tensor? grad_alpha, Tensor? grad_gamma, Tensor? grad_dictionary, "
    f"Tensor grad, {_ARGUMENTS}, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)

kaf = torch.ops.kafops.kaf.default
kaf_backward = torch.ops.kafops.kaf_backward.default
kaf_double_backward = torch.ops.kafops.kaf_double_backward.default


@torch.library.register_fake("kafops::kaf")
def _kaf_fake(x: Tensor, alpha: Tensor, gamma: Tensor, dictionary: Tensor | None, boundary: float) -> Tensor:
    _check_devices(x, alpha, gamma, dictionary)
    return torch.empty_like(x)


@torch.library.register_fake("kafops::kaf_backward")
def _kaf_backward_fake(
    grad: Tensor, x: Tensor, alpha: Tensor, gamma: Tensor, dictionary: Tensor | None, boundary: float, needs: int
) -> tuple[Tensor, ...]:
    _check_devices(grad, x, alpha, gamma, dictionary)
    return _fake_gradients((Needs.X, Needs.ALPHA, Needs.GAMMA, Needs.DICTIONARY), (x, alpha, gamma, dictionary), needs)


@torch.library.register_fake("kafops::kaf_double_backward")
def _kaf_double_backward_fake(
    grad_x: Tensor | None,
    grad_alpha: Tensor | None,
    grad_gamma: Tensor | None,
    grad_dictionary: Tensor | None,
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    dictionary: Tensor | None,
    boundary: float,
    needs: int,
) -> tuple[Tensor, ...]:
    _check_devices(grad_x, grad_alpha, grad_gamma, grad_dictionary, grad, x, alpha, gamma, dictionary)
    # The gradient of grad has the layout of x, which the loops run over.
    flags = (Needs.GRAD, Needs.X, Needs.ALPHA, Needs.GAMMA, Needs.DICTIONARY)
    return _fake_gradients(flags, (x, x, alpha, gamma, dictionary), needs)


def _check_devices(*tensors: Tensor | None) -> None:
    """Raise unless all tensors are on one device: a single meta tensor brings a whole call here."""
    devices = {t.device for t in tensors if t is not None}
    torch._check(len(devices) == 1, lambda: f"kafops takes tensors on one device, got {sorted(map(str, devices))}")


def _fake_gradients(flags: Sequence[int], inputs: Sequence[Tensor | None], needs: int) -> tuple[Tensor, ...]:
    x = inputs[0]
    assert x is not None
    gradients = []
    for flag, t in zip(flags, inputs, strict=True):
        if t is None or not needs & flag:
            gradients.append(x.new_empty(0))
        elif flag in (Needs.X, Needs.GRAD):
            gradients.append(torch.empty_like(t))
        else:
            gradients.append(t.new_empty(t.shape))  # contiguous whatever the strides of the parameter
    return tuple(gradients)


class _Fold:
    """Folds a vmapped call into one plain call: the samples of the batch become further channels.

    Every sample and channel gets its own row of each parameter, so that each sample has its own gradients.
    """

    def __init__(self, batch: int, x: Tensor, dim: int | None) -> None:
        """Take the batch size, x and the dimension of x that is mapped over."""
        self.batch = batch
        self.shape = x.shape if dim is None else x.movedim(dim, 0).shape[1:]  # of x in one sample
        self.channels = self.shape[1] if len(self.shape) > 1 else 1

    def _samples(self, t: Tensor, dim: int | None) -> Tensor:  # [B, ...]
        return t.movedim(dim, 0) if dim is not None else t.unsqueeze(0).expand(self.batch, *t.shape)

    def data(self, t: Tensor | None, dim: int | None) -> Tensor | None:  # [N, B * C, *]
        if t is None:
            return None
        t = self._samples(t, dim)
        if len(self.shape) < 2:
            return t.reshape(1, self.batch, self.shape.numel())
        return t.movedim(0, 1).flatten(1, 2)

    def rows(self, p: Tensor | None, dim: int | None) -> Tensor | None:  # [B * C, ...]
        if p is None:
            return None
        p = self._samples(p, dim)
        return p.expand(self.batch, self.channels, *p.shape[2:]).flatten(0, 1)

    def unfold_data(self, t: Tensor) -> Tensor:  # [B, N, C, *]
        if len(self.shape) < 2:
            return t.reshape(self.batch, *self.shape)
        return t.unflatten(1, (self.batch, self.channels)).movedim(1, 0)

    def unfold_rows(self, t: Tensor, p: Tensor, dim: int | None) -> Tensor:  # [B, C or 1, ...]
        t = t.unflatten(0, (self.batch, self.channels))
        return t.sum(1, keepdim=True) if p.shape[0 if dim is None or dim > 0 else 1] == 1 else t

    def gradients(self, outputs: Sequence[Tensor], inputs: Sequence[Any], dims: Sequence[Any], needs: int) -> Any:
        """Unfold the gradients of (grad,) x, alpha, gamma, dictionary; those not asked for stay empty."""
        flags = (Needs.GRAD, Needs.X, Needs.ALPHA, Needs.GAMMA, Needs.DICTIONARY)[-len(outputs) :]
        unfolded, unfolded_dims = [], []
        for flag, t, p, dim in zip(flags, outputs, inputs, dims, strict=True):
            asked = bool(needs & flag) and p is not None
            if asked:
                t = self.unfold_data(t) if flag in (Needs.GRAD, Needs.X) else self.unfold_rows(t, p, dim)
            unfolded.append(t)
            unfolded_dims.append(0 if asked else None)
        return tuple(unfolded), tuple(unfolded_dims)


@torch.library.register_vmap("kafops::kaf")
def _kaf_vmap(info: Any, dims: Any, x: Tensor, *arguments: Any) -> Any:
    *parameters, boundary = arguments
    if all(d is None for d in dims[1:]) and dims[0] is not None and x.dim() > 2:
        samples = x.movedim(dims[0], 0)
        return kaf(samples.flatten(0, 1), *arguments).unflatten(0, samples.shape[:2]), 0
    fold = _Fold(info.batch_size, x, dims[0])
    rows = (fold.rows(p, d) for p, d in zip(parameters, dims[1:4], strict=True))
    return fold.unfold_data(kaf(fold.data(x, dims[0]), *rows, boundary)), 0


@torch.library.register_vmap("kafops::kaf_backward")
def _kaf_backward_vmap(info: Any, dims: Any, grad: Tensor, *arguments: Any) -> Any:
    *tensors, boundary, needs = arguments
    x, *parameters = tensors
    fold = _Fold(info.batch_size, x, dims[1])
    rows = (fold.rows(p, d) for p, d in zip(parameters, dims[2:5], strict=True))
    outputs = kaf_backward(fold.data(grad, dims[0]), fold.data(x, dims[1]), *rows, boundary, needs)
    return fold.gradients(outputs, tensors, dims[1:5], needs)


@torch.library.register_vmap("kafops::kaf_double_backward")
def _kaf_double_backward_vmap(info: Any, dims: Any, *arguments: Any) -> Any:
    *tensors, boundary, needs = arguments
    x = tensors[5]
    fold = _Fold(info.batch_size, x, dims[5])
    folds = (fold.data, fold.rows, fold.rows, fold.rows, fold.data, fold.data, fold.rows, fold.rows, fold.rows)
    folded = (f(t, d) for f, t, d in zip(folds, tensors, dims[:9], strict=True))
    outputs = kaf_double_backward(*folded, boundary, needs)
    return fold.gradients(outputs, tensors[4:], dims[4:9], needs)
