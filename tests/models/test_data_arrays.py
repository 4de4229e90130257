"""Sets in files that are read into memory: MNIST, Fashion-MNIST, CIFAR and SVHN."""

import gzip
import itertools
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from source_checks import check_arguments, check_format, check_ordered, check_shuffled, rows

from models.data import DataError, load
from models.data.places import VARIABLE


@pytest.fixture(autouse=True)
def nothing_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)


def pictures(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def python2_pickle(pixels: np.ndarray, labels: dict[bytes, list[int]]) -> bytes:
    """Return what Python 2 wrote into the official files: byte strings, and an array by numpy.core.multiarray."""

    def text(content: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(content)) + content

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
    shape = b"(" + b"".join(map(number, pixels.shape)) + b"t"
    array += b"(" + number(1) + shape + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    lists = b"".join(text(name) + b"](" + b"".join(map(number, values)) + b"e" for name, values in labels.items())
    return b"\x80\x02}(" + text(b"data") + array + lists + text(b"batch_label") + text(b"training batch") + b"u."


def batch(count: int, seed: int, classes: int = 10, name: bytes = b"labels") -> bytes:
    return python2_pickle(pictures(count, seed).reshape(count, -1), {name: [i % classes for i in range(count)]})


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i in range(1, 6):
        (folder / f"data_batch_{i}").write_bytes(batch(20, i))
    (folder / "test_batch").write_bytes(batch(30, 6))
    return folder


@pytest.fixture
def cifar100(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for part, count in (("train", 300), ("test", 100)):
        pixels = pictures(count, count).reshape(count, -1)
        labels = {b"coarse_labels": [i % 20 for i in range(count)], b"fine_labels": [i % 100 for i in range(count)]}
        (folder / part).write_bytes(python2_pickle(pixels, labels))
    return folder


@pytest.fixture
def svhn(tmp_path: Path) -> Path:
    for part, count in (("train", 70), ("test", 30)):
        labels = np.arange(count, dtype=np.uint8)[:, None] % 10 + 1
        scipy.io.savemat(
            tmp_path / f"{part}_32x32.mat", {"X": pictures(count, count).transpose(2, 3, 1, 0), "y": labels}
        )
    return tmp_path


def write_idx(folder: Path, compressed: bool) -> None:
    folder.mkdir(parents=True)
    for part, count in (("train", 70), ("t10k", 30)):
        pixels, labels = grey(count, count), bytes(i % 10 for i in range(count))
        files = {
            f"{part}-images-idx3-ubyte": struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + pixels.tobytes(),
            f"{part}-labels-idx1-ubyte": struct.pack(">4BI", 0, 0, 8, 1, count) + labels,
        }
        for name, content in files.items():
            path = folder / (f"{name}.gz" if compressed else name)
            path.write_bytes(gzip.compress(content) if compressed else content)


def grey(count: int, seed: int) -> np.ndarray:
    return pictures(count, seed)[:, :1, :28, :28]


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    write_idx(tmp_path / "MNIST/raw", compressed=False)
    return tmp_path / "MNIST/raw"


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    write_idx(tmp_path / "fashion-mnist", compressed=True)
    return tmp_path / "fashion-mnist"


TEXTS = {
    "mnist": "mnist:validation=20",
    "fashion": "fashion:validation=20",
    "cifar10": "cifar10:validation=20",
    "cifar100": "cifar100:validation=100",
    "svhn": "svhn:validation=20",
}


@pytest.mark.parametrize("name", TEXTS)
def test_sets_have_the_properties_of_sets(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    request.getfixturevalue(name)
    data = load(TEXTS[name], 0, tmp_path)
    check_format(data)
    check_shuffled(lambda seed: load(TEXTS[name], seed, tmp_path).train, batch_size=7)
    check_ordered(lambda seed: load(TEXTS[name], seed, tmp_path).test)
    check_arguments(data.validation)
    parts = [rows(source.tensors()[0]) for source in (data.train, data.validation, data.test)]
    assert not any(left & right for left, right in itertools.combinations(parts, 2))


def by_image(pixels: np.ndarray, labels: list[int]) -> dict[bytes, int]:
    floats = pixels.astype(np.float32) / 255
    return {image.tobytes(): label for image, label in zip(floats, labels, strict=True)}


def test_cifar10_is_what_the_files_hold(cifar10: Path, tmp_path: Path) -> None:
    data = load("cifar10:validation=20", 0, tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (80, 20, 30)
    held = {}
    for i in range(1, 6):
        held |= by_image(pictures(20, i), [k % 10 for k in range(20)])
    got = {}
    for source in (data.train, data.validation):
        x, y = source.tensors()
        got |= by_image(np.rint(x.numpy() * 255), y.tolist())
    assert got == held
    x, y = data.test.tensors()
    assert by_image(np.rint(x.numpy() * 255), y.tolist()) == by_image(pictures(30, 6), [k % 10 for k in range(30)])


def test_cifar100_has_fine_labels(cifar100: Path, tmp_path: Path) -> None:
    data = load("cifar100:validation=100", 0, tmp_path)
    assert data.images.classes == 100
    for source, each in ((data.train, 2), (data.validation, 1), (data.test, 1)):
        assert source.tensors()[1].bincount().tolist() == [each] * 100


def test_files_written_by_python_3_are_read_too(cifar10: Path, tmp_path: Path) -> None:
    expected = load("cifar10:validation=20", 0, tmp_path).test.tensors()
    content = {b"data": pictures(30, 6).reshape(30, -1), b"labels": [i % 10 for i in range(30)]}
    for protocol in (2, 3, 4):
        (cifar10 / "test_batch").write_bytes(pickle.dumps(content, protocol))
        assert torch.equal(load("cifar10:validation=20", 0, tmp_path).test.tensors()[0], expected[0])


def test_augmented_images_are_windows_of_the_padded_ones(cifar10: Path, tmp_path: Path) -> None:
    data = load("cifar10:validation=20", 0, tmp_path)
    plain = load("cifar10:validation=20,pad=0,flip=no", 0, tmp_path)
    shifted, mirrored = 0, 0
    for (x, _), (original, _) in zip(data.train.shuffled(16, 0), plain.train.shuffled(16, 0), strict=True):
        for image, source in zip(x, original, strict=True):
            windows = torch.nn.functional.pad(source, [4] * 4).unfold(1, 32, 1).unfold(2, 32, 1)
            straight, flipped = (
                (windows == candidate[:, None, None]).flatten(3).all(3).all(0).nonzero()
                for candidate in (image, image.flip(2))
            )
            assert len(straight) + len(flipped) == 1
            shifted += [*straight.tolist(), *flipped.tolist()] != [[4, 4]]
            mirrored += len(flipped)
    assert shifted > 70  # 79 of 80 expected
    assert 25 < mirrored < 55  # 40 ± 4.5 expected


def test_svhn_is_not_mirrored_and_has_zeros(svhn: Path) -> None:
    data = load("svhn:validation=20,pad=0", 0, svhn)
    assert data.train.augmentation is None
    assert load("svhn:validation=20", 0, svhn).train.augmentation.flip is False
    x, y = data.test.tensors()
    labels = [(i % 10 + 1) % 10 for i in range(30)]
    assert by_image(np.rint(x.numpy() * 255), y.tolist()) == by_image(pictures(30, 30), labels)


@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_idx_files_are_read_compressed_or_not(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    request.getfixturevalue(name)
    data = load(f"{name}:validation=20", 0, tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (50, 20, 30)
    x, y = data.test.tensors()
    assert by_image(np.rint(x.numpy() * 255), y.tolist()) == by_image(grey(30, 30), [i % 10 for i in range(30)])
    assert data.train.augmentation is None


def cut(content: bytes) -> bytes:
    return content[:-5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, r"t10k-images-idx3-ubyte must hold 30 x 28 x 28 bytes, got 23515: it is damaged"),
        (lambda content: content[:9], "must be an IDX file of bytes in 3 dimensions, and begins with 00000803"),
        (lambda content: b"\0\0\r\3" + content[4:], "and begins with 00000d03"),
        (lambda content: content[:8] + struct.pack(">2I", 56, 14) + content[16:], "28 x 28 pixels, got 56 x 14"),
        (lambda content: struct.pack(">4B3I", 0, 0, 8, 3, 29, 28, 28) + content[16:-784], "got 30 for 29"),
        (None, "there is no t10k-images-idx3-ubyte or t10k-images-idx3-ubyte.gz"),
    ],
)
def test_other_idx_files_are_explained(change, message: str, mnist: Path, tmp_path: Path) -> None:
    path = mnist / "t10k-images-idx3-ubyte"
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        load("mnist:validation=20", 0, tmp_path)


@pytest.mark.parametrize("damage", [cut, lambda content: content[:40] + b"?" * 20 + content[60:], lambda _: b"none"])
def test_damaged_archives_are_named(damage, fashion: Path, tmp_path: Path) -> None:
    path = fashion / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz cannot be read: "):
        load("fashion:validation=20", 0, tmp_path)


def test_smaller_parts_are_stratified(cifar10: Path, tmp_path: Path) -> None:
    data = load("cifar10:train=60,validation=20,test=10", 0, tmp_path)
    assert [s.tensors()[1].bincount().tolist() for s in (data.train, data.validation, data.test)] == [
        [4] * 10,
        [2] * 10,
        [1] * 10,
    ]


@pytest.mark.parametrize("last", [True, False])
def test_arrays_in_an_npz_file(last: bool, tmp_path: Path) -> None:
    arrays = {"x_train": pictures(50, 0), "x_test": pictures(20, 1)}
    if last:
        arrays = {name: np.moveaxis(images, 1, -1) for name, images in arrays.items()}
    labels = {"y_train": np.arange(50)[:, None] % 10, "y_test": np.arange(20) % 10}
    np.savez(tmp_path / "cifar10.npz", **arrays, **labels)
    x, y = load("cifar10:validation=10", 0, tmp_path).test.tensors()
    assert by_image(np.rint(x.numpy() * 255), y.tolist()) == by_image(pictures(20, 1), [i % 10 for i in range(20)])


def test_places_are_looked_in_in_order(cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=rf"no cifar-10-batches-py or cifar10.npz in {tmp_path}/data \(./data, no such"):
        load("cifar10", 0)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "named"))
    with pytest.raises(DataError, match=rf"{tmp_path}/named \(\$KAFOPS_DATA, no such folder\) and {tmp_path}/data"):
        load("cifar10", 0)
    (tmp_path / "data").mkdir()
    cifar10.rename(tmp_path / "data" / cifar10.name)
    assert len(load("cifar10:validation=20", 0).train) == 80
    monkeypatch.setenv(VARIABLE, str(tmp_path / "data"))
    assert len(load("cifar10:validation=20", 0).train) == 80
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=rf"in {tmp_path}/empty \(given as root\)\. The official"):
        load("cifar10", 0, tmp_path / "empty")  # what is asked for explicitly is not looked for elsewhere


@pytest.mark.parametrize("name", ["mnist", "fashion", "cifar10", "cifar100", "svhn", "imagenet"])
def test_missing_files_are_explained(name: str) -> None:
    with pytest.raises(DataError, match=rf"{name} was not found.*https?://.*torchvision.datasets.*FOLDER.*KAFOPS_DATA"):
        load(name, 0)


def test_an_incomplete_folder_is_named(cifar10: Path, tmp_path: Path) -> None:
    (cifar10 / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"data_batch_3 cannot be read.*No such file.*must be data_batch_1, "):
        load("cifar10", 0, tmp_path)


def test_truncated_files_are_named(cifar10: Path, tmp_path: Path) -> None:
    whole = (cifar10 / "test_batch").read_bytes()
    for length in (0, 1, 10, 100, 1000, len(whole) - 100, len(whole) - 1):
        (cifar10 / "test_batch").write_bytes(whole[:length])
        with pytest.raises(DataError, match="test_batch cannot be read as a file of cifar10"):
            load("cifar10", 0, tmp_path)


class Harmful:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_pickles_call_nothing(cifar10: Path, tmp_path: Path) -> None:
    mark = tmp_path / "called"
    (cifar10 / "test_batch").write_bytes(pickle.dumps({b"data": Harmful(mark), b"labels": []}, 2))
    with pytest.raises(DataError, match=r"test_batch cannot be read.*it names posix.mkdir, which CIFAR's files do not"):
        load("cifar10", 0, tmp_path)
    assert not mark.exists()
    np.savez(tmp_path / "cifar100.npz", x_train=np.array([Harmful(mark)], dtype=object))
    with pytest.raises(DataError, match=r"cifar100.npz must hold the arrays.*allow_pickle=False"):
        load("cifar100", 0, tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"data": pictures(2, 0).reshape(2, -1)}, "KeyError: b'labels'"),
        ([1, 2], "TypeError"),
        ({b"data": pictures(2, 0).reshape(4, -1), b"labels": [0] * 4}, r"3 x 32 x 32, got uint8 of shape \[4, 1536\]"),
        ({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}, "must hold uint8 images .* got float64"),
        ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, r"got uint8 of shape \[0, 3, 32, 32\]"),
        ({b"data": pictures(2, 0).reshape(2, -1), b"labels": [0]}, r"each of its 2 images, got int64 of shape \[1\]"),
        ({b"data": pictures(2, 0).reshape(2, -1), b"labels": [0.5, 1]}, "got float64 of shape"),
        ({b"data": pictures(2, 0).reshape(2, -1), b"labels": [0, 10]}, "labels from 0 to 9, got 0 to 10"),
        ({b"data": pictures(2, 0).reshape(2, -1), b"labels": [[0], [1, 2]]}, "as a file of cifar10: ValueError"),
    ],
)
def test_other_content_is_explained(content: object, message: str, cifar10: Path, tmp_path: Path) -> None:
    (cifar10 / "test_batch").write_bytes(pickle.dumps(content, 4))
    with pytest.raises(DataError, match=f"test_batch.*{message}"):
        load("cifar10", 0, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"X": pictures(4, 0), "y": np.ones((4, 1))},
            r"X, uint8 of 32 x 32 x 3 x N, got .* \[4, 3, 32, 32\]",
        ),
        ({"X": np.zeros((32, 32, 3, 4)), "y": np.ones((4, 1))}, "got float64"),
        ({"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.zeros((4, 1))}, "a label from 1 to 10 for each of its 4"),
        ({"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.ones((3, 1))}, "a label from 1 to 10 for each of its 4"),
        ({"y": np.ones((3, 1))}, "KeyError: 'X'"),
    ],
)
def test_other_mat_files_are_explained(content: dict, message: str, svhn: Path) -> None:
    scipy.io.savemat(svhn / "train_32x32.mat", content)
    with pytest.raises(DataError, match=f"train_32x32.mat.*{message}"):
        load("svhn", 0, svhn)


def test_truncated_mat_and_npz_files_are_named(svhn: Path) -> None:
    whole = (svhn / "test_32x32.mat").read_bytes()
    np.savez(svhn / "whole.npz", x_train=pictures(10, 0))
    archive = (svhn / "whole.npz").read_bytes()
    for share in (0, 0.01, 0.5, 0.99):
        (svhn / "test_32x32.mat").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(DataError, match=r"test_32x32.mat cannot be read as a file of SVHN"):
            load("svhn", 0, svhn)
        (svhn / "cifar10.npz").write_bytes(archive[: int(share * len(archive))])
        with pytest.raises(DataError, match=r"cifar10.npz must hold the arrays"):
            load("cifar10", 0, svhn)


def test_the_split_decides_which_official_test_images_are_taken(cifar10: Path) -> None:
    zero, again, one = (load(f"cifar10:validation=20,test=20,split={split}", 0, cifar10.parent) for split in (0, 0, 1))
    assert zero.test.tensors()[0].equal(again.test.tensors()[0])
    assert not zero.test.tensors()[0].equal(one.test.tensors()[0])
