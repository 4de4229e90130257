"""Image files in folders, decoded by worker processes."""

import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from source_checks import (
    check_arguments,
    check_format,
    check_ordered,
    check_shuffled,
    global_generators_untouched,
    rows,
    same,
)
from torchvision import transforms

from models.data import DataError, DataSet, load, pictures
from models.support import seeds

SIZE = 16
CLASSES = ("apple", "bee", "cat")


def make_files(root: Path) -> Path:
    generator = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 8)):
        for label, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                shape = (24 + i, 30 + label, 3) if i else (24, 30)  # one grey image in each class
                pixels = generator.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.{'png' if i % 2 else 'JPEG'}")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def own_root(tmp_path: Path) -> Path:
    return make_files(tmp_path)


def read(root: Path, seed: int = 0, workers: int = 0) -> DataSet:
    return load(f"imagenet:validation=9,size={SIZE},workers={workers}", seed, root)


@pytest.fixture(scope="module")
def with_workers(root: Path) -> DataSet:
    return read(root, workers=2)


def test_set_has_the_properties_of_sets(root: Path) -> None:
    data = read(root)
    assert (len(data.train), len(data.validation), len(data.test)) == (51, 9, 24)
    assert data.images.classes == 3
    check_format(data)
    check_shuffled(lambda seed: read(root, seed).train, batch_size=7)
    check_ordered(lambda seed: read(root, seed).test)
    check_arguments(data.test)


def test_parts_are_stratified_and_share_nothing(root: Path) -> None:
    data = read(root)
    parts = [source.tensors() for source in (data.train, data.validation, data.test)]
    assert [y.bincount().tolist() for _, y in parts] == [[17] * 3, [3] * 3, [8] * 3]
    assert len(set.union(*(rows(x) for x, _ in parts))) == 51 + 9 + 24


def test_folder_imagenet_is_looked_in_first(tmp_path: Path) -> None:
    make_files(tmp_path / "imagenet")
    (tmp_path / "train").mkdir()
    assert len(read(tmp_path).test) == 24


def test_test_images_are_the_middle_of_resized_ones(root: Path) -> None:
    paths = [root / "val" / name / "3.png" for name in CLASSES]
    plain = transforms.Compose([transforms.Resize(18), transforms.CenterCrop(SIZE), transforms.ToTensor()])
    x, y = read(root).test.tensors()
    for label, path in enumerate(paths):
        expected = plain(Image.open(path).convert("RGB"))
        assert any(torch.equal(image, expected) for image in x[y == label])


def test_training_images_are_random_resized_crops_seeded_by_epoch_and_image(root: Path) -> None:
    source = read(root, seed=5).train
    augment = transforms.Compose(
        [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    files = source.workers.decoding.read.__self__
    batches = list(source.shuffled(10, 2))
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    expected = set()
    for item in source.items.tolist():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.derived("augmentation", 5, 2, item))
            image = Image.open(root / files.names[item].decode()).convert("RGB")
            expected.add((augment(image).numpy().tobytes(), int(files.labels[item])))
    assert {(image.numpy().tobytes(), int(label)) for image, label in zip(x, y, strict=True)} == expected


def test_two_workers_yield_what_none_does(root: Path, with_workers: DataSet) -> None:
    none = read(root)
    for epoch in (0, 1):
        assert same(list(none.train.shuffled(8, epoch)), list(with_workers.train.shuffled(8, epoch)))
    assert same(list(none.train.shuffled(8, 1, 3)), list(with_workers.train.shuffled(8, 1, 3)))
    assert same([none.test.tensors()], [with_workers.test.tensors()])
    assert same([none.validation.tensors(5)], [with_workers.validation.tensors(5)])


def test_workers_leave_the_global_generators_alone(with_workers: DataSet) -> None:
    with global_generators_untouched():
        list(with_workers.train.shuffled(8, 0))


def test_iterations_at_the_same_time_or_left_do_not_disturb_each_other(root: Path, with_workers: DataSet) -> None:
    expected = list(read(root).train.shuffled(8, 0))
    outer, got = with_workers.train.shuffled(8, 0), []
    for batch in outer:
        got.append(batch)
        if len(got) == 2:
            next(with_workers.train.shuffled(8, 1))  # and leave it there
            assert len(list(with_workers.validation.ordered(4))) == 3
    assert same(got, expected)
    assert same(list(with_workers.train.shuffled(8, 0)), expected)


def test_workers_stay_from_epoch_to_epoch_and_outlive_ctrl_c(with_workers: DataSet) -> None:
    def processes() -> list[int]:
        return [w.pid for loader in with_workers.train.workers._idle for w in loader._iterator._workers]

    expected = list(with_workers.train.shuffled(8, 0))
    before = processes()
    assert os.getpid() not in before
    for process in before:
        os.kill(process, signal.SIGINT)
    assert same(list(with_workers.train.shuffled(8, 0)), expected)
    assert processes() == before


def test_a_batch_may_have_no_image_for_a_process(root: Path) -> None:
    source = read(root).train
    parts = [list(source.shuffled(50, 0, rank=rank, world=2)) for rank in (0, 1)]
    assert [len(y) for _, y in parts[0]] == [25, 1]
    assert [len(y) for _, y in parts[1]] == [25, 0]
    assert parts[1][1][0].shape == (0, 3, SIZE, SIZE)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(workers: int, own_root: Path) -> None:
    path = own_root / "train" / "bee" / "4.JPEG"
    path.write_bytes(path.read_bytes()[:400])
    data = read(own_root, workers=workers)
    threads = threading.active_count()
    with pytest.raises(DataError) as error:
        list(data.train.shuffled(8, 0))
    assert str(error.value).startswith(f"{path} cannot be read as an image: OSError")
    assert "Traceback" not in str(error.value)
    assert threading.active_count() == threads or workers
    assert len(list(data.test.ordered(8))) == 3  # the others can still be had


@pytest.mark.parametrize("content", [b"", b"GIF89a but no more", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_files_of_something_else_are_named(content: bytes, own_root: Path) -> None:
    path = own_root / "val" / "cat" / "1.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path} cannot be read as an image"):
        read(own_root).test.tensors()


def test_a_file_gone_since_it_was_listed_is_named(own_root: Path) -> None:
    data = read(own_root)
    (own_root / "val" / "cat" / "1.png").unlink()
    with pytest.raises(DataError, match=r"val/cat/1.png cannot be read: No such file"):
        data.test.tensors()


def test_folders_that_do_not_fit_are_explained(own_root: Path) -> None:
    (own_root / "val" / "cat").rename(own_root / "val" / "dog")
    with pytest.raises(DataError, match=r"must have the same classes, but only one has cat, dog"):
        read(own_root)
    (own_root / "train" / "empty").mkdir()
    with pytest.raises(DataError, match=r"train is not a folder of classes that each have images: .*empty"):
        read(own_root)
    (own_root / "train" / "empty").rmdir()
    (own_root / "val").rename(own_root / "test")
    with pytest.raises(DataError, match=r"val is not a folder of classes"):
        read(own_root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("validation=60", "validation of imagenet must be from 1 to 59, got 60"),
        ("size=0", "size of imagenet must be from 4 to 4096, got 0"),
        ("workers=-1", "workers of imagenet must be from 0 to 1024, got -1"),
        ("test=25", "test of imagenet must be from 1 to 24, got 25"),
    ],
)
def test_options_that_ask_for_what_there_is_not(options: str, message: str, root: Path) -> None:
    with pytest.raises(DataError, match=message):
        load(f"imagenet:{options}", 0, root)


@pytest.mark.parametrize(
    ("kind", "end", "scale"), [(np.uint8, "png", 257), (np.uint16, "png", 1), (np.uint16, "tiff", 1)]
)
def test_grey_images_keep_their_values_whatever_their_depth(kind: type, end: str, scale: int, tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
    path = tmp_path / f"ramp.{end}"
    Image.fromarray((ramp / scale).astype(kind)).save(path)
    pixels = np.asarray(pictures.decode(path.read_bytes(), "ramp"))
    assert pixels.shape == (32, 32, 3)
    np.testing.assert_allclose(pixels[..., 0], ramp / 257, atol=1)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_grey_images_without_a_range_are_refused(kind: type, own_root: Path) -> None:
    path = own_root / "val" / "cat" / "9.tiff"
    Image.fromarray(np.ones((30, 30), kind)).save(path)
    with pytest.raises(DataError, match=f"{path} cannot be read as an image: .*grey values of 32 bits"):
        read(own_root).test.tensors()


def test_names_that_begin_with_a_dot_are_no_classes_and_no_images(own_root: Path) -> None:
    before = read(own_root).test.tensors()
    for part in ("train", "val"):
        for hidden in (".ipynb_checkpoints", "bee/.thumbnails"):
            (own_root / part / hidden).mkdir()
            shutil.copy(own_root / part / "cat" / "1.png", own_root / part / hidden / "1.png")
        shutil.copy(own_root / part / "cat" / "1.png", own_root / part / "apple" / "._1.png")
    after = read(own_root)
    assert after.images.classes == 3
    assert all(a.equal(b) for a, b in zip(before, after.test.tensors(), strict=True))
