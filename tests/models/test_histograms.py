import math

import numpy as np
import pytest
import scipy.stats
import torch

from models.histograms import Histogram, NotFinite, wasserstein


def rows(seed: int, *scales: float, count: int = 5000) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.stack([scale * torch.randn(count, generator=g) + 0.3 * scale for scale in scales])


def histogram(values: torch.Tensor, *cuts: int, bins: int = 2048) -> Histogram:
    found = Histogram(len(values), bins)
    for part in values.tensor_split(cuts, 1):
        found.add(part)
    return found


def test_counts_are_numpys() -> None:
    values = rows(0, 1.0, 1e-3, 40.0)
    found = histogram(values)
    for row, counts, width in zip(values.double().numpy(), found.counts, found.width.tolist(), strict=True):
        reach = np.abs(row).max()
        assert math.log2(width) == round(math.log2(width))
        assert reach * 2 / 2048 < width <= reach * 4 / 2048
        edges = width * np.arange(-1024, 1025)
        assert counts.tolist() == np.histogram(row, edges)[0].tolist()


def test_edges_belong_to_the_bin_above_by_hand() -> None:
    found = histogram(torch.tensor([[-1.0, -0.5, -0.0, 0.0, 0.25, 0.5, 1.0, 1.0]]), bins=8)
    assert found.width.tolist() == [0.5]  # 1.0 itself must fit, so the bins reach from -2 to 2
    assert found.counts.tolist() == [[0, 0, 1, 1, 3, 1, 2, 0]]
    found.add(torch.tensor([[-7.9]]))  # now bins of 2, from -8 to 8
    assert found.width.tolist() == [2.0]
    assert found.counts.tolist() == [[1, 0, 0, 2, 6, 0, 0, 0]]


@pytest.mark.parametrize("cuts", [(1,), (17, 18, 3000), tuple(range(100, 5000, 100))])
def test_batches_give_what_the_whole_gives(cuts: tuple[int, ...]) -> None:
    values = rows(1, 1.0, 5.0, 0.2)
    values[:, -1] *= 50  # the last value widens the bins of all that came before
    values[2] = 0
    whole, parts = histogram(values), histogram(values, *cuts)
    assert torch.equal(whole.counts, parts.counts)
    assert torch.equal(whole.exponent, parts.exponent)


def test_work_in_chunks_is_no_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    values = rows(2, 1.0, 2.0)
    whole = histogram(values)
    monkeypatch.setattr("models.histograms._CHUNK", 100)
    assert torch.equal(histogram(values).counts, whole.counts)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (rows(3, 1.0, 1.0), rows(4, 1.0, 2.0)),
        (rows(5, 1.0, 0.0), rows(5, 1.0, 1.0)),  # equal ones; all in one point against spread out
        (rows(6, 1.0), 30 * rows(7, 1.0)),  # other widths
        (torch.relu(rows(8, 1.0)), torch.relu(rows(9, 1.0, count=700))),  # other counts, many zeros
    ],
)
def test_wasserstein_is_scipys_within_a_bin(a: torch.Tensor, b: torch.Tensor) -> None:
    left, right = histogram(a), histogram(b)
    widths = torch.maximum(left.width, right.width)
    for x, y, found, width in zip(a.numpy(), b.numpy(), wasserstein(left, right), widths.tolist(), strict=True):
        assert abs(found.item() - scipy.stats.wasserstein_distance(x, y)) <= width


def test_wasserstein_by_hand() -> None:
    a, b = histogram(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), bins=8), histogram(torch.tensor([[1.0, 1.0]]), bins=8)
    assert wasserstein(a, b).item() == 0.75  # three quarters of the mass go from 0 to 1
    assert wasserstein(a, a).item() == 0


@pytest.mark.parametrize("share", [0.001, 0.25, 0.5, 0.999, 1.0])
def test_quantiles_are_at_most_a_bin_beyond_the_values(share: float) -> None:
    values = rows(10, 1.0, 3.0)
    found = histogram(values)
    exact = values.sort(1).values[:, math.ceil(share * 5000) - 1].double()
    assert ((found.upper(share) - exact > 0) & (found.upper(share) - exact <= found.width)).all()
    mirrored = -(-values).sort(1).values[:, math.ceil(share * 5000) - 1].double()
    assert ((mirrored - found.lower(share) >= 0) & (mirrored - found.lower(share) <= found.width)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_are_counted_as_they_are(dtype: torch.dtype) -> None:
    values = rows(11, 1.0).to(dtype)
    assert torch.equal(histogram(values).counts, histogram(values.double()).counts)


def test_huge_and_tiny_values() -> None:
    found = histogram(torch.tensor([[3e38, -3e38, 0.0], [1e-40, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    assert found.counts.sum(1).tolist() == [3, 3, 3]
    assert found.width.isfinite().all()
    assert found.counts[2, 1024] == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_nothing_counted(value: float) -> None:
    found = histogram(torch.zeros(2, 3))
    with pytest.raises(NotFinite, match="1 of 4 values are not finite"):
        found.add(torch.tensor([[1.0, value], [0.0, 0.0]]))
    assert found.counts.sum() == 6


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        Histogram(0)
    with pytest.raises(ValueError, match="bins must be a power of two, at least 2, got 100"):
        Histogram(1, 100)
    with pytest.raises(ValueError, match=r"values must be of shape \[2, n\], got \[3, 4\]"):
        Histogram(2).add(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="an empty row has no quantiles"):
        Histogram(1).upper(0.5)
    with pytest.raises(ValueError, match="share must be above 0, at most 1, got 0"):
        Histogram(1).upper(0)
    with pytest.raises(ValueError, match="an empty row has no distance"):
        wasserstein(Histogram(1), Histogram(1))
    with pytest.raises(ValueError, match=r"must be alike, got counts \[1, 2048\] and \[2, 2048\]"):
        wasserstein(Histogram(1), Histogram(2))
    with pytest.raises(ValueError, match="exponent must not be below"):
        histogram(torch.ones(1, 1)).widened(torch.tensor([-50]))
