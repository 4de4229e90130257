"""Which images are for training, validation and test: a matter of the set's options, never of the training's seed."""

from dataclasses import dataclass

from torch import Tensor

from models.data.orders import stratified_order
from models.data.source import DataError


@dataclass(frozen=True)
class Sizes:
    """How many images are wanted.

    Args:
        train: training images; None for all there are.
        test: test images; None for all there are.
        validation: so many of the training images are kept back.
        split: seed of which images these are.
    """

    train: int | None
    test: int | None
    validation: int
    split: int


@dataclass(frozen=True)
class Cut:
    """Numbers of images, each part with the classes in their overall proportions."""

    train: Tensor  # [N]
    validation: Tensor  # [V], of the same images as train
    test: Tensor  # [M]


def cut_pool(name: str, labels: Tensor, sizes: Sizes) -> Cut:
    """Cut images that have no official test part.

    The test images depend on `test` and `split` only, and the validation images on those and `validation`: so networks
    trained on fewer images are measured on the same ones.

    Raises:
        DataError: more images are asked for than there are, or none.
    """
    test = _count(name, "test", sizes.test, len(labels) - 2)
    order = stratified_order(labels, sizes.split)
    return Cut(*_train(name, order[test:], sizes), order[:test])


def cut_official(name: str, labels: Tensor, test_labels: Tensor, sizes: Sizes) -> Cut:
    """Cut images that have an official test part; its images have numbers of their own.

    Raises:
        DataError: more images are asked for than there are, or none.
    """
    test = _count(name, "test", sizes.test, len(test_labels))
    train, validation = _train(name, stratified_order(labels, sizes.split), sizes)
    return Cut(train, validation, stratified_order(test_labels, sizes.split)[:test])


def check(name: str, option: str, value: int, least: int, most: int) -> None:
    """Raise a DataError for an option's value that is not in least..most."""
    if not least <= value <= most:
        raise DataError(f"{option} of {name} must be from {least} to {most}, got {value}")


def _train(name: str, order: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    train = _count(name, "train", sizes.train, len(order), 2)
    check(name, "validation", sizes.validation, 1, train - 1)
    return order[sizes.validation : train], order[: sizes.validation]


def _count(name: str, option: str, count: int | None, most: int, least: int = 1) -> int:
    if count is None:
        return most
    check(name, option, count, least, most)
    return count
