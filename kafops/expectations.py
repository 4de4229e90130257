"""Moments of a dictionary's kernels, and of bases, for x ~ N(0, 1) by quadrature, where there is no closed form.

Composite Gauss-Legendre rules in float64, whose panels end at every kink of a kernel or base and grow with the distance
from a kernel's middle, so that each panel sees an analytic function whose poles are far off: exact to about 1e-13.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kafops import bases, kernels

_F64: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
_END = 10.0  # of the integration: 2e-23 of the normal distribution lie beyond
_WIDEST = 0.25  # panel, for the normal density
_NODES = 16  # of each panel
_AT_ONCE = 4096  # nodes whose kernel values are held


def moments(
    dictionary: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:  # [C, D], [C, D, D], [C, D, D]
    """Return E[k_i], E[k_i k_j] and E[k_i′ k_j′] of the kernels k_i(x) = κ(√γ (x - δ_i)) for x ~ N(0, 1).

    Args:
        dictionary, gamma: float64 on the CPU. Channels with the same values are computed once.
        kernel: a name in `kafops.kernels.KERNELS`.
    """
    distinct, channel = _distinct(dictionary, gamma)
    size = dictionary.shape[1]
    results = (torch.zeros(len(distinct), *shape, **_F64) for shape in ((size,), (size, size), (size, size)))
    mean, second, slope = results
    for i, (g, *points) in enumerate(distinct.tolist()):
        for _, weight, values, slopes in _kernels(points, g, kernel):
            mean[i] += weight @ values
            second[i] += values.T @ (weight[:, None] * values)
            slope[i] += slopes.T @ (weight[:, None] * slopes)
    return mean[channel], second[channel], slope[channel]


class OfBase(NamedTuple):
    """Moments of a base b, and its mixed ones with the kernels k_i of a dictionary, for x ~ N(0, 1).

    Attributes:
        mean, second, slope: E[b], E[b²] and E[b′²], [C], all equal.
        with_values, with_slopes: E[b k_i] and E[b′ k_i′], [C, D].
    """

    mean: Tensor
    second: Tensor
    slope: Tensor
    with_values: Tensor
    with_slopes: Tensor


def of_base(
    base: str,
    dictionary: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    kernel: str,
) -> OfBase:
    """Return the moments of a base and its mixed ones with a dictionary's kernels.

    Args:
        base: a name in `kafops.bases.BASES`.
        dictionary, gamma, kernel: as for `moments`.
    """
    distinct, channel = _distinct(dictionary, gamma)
    mean, second, slope = torch.zeros(3, len(distinct), **_F64)
    with_values, with_slopes = torch.zeros(2, len(distinct), dictionary.shape[1], **_F64)
    for i, (g, *points) in enumerate(distinct.tolist()):
        for x, weight, values, slopes in _kernels(points, g, kernel, base):
            b, steep = bases.value(base, x), bases.value(base, x, 1)
            mean[i] += weight @ b
            second[i] += weight @ b.square()
            slope[i] += weight @ steep.square()
            with_values[i] += (weight * b) @ values
            with_slopes[i] += (weight * steep) @ slopes
    return OfBase(mean[channel], second[channel], slope[channel], with_values[channel], with_slopes[channel])


def _distinct(dictionary: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Return the different rows of gamma and points, and which of them each channel has."""
    rows = torch.broadcast_shapes(dictionary.shape[:1], gamma.shape)[0]
    both = torch.cat([gamma.reshape(-1, 1).expand(rows, 1), dictionary.expand(rows, -1)], 1)
    distinct, channel = both.unique(dim=0, return_inverse=True)
    return distinct, channel


def _kernels(
    points: list[float], gamma: float, kernel: str, base: str | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield some nodes [M] at a time, their weights [M], and values and slopes [M, D] of the kernels there."""
    delta, root = torch.tensor(points, **_F64), math.sqrt(gamma)
    for x, weight in _rule(delta, gamma, kernel, base):
        u = root * (x[:, None] - delta)
        yield x, weight, kernels.value(kernel, u), root * kernels.value(kernel, u, 1)


def _rule(delta: Tensor, gamma: float, kernel: str, base: str | None = None) -> list[tuple[Tensor, Tensor]]:
    """Nodes, and their weights times the normal density, some at a time."""
    width = 1 / math.sqrt(gamma)
    steps = max(0, math.ceil(math.log2(2 * _END / (width / 4)))) if width < 8 * _END else 0
    around = width / 4 * 2.0 ** torch.arange(steps + 1, **_F64)
    kinks = width * torch.tensor(kernels.named(kernel).kinks, **_F64)
    near = (delta[:, None] + torch.cat([kinks, around, -around])).flatten()
    beneath = bases.named(base)
    if beneath is not None:
        near = torch.cat([near, torch.tensor(beneath.kinks, **_F64)])
    even = torch.linspace(-_END, _END, round(2 * _END / _WIDEST) + 1, **_F64)
    edges = torch.cat([even, near.clamp(-_END, _END)]).unique()
    at, share = _gauss_legendre(_NODES)
    middle, half = (edges[1:] + edges[:-1])[:, None] / 2, edges.diff()[:, None] / 2
    x = (middle + half * at).flatten()
    weight = (half * share).flatten() * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return list(zip(x.split(_AT_ONCE), weight.split(_AT_ONCE), strict=True))


def _gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Nodes on [-1, 1] and their weights, by the eigenvectors of the Jacobi matrix (Golub and Welsch, 1969)."""
    k = torch.arange(1, n, **_F64)
    beside = k / (4 * k * k - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(beside.diag(1) + beside.diag(-1))
    return nodes, 2 * vectors[0] ** 2
