"""Operator norms, from above: how much a linear map of a network can stretch a vector, in L2.

**A matrix.** σ² is the largest eigenvalue of A Aᵀ. Rounding moves it by no more than 4 (n + 10 m + 10) ε ‖A‖_F² for an
m × n matrix: products of n terms and an eigenvalue solver that is backward stable with p(m) = 10 m, twice over for
complex numbers and twice for safety. That is added.

**A convolution** padded with zeros, on maps of n positions a side, is a matrix of its own. Where that is large, it is
enclosed in something simpler. Put the map on a torus of N ≥ n + p positions a side, zeros elsewhere, N a multiple of
the stride s: the kernel on the torus finds in the zeros what it found in the padding, so the convolution is that of
the torus, restricted in input and output, and has no larger a norm. On the torus, translation splits the matrix into
one of C_out × s² C_in for each frequency φ = (2πk + θ) / (N/s),

    S(φ)[o, (i, r)] = Σ_j w[o, i, j] e^{i φ a(j)},        j − p = s a(j) + r(j),  0 ≤ r < s,

whose largest singular value over all k is the torus's norm (Sedghi, Gupta, Long 2019, for stride 1). A phase θ that a
value gains on its way round the torus changes nothing, since only zeros go round; so any θ gives a bound, and the least
over θ ∈ {0, π} for each dimension is taken (θ = π alone for 128 × 128 channels of a group and more).
For a three-point mean in one dimension that is exact.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

EXACT = 1024
"""A convolution is made a matrix where that has no more rows, or no more columns."""
_ENTRIES = 2**24  # of such a matrix, and of the unit vectors that it is made from
_CHUNK = 2**22  # entries of symbols in memory at once
_LARGE = 128**2  # entries of a block, from which on one torus has to do
_EPS = torch.finfo(torch.float64).eps
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def matrix_norm(matrix: Tensor) -> float:
    """Return no less than the largest singular value of a matrix [m, n] in float64, hardly more."""
    return _largest(matrix[None]).item() if matrix.numel() else 0.0


def convolution_norm(
    weight: Tensor,  # [outputs, inputs / groups, *kernel], float64
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int = 1,
    exact: int = EXACT,
) -> float:
    """Return no less than the operator norm of a convolution padded with zeros, L2 to L2.

    Args:
        weight: its kernel.
        size: of the maps it is applied to, in each dimension.
        stride, padding, dilation: for each dimension; padding before and behind.
        groups: of channels.
        exact: make it a matrix where that has at most so many rows, or columns; 0 for never.

    Returns:
        For a matrix the norm itself, but for rounding; else the least bound of several tori.

    Example:
        >>> convolution_norm(torch.ones(1, 1, 3, 3).double() / 9, (8, 8), (1, 1), ((1, 1), (1, 1)), (1, 1))
        0.9212...
    """
    before = [p for p, _ in padding]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    places = [(n + sum(p) - r) // s + 1 for n, p, r, s in zip(size, padding, reach, stride, strict=True)]
    inputs, outputs = weight.shape[1] * groups * math.prod(size), weight.shape[0] * math.prod(places)
    if min(inputs, outputs) <= exact and inputs * max(inputs, outputs) <= _ENTRIES:  # unit vectors count too
        return matrix_norm(_matrix(weight, size, stride, padding, dilation, groups))
    torus = [-(-(n + max(p)) // s) for n, p, s in zip(size, padding, stride, strict=True)]  # coarse positions a side
    kernel = weight.unflatten(0, (groups, -1))  # [groups, outputs / groups, inputs / groups, *kernel]
    twists = list(itertools.product((0, 1), repeat=len(torus)))
    if kernel.shape[1] * kernel.shape[2] >= _LARGE:
        twists = twists[-1:]
    return min(_torus_norm(kernel, torus, stride, before, dilation, twist) for twist in twists)


def pooling_overlap(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> int:
    """Return how many windows of a pooling a value can be in."""
    reaches = zip(kernel, stride, dilation, strict=True)
    return math.prod(min(k, -(-(d * (k - 1) + 1) // s)) for k, s, d in reaches)


def _largest(matrices: Tensor) -> Tensor:  # [B, m, n] -> [B]
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mH
    m, n = matrices.shape[1:]
    largest = torch.linalg.eigvalsh(matrices @ matrices.mH)[:, -1]
    squares = matrices.abs().square().sum((1, 2))
    return (largest + 4 * (n + 10 * m + 10) * _EPS * squares).clamp(min=0).sqrt() * (1 + 4 * _EPS)


def _matrix(
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:  # [inputs, outputs]
    """Apply the convolution to each unit vector."""
    inputs = weight.shape[1] * groups
    units = torch.eye(inputs * math.prod(size), dtype=weight.dtype).view(-1, inputs, *size)
    units = F.pad(units, [p for sides in reversed(padding) for p in sides])
    convolve = _CONVOLUTIONS[len(size)]
    return convolve(units, weight, None, tuple(stride), 0, tuple(dilation), groups).flatten(1)


def _torus_norm(
    kernel: Tensor,  # [G, O, I, *kernel]
    torus: Sequence[int],
    stride: Sequence[int],
    before: Sequence[int],
    dilation: Sequence[int],
    twist: Sequence[int],
) -> float:
    taps = list(itertools.product(*(range(k) for k in kernel.shape[3:])))
    shifts = [[d * j - p for d, j, p in zip(dilation, tap, before, strict=True)] for tap in taps]
    coarse = [tuple(shift // s for shift, s in zip(place, stride, strict=True)) for place in shifts]
    phases = [tuple(shift % s for shift, s in zip(place, stride, strict=True)) for place in shifts]
    by_phase = [[i for i, phase in enumerate(phases) if phase == one] for one in sorted(set(phases))]
    values = kernel.flatten(3)  # [G, O, I, taps]
    numbers = _numbers(torus, twist)
    if all(len(chosen) == 1 for chosen in by_phase):
        numbers = numbers[:1]  # one tap in each block: frequencies only turn its phase
    groups, outputs, inputs, _ = values.shape
    size = max(1, _CHUNK // (groups * outputs * inputs * len(by_phase)))
    largest = 0.0
    for part in numbers.split(size):
        blocks = []
        for chosen in by_phase:
            waves = _waves(part, torch.tensor([coarse[i] for i in chosen]), torus)  # [frequencies, taps]
            block = values[..., chosen].to(torch.complex128).reshape(-1, len(chosen)) @ waves.T
            blocks.append(block.T.reshape(-1, outputs, inputs))
        largest = max(largest, _largest(torch.cat(blocks, 2)).max().item())
    # Each entry of a block is a sum of at most so many terms, with waves exact to a few ε.
    terms = max(len(chosen) for chosen in by_phase)
    spread = torch.stack([values[..., chosen].abs().sum(3) for chosen in by_phase]).square().sum((0, 2, 3)).amax()
    return largest + (terms + 16) * _EPS * math.sqrt(spread.item())


def _numbers(torus: Sequence[int], twist: Sequence[int]) -> Tensor:  # [frequencies, dimensions]
    """Return 2 k + twist for one of each pair of opposite frequencies, whose blocks are conjugates of each other."""
    ranges = [torch.arange(m) * 2 + t for m, t in zip(torus, twist, strict=True)]
    ranges[0] = ranges[0][ranges[0] <= torus[0]]
    return torch.cartesian_prod(*ranges).reshape(-1, len(torus))


def _waves(numbers: Tensor, places: Tensor, torus: Sequence[int]) -> Tensor:  # [F, R], [T, R] -> [F, T]
    """Return exp(i π Σ numbers · places / torus); whole turns are taken off in whole numbers."""
    angle = torch.zeros(len(numbers), len(places), dtype=torch.float64)
    for r, m in enumerate(torus):
        angle += math.pi * (torch.outer(numbers[:, r], places[:, r]) % (2 * m)).double() / m
    return torch.polar(torch.ones_like(angle), angle)
