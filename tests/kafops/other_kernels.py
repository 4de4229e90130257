"""Kernels other than the Gaussian: their formulas written down again, and both functions with either dictionary."""

import math
from collections.abc import Callable

import pytest
import torch
from forms import BOUNDARY
from torch import Tensor

import kafops

F32, F64 = torch.float32, torch.float64
KERNELS = ("rational_quadratic", "matern32", "bspline")
KNOT = math.sqrt(1.5)  # distance of a B-spline's knots, in u

of_kernels = pytest.mark.parametrize("kernel", KERNELS)


def definition(kernel: str, u: Tensor) -> Tensor:
    """κ(u), in an order of operations whose derivatives by PyTorch are right, up to the second."""
    away = torch.where(u < 0, -u, u)
    if kernel == "rational_quadratic":
        return 1 / (1 + u * u)
    if kernel == "matern32":
        return (1 + math.sqrt(2) * away) * torch.exp(-math.sqrt(2) * away)
    w = away / KNOT
    return ((2 - w).clamp(min=0) ** 3 - 4 * (1 - w).clamp(min=0) ** 3) / 4


def curve(kernel: str) -> Callable[..., Tensor]:
    """The function under test: (x, alpha, gamma[, dictionary]) -> y."""

    def f(x: Tensor, alpha: Tensor, gamma: Tensor, dictionary: Tensor | None = None) -> Tensor:
        if dictionary is None:
            return kafops.kaf(x, alpha, gamma, BOUNDARY, kernel=kernel)
        return kafops.kaf_free(x, alpha, gamma, dictionary, kernel=kernel)

    return f


def defined(kernel: str) -> Callable[..., Tensor]:
    """The same from the formula above, for finite x."""

    def f(x: Tensor, alpha: Tensor, gamma: Tensor, dictionary: Tensor | None = None) -> Tensor:
        if dictionary is None:
            even = torch.linspace(-BOUNDARY, BOUNDARY, alpha.shape[1], dtype=F64)
            dictionary = (even if len(even) > 1 else 0 * even).unsqueeze(0)
        ones = (1,) * (x.dim() - 2)
        alpha, dictionary, root = (
            p[0] if x.dim() < 2 else p.reshape(p.shape[0], *ones, p.shape[1])
            for p in (alpha, dictionary, gamma.sqrt().unsqueeze(1))
        )
        return (alpha * definition(kernel, root * (x.unsqueeze(-1) - dictionary))).sum(-1)

    return f
