"""The two functions under one signature, each beside its reference, and arguments to call them on."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import kafops
from kafops import reference as definition

BOUNDARY = 2.0
NAMES = ("x", "alpha", "gamma", "dictionary")

forms = pytest.mark.parametrize("free", [False, True], ids=["kaf", "kaf_free"])


def kaf(x: Tensor, alpha: Tensor, gamma: Tensor, dictionary: Tensor | None = None) -> Tensor:
    if dictionary is None:
        return kafops.kaf(x, alpha, gamma, BOUNDARY)
    return kafops.kaf_free(x, alpha, gamma, dictionary)


def reference(x: Tensor, alpha: Tensor, gamma: Tensor, dictionary: Tensor | None = None) -> Tensor:
    if dictionary is None:
        return definition.kaf(x, alpha, gamma, BOUNDARY)
    return definition.kaf_free(x, alpha, gamma, dictionary)


def make_arguments(
    free: bool,
    shape: tuple[int, ...] = (4, 3),
    size: int = 5,
    shared: bool = False,
    batch: Sequence[int | None] = (None,) * 4,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = True,
) -> tuple[Tensor, ...]:
    """Draw x, alpha, gamma and, if free, dictionary; with a further first dimension where `batch` gives a size."""
    draw = torch.Generator().manual_seed(0)
    rows = 1 if shared else shape[1]
    tensors = []
    for name, own, b in zip(NAMES, (shape, (rows, size), (rows,), (rows, size)), batch, strict=False):
        full = own if b is None else (b, *own)
        t = torch.randn(full, generator=draw, dtype=torch.float64)
        tensors.append((t.sigmoid() + 0.5 if name == "gamma" else t).to(dtype).requires_grad_(requires_grad))
    return tuple(tensors[: 4 if free else 3])


def assert_equal_to_rounding(got, want) -> None:
    """Compare float64 values of order 1 that come from sums of some dozens of terms."""
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
