"""Moments of a dictionary's kernels for x ~ N(0, 1) by quadrature, for kernels that have no closed form.

Composite Gauss-Legendre rules in float64, whose panels end at every kink of a kernel and grow with the distance from
its middle, so that each panel sees an analytic function whose poles are far off: exact to about 1e-13.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kafops import kernels

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
    rows = torch.broadcast_shapes(dictionary.shape[:1], gamma.shape)[0]
    both = torch.cat([gamma.reshape(-1, 1).expand(rows, 1), dictionary.expand(rows, -1)], 1)
    distinct, channel = both.unique(dim=0, return_inverse=True)
    size = dictionary.shape[1]
    results = (torch.zeros(len(distinct), *shape, **_F64) for shape in ((size,), (size, size), (size, size)))
    mean, second, slope = results
    for i, (g, *points) in enumerate(distinct.tolist()):
        delta = torch.tensor(points, **_F64)
        for x, weight in _rule(delta, g, kernel):
            u = math.sqrt(g) * (x[:, None] - delta)
            values, slopes = kernels.value(kernel, u), math.sqrt(g) * kernels.value(kernel, u, 1)
            mean[i] += weight @ values
            second[i] += values.T @ (weight[:, None] * values)
            slope[i] += slopes.T @ (weight[:, None] * slopes)
    return mean[channel], second[channel], slope[channel]


def _rule(delta: Tensor, gamma: float, kernel: str) -> list[tuple[Tensor, Tensor]]:
    """Nodes, and their weights times the normal density, some at a time."""
    width = 1 / math.sqrt(gamma)
    steps = max(0, math.ceil(math.log2(2 * _END / (width / 4)))) if width < 8 * _END else 0
    around = width / 4 * 2.0 ** torch.arange(steps + 1, **_F64)
    kinks = width * torch.tensor(kernels.named(kernel).kinks, **_F64)
    near = (delta[:, None] + torch.cat([kinks, around, -around])).flatten()
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
