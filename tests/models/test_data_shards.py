"""Shards of the WebDataset format."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from source_checks import (
    check_arguments,
    check_format,
    check_ordered,
    check_shuffled,
    global_generators_untouched,
    labels_of,
    rows,
    same,
)

from models.data import DataError, DataSet, load
from models.data.shards import ShardSource

SIZE = 8
EQUAL = "webdataset:train=train-{00..08}.tar,val=val-{0..1}.tar,classes=100,lanes=4,buffer=3"


def write(path: Path, labels: range) -> Path:
    """Write a shard of images of one colour each; label 7 is 7 in the red channel."""
    with webdataset.TarWriter(str(path)) as shard:
        for label in labels:
            pixels = np.full((10, 12, 3), label, dtype=np.uint8)
            pixels[..., 1] = np.arange(120).reshape(10, 12)
            shard.write({"__key__": f"image-{label:03d}", "png": pixels, "cls": label})
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight training shards of 5 images, one held back, two test shards of 3 and 4: 0-39, 40-44, 50-56."""
    for i in range(9):
        write(tmp_path / f"train-{i:02d}.tar", range(5 * i, 5 * i + 5))
    write(tmp_path / "val-0.tar", range(50, 53))
    write(tmp_path / "val-1.tar", range(53, 57))
    return tmp_path


def read(root: Path, seed: int = 0, images: int = 40, workers: int = 0, text: str = EQUAL) -> DataSet:
    return load(f"{text},images={images},size={SIZE},workers={workers}", seed, root)


def test_set_has_the_properties_of_sets(root: Path) -> None:
    data = read(root)
    assert (len(data.train), len(data.validation), len(data.test)) == (40, 5, 7)
    check_format(data)
    check_shuffled(lambda seed: read(root, seed).train, batch_size=7)
    check_ordered(lambda seed: read(root, seed).test)
    check_arguments(data.test)


def test_images_have_their_labels(root: Path) -> None:
    for batches in (read(root).train.shuffled(8, 0), read(root).test.ordered(8)):
        for x, y in batches:
            assert torch.equal((x[:, 0] * 255).round().long(), y[:, None, None].expand(-1, SIZE, SIZE))


def test_equal_shards_on_lanes_that_divide_them_give_every_image_once(root: Path) -> None:
    for epoch in range(3):
        assert sorted(labels_of(list(read(root).train.shuffled(7, epoch)))) == list(range(40))


def test_held_out_shards_are_not_trained_on(root: Path) -> None:
    data = read(root, images=200)
    assert set(labels_of(list(data.train.shuffled(8, 0)))) == set(range(40))
    assert sorted(data.validation.tensors()[1].tolist()) == list(range(40, 45))
    assert sorted(data.test.tensors()[1].tolist()) == list(range(50, 57))


def test_ordered_takes_an_image_of_each_shard_in_turn(root: Path) -> None:
    assert read(root).test.tensors()[1].tolist() == [50, 53, 51, 54, 52, 55, 56]


def test_order_within_a_lane_is_shuffled_in_the_buffer(root: Path) -> None:
    orders = {tuple(labels_of(list(read(root, seed).train.shuffled(40, 0)))) for seed in range(3)}
    assert len(orders) == 3
    first_lane = [label // 5 for label in labels_of(list(read(root).train.shuffled(40, 0)))[::4]]
    assert len(set(first_lane)) == 2  # two shards of five


def test_unequal_shards_give_every_process_as_many_batches(root: Path) -> None:
    write(root / "train-00.tar", range(0, 1))
    write(root / "train-01.tar", range(5, 25))
    source = read(root, images=50).train
    epoch = list(source.shuffled(8, 0))
    assert [len(y) for _, y in epoch] == [8] * 6 + [2]
    parts = [list(source.shuffled(8, 0, rank=rank, world=4)) for rank in range(4)]
    assert [len(part) for part in parts] == [7] * 4
    assert [len(y) for _, y in parts[3]] == [2] * 6 + [0]


def test_a_process_reads_its_own_lanes_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_shards: list[set[Path]] = []
    original = ShardSource._read

    def noting(self: ShardSource, shards: list[Path]):
        read_shards[-1].update(shards)
        return original(self, shards)

    monkeypatch.setattr(ShardSource, "_read", noting)
    for rank in (0, 1):
        read_shards.append(set())
        list(read(root).train.shuffled(8, 0, rank=rank, world=2))
    assert len(read_shards[0]) == len(read_shards[1]) == 4
    assert not read_shards[0] & read_shards[1]


def test_two_workers_yield_what_none_does(root: Path) -> None:
    none, two = read(root), read(root, workers=2)
    with global_generators_untouched():
        for epoch in (0, 1):
            assert same(list(none.train.shuffled(8, epoch)), list(two.train.shuffled(8, epoch)))
        assert same(list(none.train.shuffled(8, 1, 3)), list(two.train.shuffled(8, 1, 3)))
        assert same([none.test.tensors()], [two.test.tensors()])
    check_broken_image(root, two)


def add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    shard.addfile(entry, io.BytesIO(content))


def check_broken_image(root: Path, data: DataSet) -> None:
    with tarfile.open(root / "val-0.tar", "w") as shard:
        add(shard, "folder/bad.jpg", b"no image")
        add(shard, "folder/bad.cls", b"1")
    with pytest.raises(DataError) as error:
        list(data.test.ordered(4, 4))
    message = str(error.value)
    assert message.startswith(f"folder/bad in {root}/val-0.tar cannot be read as an image: UnidentifiedImageError")
    assert "Traceback" not in message


def test_a_broken_image_is_named(root: Path) -> None:
    check_broken_image(root, read(root))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a.jpg": b"x"}, r"val-0.tar holds no images with labels: it has a.jpg; a name is KEY.jpg or KEY.cls"),
        ({"a.cls": b"1", "a.gif": b"x"}, r"got .cls, .gif"),
        ({"a.png": b"x", "a.cls": b"100"}, r"a label from 0 to 99 in its .cls, got b'100'"),
        ({"a.png": b"x", "a.cls": b"cat"}, r"got b'cat'"),
        ({"a.png": b"x", "a.cls": b"-1"}, r"got b'-1'"),
    ],
)
def test_other_entries_are_explained(entries: dict[str, bytes], message: str, root: Path) -> None:
    with tarfile.open(root / "val-0.tar", "w") as shard:
        for name, content in entries.items():
            add(shard, name, content)
    with pytest.raises(DataError, match=message):
        list(read(root).test.ordered(4, 4))


def test_truncated_shards_are_named(root: Path) -> None:
    path = root / "val-0.tar"
    whole = path.read_bytes()
    content = -(-len(whole.rstrip(b"\0")) // 512) * 512
    data = read(root)
    assert len(data.test) == 7
    for length in (0, 100, 512, 700, 1024, content // 2 // 512 * 512, content - 1, content, content + 512):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"val-0.tar is cut off"):
            list(data.test.ordered(4))
        with pytest.raises(DataError, match=r"val-0.tar is cut off"):
            len(read(root).test)


def test_compressed_and_foreign_files(root: Path) -> None:
    text = EQUAL.replace("val-{0..1}.tar", "val.tar.gz")
    with tarfile.open(root / "val-0.tar") as plain, tarfile.open(root / "val.tar.gz", "w:gz") as packed:
        for entry in plain:
            packed.addfile(entry, plain.extractfile(entry))
    data = read(root, text=text)
    assert data.test.tensors()[1].tolist() == [50, 51, 52]
    whole = (root / "val.tar.gz").read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b"no archive" * 1000):
        (root / "val.tar.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"val.tar.gz cannot be read as a tar file"):
            list(data.test.ordered(4))
        with pytest.raises(DataError, match=r"val.tar.gz cannot be read as a tar file"):
            len(read(root, text=text).test)


def test_shards_without_images_do_not_run_for_ever(root: Path) -> None:
    for i in range(9):
        write(root / f"train-{i:02d}.tar", range(0))
    with pytest.raises(DataError, match=r"train-0\d.tar and 1 more hold no images"):
        next(read(root).train.shuffled(4, 0))


def test_more_images_in_order_than_there_are(root: Path) -> None:
    with pytest.raises(DataError, match=r"60 images were wanted of .*train-00.tar and 7 more, which hold 40"):
        list(read(root, images=60).train.ordered(16))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("images=5", r"needs the option train, such as webdataset:train=train-\{000..146\}.tar"),
        ("images=5,train=train-{00..08}.tar", "needs the option val"),
        ("train=train-{00..08}.tar,val=val-0.tar", "images of webdataset must be from 1 to .* got 0"),
        (
            "images=5,train=train-{00..09}.tar,val=val-0.tar",
            r"1 of 10 shards .* missing, such as .*train-09.tar",
        ),
        ("images=5,train=other-{00..09}.tar,val=val-0.tar", r"train of webdataset was not found: .*no other-00.tar in"),
        ("images=5,train=train-{00..08,val=val-0.tar", r"train must be a pattern such as .* got train-\{00..08"),
        ("images=5,train=train-00.tar,val=val-0.tar", "held of webdataset with 1 training shards must be from 1 to 0"),
        ("images=5,train=pipe:echo,val=val-0.tar", r"no pipe:echo in"),
        ("images=5,lanes=0", "lanes of webdataset must be from 1"),
    ],
)
def test_options_that_ask_for_what_there_is_not(text: str, message: str, root: Path) -> None:
    with pytest.raises(DataError, match=message):
        load(f"webdataset:{text}", 0, root)


def test_absolute_paths(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = (
        f"webdataset:train={root}/train-{{00..08}}.tar,val={root}/val-0.tar,images=40,classes=100,size={SIZE},workers=0"
    )
    data = load(text, 0, tmp_path_factory.mktemp("elsewhere"))
    assert len(rows(data.test.tensors()[0])) == 3


def test_names_with_dots_before_the_end_are_explained(root: Path) -> None:
    for name in ("train-00.tar", "train-08.tar"):
        with tarfile.open(root / name, "w") as shard:
            for i in range(3):
                add(shard, f"n01.{i}.png", b"x")
                add(shard, f"n01.{i}.cls", b"1")
    data = read(root)
    with pytest.raises(DataError, match=r"train-08.tar holds no images with labels: it has n01.0.png; .* first dot"):
        len(data.validation)
    with pytest.raises(DataError, match=r"n01 in .*train-00.tar must have a .cls .*, got .0.png, .0.cls.*first dot"):
        list(data.train.ordered(8))


def test_a_shard_without_images_is_named(root: Path) -> None:
    write(root / "train-08.tar", range(0))
    with pytest.raises(DataError, match=r"train-08.tar holds no images with labels: it is empty"):
        len(read(root).validation)


def test_the_order_within_a_shard_is_another_one_in_each_epoch(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "val-0"):
        write(tmp_path / f"{name}.tar", range(20))
    text = "webdataset:train=train-{0..1}.tar,val=val-0.tar,classes=100,lanes=1,buffer=20"
    train = read(tmp_path, images=20, text=text).train
    orders = [[label for _, labels in train.shuffled(20, epoch) for label in labels.tolist()] for epoch in range(3)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
