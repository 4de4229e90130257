"""What a network is made of, for those who bound it: a row of steps, each one of a dozen kinds of operation.

Parameters are copies in float64, as stored: bounds are of the real function that the parameters define, not of its
rounded evaluation in float32.
"""

from dataclasses import dataclass

from torch import Tensor

from models.certified.scalars import Scalar


@dataclass(frozen=True, eq=False)
class Operation:
    """A function of one tensor [N, C, *], or of several."""

    @property
    def kind(self) -> str:
        """What to call it in a table."""
        return type(self).__name__.lower()


@dataclass(frozen=True, eq=False)
class Image(Operation):
    """The network's input."""


@dataclass(frozen=True, eq=False)
class Affine(Operation):
    """x · factor + shift, by channel: batch norm in evaluation mode, normalisation of images."""

    factor: Tensor  # [C]
    shift: Tensor  # [C]
    error: Tensor  # [C], what the shift may be off by, having been computed


@dataclass(frozen=True, eq=False)
class Convolution(Operation):
    """A convolution in any number of dimensions, padded with zeros."""

    weight: Tensor  # [outputs, inputs / groups, *kernel]
    bias: Tensor | None  # [outputs]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # before and behind, for each dimension
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True, eq=False)
class Linear(Operation):
    """x Wᵀ + b."""

    weight: Tensor  # [outputs, inputs]
    bias: Tensor | None  # [outputs]


@dataclass(frozen=True, eq=False)
class AveragePool(Operation):
    """Means over windows; padding counts as zeros."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class MaxPool(Operation):
    """The largest value of each window."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil: bool


@dataclass(frozen=True, eq=False)
class Mean(Operation):
    """The mean over all positions, [N, C, *] -> [N, C], or [N, C, 1, ...] to keep the dimensions."""

    keep: bool


@dataclass(frozen=True, eq=False)
class Flatten(Operation):
    """[N, C, *] -> [N, C · positions]."""


@dataclass(frozen=True, eq=False)
class Unshuffle(Operation):
    """p × p pixels of a channel become p² channels of one position."""

    factor: int


@dataclass(frozen=True, eq=False)
class PadChannels(Operation):
    """Every `stride`-th position, and channels of zeros before and behind."""

    stride: int
    before: int
    behind: int


@dataclass(frozen=True, eq=False)
class Activation(Operation):
    """A function of one number, by channel."""

    scalar: Scalar


@dataclass(frozen=True, eq=False)
class Winners(Operation):
    """k-winners-take-all: the `count` largest values are kept, others set to 0. It jumps, so no slope bounds it."""

    count: int
    per_channel: bool  # or of all values of an image


@dataclass(frozen=True, eq=False)
class Add(Operation):
    """The sum of two tensors of one shape."""


@dataclass(frozen=True)
class Step:
    """One operation of a network.

    Args:
        name: of the module, as in `named_modules()`, or of the function called.
        operation: what it does.
        inputs: numbers of the steps whose results it takes.
        shape: of its result, without N.
    """

    name: str
    operation: Operation
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
