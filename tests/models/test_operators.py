"""Operator norms against the singular values of matrices that are built in full."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from models.certified import operators
from models.certified.operators import convolution_norm, matrix_norm, pooling_overlap

# Bounds are above the norm by what rounding may do, which is far below this part of it.
ROUNDING = 1e-9


def kernel(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense_norm(
    weight: torch.Tensor, size: tuple[int, int], stride: int, padding: int, dilation: int, groups: int
) -> float:
    inputs = weight.shape[1] * groups
    units = torch.eye(inputs * size[0] * size[1], dtype=torch.float64).view(-1, inputs, *size)
    matrix = F.conv2d(units, weight, None, stride, padding, dilation, groups).flatten(1)
    return torch.linalg.svdvals(matrix)[0].item()


def bound(
    weight: torch.Tensor, size: tuple[int, int], stride: int, padding: int, dilation: int, groups: int, exact: int
) -> float:
    return convolution_norm(weight, size, (stride,) * 2, ((padding,) * 2,) * 2, (dilation,) * 2, groups, exact)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 3), (20, 20), (1, 30)])
def test_a_matrix_norm_is_its_largest_singular_value(shape: tuple[int, int]) -> None:
    matrix = kernel(*shape)
    true = torch.linalg.svdvals(matrix)[0].item()
    assert true <= matrix_norm(matrix) <= true * (1 + ROUNDING)
    assert matrix_norm(matrix * 0) == 0
    assert matrix_norm(matrix[:0]) == 0


CASES = [
    (size, k, stride, padding, dilation, groups)
    for size, k, stride, padding, dilation, groups in itertools.product(
        [(4, 4), (7, 5), (9, 9)], (1, 2, 3, 5), (1, 2, 3), (0, 1, 2), (1, 2), (1, 2)
    )
    if dilation * (k - 1) + 1 <= min(size) and padding < k
]


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_of_every_form(groups: int) -> None:
    """The bound is never below the norm, and by the torus hardly ever twice as high.

    The largest factors are of 5 × 5 kernels with dilation on maps of 9 × 9 positions, which are mostly edge.
    """
    factors = []
    for number, (size, k, stride, padding, dilation, g) in enumerate(CASES):
        if g != groups:
            continue
        weight = kernel(4, 2 // groups, k, k, seed=number)
        case = size, stride, padding, dilation, groups
        true = dense_norm(weight, *case)
        assert true <= bound(weight, *case, exact=10**6) <= true * (1 + ROUNDING), (k, *case)
        enclosed = bound(weight, *case, exact=0)
        assert enclosed >= true, (k, *case)
        factors.append(enclosed / true)
    values = torch.tensor(factors)
    assert values.max() < 2.5
    assert values.median() < 1.1


def test_on_large_maps_the_torus_loses_little() -> None:
    """Power iteration on the convolution itself comes from below."""
    weight = kernel(8, 8, 3, 3)
    x = kernel(1, 8, 24, 24)
    for _ in range(300):
        y = F.conv2d(x, weight, padding=1)
        x = F.conv_transpose2d(y, weight, padding=1)
        x /= x.norm()
    found = F.conv2d(x, weight, padding=1).norm().item()
    assert found <= bound(weight, (24, 24), 1, 1, 1, 1, exact=0) <= 1.02 * found


def test_a_twisted_torus_is_exact_for_a_mean_of_three() -> None:
    """By hand: the matrix with 1/3 on three diagonals has the largest eigenvalue (1 + 2 cos(π / (n + 1))) / 3."""
    for n in (3, 8, 21):
        weight = torch.full((1, 1, 3), 1 / 3, dtype=torch.float64)
        true = (1 + 2 * torch.cos(torch.tensor(torch.pi / (n + 1), dtype=torch.float64)).item()) / 3
        found = convolution_norm(weight, (n,), (1,), ((1, 1),), (1,), exact=0)
        assert found == pytest.approx(true, rel=ROUNDING)


def test_uneven_padding_and_three_dimensions() -> None:
    weight = kernel(2, 2, 2, 2, 2)
    units = torch.eye(2 * 27, dtype=torch.float64).view(-1, 2, 3, 3, 3)
    matrix = F.conv3d(F.pad(units, (0, 1, 0, 1, 0, 1)), weight).flatten(1)
    true = torch.linalg.svdvals(matrix)[0].item()
    arguments = (3, 3, 3), (1, 1, 1), ((0, 1),) * 3, (1, 1, 1)
    assert convolution_norm(weight, *arguments) == pytest.approx(true, rel=ROUNDING)
    assert true <= convolution_norm(weight, *arguments, exact=0) <= 2 * true


def test_a_delta_has_norm_one() -> None:
    """A kernel that moves the map by a position keeps every vector, or loses part of it at an edge."""
    for place, stride in itertools.product(itertools.product(range(3), repeat=2), (1, 2)):
        weight = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
        weight[(0, 0, *place)] = 1
        for exact in (0, 1024):
            assert bound(weight, (6, 6), stride, 1, 1, 1, exact) == pytest.approx(1, rel=ROUNDING)


@pytest.mark.parametrize(("channels", "tori"), [(80, 4), (128, 1)])
def test_large_blocks_have_to_do_with_one_torus(channels: int, tori: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(operators, "_torus_norm", lambda *arguments: seen.append(arguments[-1]) or 1.0)
    bound(kernel(channels, channels, 3, 3), (4, 4), 1, 1, 1, 1, exact=0)
    assert len(seen) == tori


def test_no_matrix_is_made_of_too_many_unit_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """One output of 90 × 90 inputs: a row, but 8,100² entries of unit vectors."""
    monkeypatch.setattr(operators, "_matrix", lambda *arguments: pytest.fail("made a matrix"))
    weight = kernel(1, 1, 90, 90)
    true = weight.norm().item()
    assert true <= convolution_norm(weight, (90, 90), (90, 90), ((0, 0),) * 2, (1, 1)) <= true * (1 + ROUNDING)


@pytest.mark.parametrize(
    ("pooling", "windows"), [((2, 2, 1), 1), ((3, 2, 1), 2), ((3, 1, 1), 3), ((2, 3, 1), 1), ((2, 1, 3), 2)]
)
def test_windows_of_a_pooling_that_share_a_value(pooling: tuple[int, int, int], windows: int) -> None:
    k, s, d = pooling
    assert pooling_overlap((k,), (s,), (d,)) == windows
    assert pooling_overlap((k, k), (s, s), (d, d)) == windows**2
