"""Interval propagation: between what values every number in a network stays, for all images of a box or a ball.

Each step takes lower and upper values [N, C, *] to lower and upper values, in float64 and rounded outward. A linear map
of centre c and radius r has centre A c + b and radius |A| r (Gowal et al. 2018). Float64 gets a sum of n products wrong
by at most n ε of the sum of their absolute values, so radii are r + (2n + 8) ε (|c| + r) before |A|, which covers both.

At the input the box can be cut with a ball ‖δ‖₂ ≤ R: as far as values are x + S δ with a diagonal S, row a of a linear
map moves by at most ‖a S‖₂ R, which is less than what the box around the ball says.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.certified.operations import (
    Activation,
    Add,
    Affine,
    AveragePool,
    Convolution,
    Flatten,
    Image,
    Linear,
    MaxPool,
    Mean,
    Operation,
    PadChannels,
    Step,
    Unshuffle,
    Winners,
)

_EPS = torch.finfo(torch.float64).eps
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_CHUNK = 2**22  # entries of rows of differences at once


@dataclass(frozen=True, eq=False)
class Ball:
    """centre + scale · δ with ‖δ‖₂ ≤ radius."""

    centre: Tensor  # [N, C, *]
    scale: Tensor  # [1, C, 1, ...], not negative
    radius: Tensor  # [N]


@dataclass(frozen=True, eq=False)
class Box:
    """lower ≤ value ≤ upper, all [N, C, *] in float64; where there is a ball, the value is in it too."""

    lower: Tensor
    upper: Tensor
    ball: Ball | None = None


def linf_box(images: Tensor, radius: Tensor | float) -> Box:
    """Return the images within `radius`, a number or [N], of images [N, C, *] in L-infinity, cut to [0, 1].

    Raises:
        ValueError: an image is not in [0, 1], or a radius is negative.
    """
    images, radius = _checked(images, radius)
    around = radius.view(-1, *(1,) * (images.dim() - 1)) * (1 + 4 * _EPS) + 4 * _EPS
    return Box((images - around).clamp(min=0), (images + around).clamp(max=1))


def l2_ball(images: Tensor, radius: Tensor | float) -> Box:
    """Return the images within `radius`, a number or [N], of images [N, C, *] in L2, cut to [0, 1].

    Raises:
        ValueError: an image is not in [0, 1], or a radius is negative.
    """
    images, radius = _checked(images, radius)
    box = linf_box(images, radius)
    scale = images.new_ones(1, images.shape[1], *(1,) * (images.dim() - 2))
    return Box(box.lower, box.upper, Ball(images, scale, radius.expand(len(images)) * (1 + 4 * _EPS)))


def _checked(images: Tensor, radius: Tensor | float) -> tuple[Tensor, Tensor]:
    images = images.detach().cpu().double()
    radius = torch.as_tensor(radius, dtype=torch.float64)
    if not ((images >= 0) & (images <= 1)).all():
        raise ValueError("images must be in [0, 1]")
    if radius.dim() > 1 or not (radius >= 0).all():
        raise ValueError(f"radius must be a number that is at least 0, or one for each image, got {radius}")
    return images, radius.reshape(-1)


class Propagation:
    """The boxes of a network's steps, one step after the other; those that no later step needs are let go.

    Args:
        network: its steps, from `traced.steps`.
        box: of images, from `linf_box` or `l2_ball`.
        exact: whether to keep no more of each box than its centre. Of one image, a box of radius 0, that gives what the
            network computes in float64, without the bounds of its rounding.
    """

    def __init__(self, network: Sequence[Step], box: Box, exact: bool = False) -> None:
        self.network, self.box, self.exact = network, box, exact
        self.last_use = {source: number for number, step in enumerate(network) for source in step.inputs}
        self.results: dict[int, Box] = {}

    def step(self, number: int) -> Box:
        """Do the step of this number, after all before it, and return its box."""
        step = self.network[number]
        inputs = [self.results[source] for source in step.inputs]
        box = self.box if isinstance(step.operation, Image) else _apply(step.operation, inputs)
        if self.exact:
            centre = _centred(box)[0]
            box = Box(centre, centre)
        self.results[number] = box
        for source in step.inputs:
            if self.last_use[source] == number:
                self.results.pop(source, None)
        return box


def propagate(network: Sequence[Step], box: Box) -> Box:
    """Return between what values the network's output stays for all images of a box."""
    boxes = Propagation(network, box)
    for number in range(len(network)):
        result = boxes.step(number)
    return result


def logits(network: Sequence[Step], images: Tensor) -> Tensor:  # [N, K]
    """Return the network's output for images [N, C, *] in [0, 1], computed in float64."""
    values = Propagation(network, linf_box(images, 0.0), exact=True)
    for number in range(len(network)):
        result = values.step(number)
    return result.lower


def margins(network: Sequence[Step], box: Box, labels: Tensor) -> Tensor:  # labels [N] -> [N, K]
    """Return a lower bound of logit y − logit j on the box for each label y and class j, and 0 for j = y.

    A last linear layer is taken into the difference, w_y − w_j, which loses less than bounds of each logit do.
    """
    labels = labels.cpu()
    last = network[-1]
    if not isinstance(last.operation, Linear):
        logits = propagate(network, box)
        lower = logits.lower.gather(1, labels[:, None]) - logits.upper
        return _finite(lower - _EPS * (lower.abs() + logits.upper.abs()), -math.inf).scatter(1, labels[:, None], 0.0)
    before = propagate(network[: last.inputs[0] + 1], box)
    weight, bias = last.operation.weight, last.operation.bias
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    centre, radius = _centred(before)
    found = []
    size = max(1, _CHUNK // weight.numel())
    for c, r, y in zip(centre.split(size), radius.split(size), labels.split(size), strict=True):
        rows, offset = weight[y][:, None] - weight, bias[y][:, None] - bias  # [n, K, F], [n, K]
        # A difference of weights is off by ε of itself.
        slack = (2 * weight.shape[1] + 12) * _EPS
        r = r + slack * (c.abs() + r)
        middle = (rows @ c[..., None])[..., 0] + offset
        around = (rows.abs() @ r[..., None])[..., 0] + slack * offset.abs()
        found.append(_finite(middle - around, -math.inf).scatter(1, y[:, None], 0.0))
    return torch.cat(found)


def _finite(values: Tensor, otherwise: float) -> Tensor:
    """Return values with something else for NaN, which comes of infinite intervals."""
    return values.nan_to_num(nan=otherwise, posinf=math.inf, neginf=-math.inf)


def _box(lower: Tensor, upper: Tensor) -> Box:
    return Box(_finite(lower, -math.inf), _finite(upper, math.inf))


def _centred(box: Box) -> tuple[Tensor, Tensor]:
    """Return centre and radius; the radius reaches both ends."""
    centre = box.lower / 2 + box.upper / 2
    return centre, torch.maximum(box.upper - centre, centre - box.lower) * (1 + 4 * _EPS)


def _linear(box: Box, weight: Tensor, bias: Tensor | None, apply: Callable[[Tensor, Tensor], Tensor]) -> Box:
    """Return the box behind a linear map, `apply(x, weight)`, and a bias [C]."""
    terms = weight[0].numel()
    slack = (2 * terms + 8) * _EPS
    centre, radius = _centred(box)
    middle, around = apply(centre, weight), apply(radius + slack * (centre.abs() + radius), weight.abs())
    lower, upper = middle - around, middle + around
    if box.ball is not None:
        ball = box.ball
        middle = apply(ball.centre, weight)
        rows = apply(ball.scale.square().expand_as(ball.centre[:1]), weight.square()).sqrt()
        distance = ball.radius.view(-1, *(1,) * (rows.dim() - 1)) * rows * (1 + slack)
        around = distance + apply(slack * ball.centre.abs(), weight.abs())
        lower, upper = torch.maximum(lower, middle - around), torch.minimum(upper, middle + around)
    if bias is not None:
        shift = bias.view(-1, *(1,) * (lower.dim() - 2))
        lower, upper = lower + shift, upper + shift
    return _box(*_outward(lower, upper))


def _outward(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Return bounds widened by 4 ε of the larger of the two, for a rounded sum before."""
    slack = 4 * _EPS * torch.maximum(lower.abs(), upper.abs())
    return lower - slack, upper + slack


def _mean_of(factor: float, box: Box, apply: Callable[[Tensor], Tensor], terms: int) -> Box:
    """Return the box of factor · sums with weights 1, of so many terms each."""
    slack = (terms + 8) * _EPS * apply(torch.maximum(box.lower.abs(), box.upper.abs())) * factor
    return _box(apply(box.lower) * factor - slack, apply(box.upper) * factor + slack)


@functools.singledispatch
def _apply(operation: Operation, inputs: Sequence[Box]) -> Box:
    raise NotImplementedError(operation.kind)


@_apply.register
def _(operation: Affine, inputs: Sequence[Box]) -> Box:
    (box,) = inputs
    factor, shift, error = (
        t.view(-1, *(1,) * (box.lower.dim() - 2)) for t in (operation.factor, operation.shift, operation.error)
    )
    one, other = box.lower * factor, box.upper * factor
    slack = 8 * _EPS * (torch.maximum(one.abs(), other.abs()) + shift.abs()) + error
    moved = _box(torch.minimum(one, other) + shift - slack, torch.maximum(one, other) + shift + slack)
    if box.ball is None:
        return moved
    # Rounding of the centre goes into the radius: a vector whose entries are at most s is no longer than sqrt(n) s.
    centre = box.ball.centre * factor + shift
    off = (8 * _EPS * ((box.ball.centre * factor).abs() + shift.abs()) + error) / factor.abs().clamp(min=1e-300)
    scale = box.ball.scale * factor.abs()[None] * (1 + 4 * _EPS)
    radius = box.ball.radius + off.flatten(1).norm(dim=1) * (1 + 1e-6) / box.ball.scale.min().clamp(min=1e-300)
    return Box(moved.lower, moved.upper, Ball(centre, scale, radius))


@_apply.register
def _(operation: Convolution, inputs: Sequence[Box]) -> Box:
    convolve = _CONVOLUTIONS[len(operation.stride)]
    pads = [p for sides in reversed(operation.padding) for p in sides]

    def apply(x: Tensor, weight: Tensor) -> Tensor:
        return convolve(F.pad(x, pads), weight, None, operation.stride, 0, operation.dilation, operation.groups)

    return _linear(inputs[0], operation.weight, operation.bias, apply)


@_apply.register
def _(operation: Linear, inputs: Sequence[Box]) -> Box:
    return _linear(inputs[0], operation.weight, operation.bias, F.linear)


@_apply.register
def _(operation: AveragePool, inputs: Sequence[Box]) -> Box:
    (box,) = inputs
    channels, terms = box.lower.shape[1], math.prod(operation.kernel)
    ones = box.lower.new_ones(channels, 1, *operation.kernel)
    convolve = _CONVOLUTIONS[len(operation.kernel)]

    def apply(x: Tensor) -> Tensor:
        return convolve(x, ones, None, operation.stride, operation.padding, 1, channels)

    return _mean_of(1 / terms, box, apply, terms)


@_apply.register
def _(operation: MaxPool, inputs: Sequence[Box]) -> Box:
    pool = _MAX_POOLS[len(operation.kernel)]
    settings = operation.kernel, operation.stride, operation.padding, operation.dilation, operation.ceil
    return Box(pool(inputs[0].lower, *settings), pool(inputs[0].upper, *settings))


@_apply.register
def _(operation: Mean, inputs: Sequence[Box]) -> Box:
    (box,) = inputs
    terms = math.prod(box.lower.shape[2:])
    places = tuple(range(2, box.lower.dim()))
    return _mean_of(1 / terms, box, lambda x: x.sum(places, keepdim=operation.keep), terms)


@_apply.register
def _(operation: Flatten, inputs: Sequence[Box]) -> Box:
    (box,) = inputs
    lower, upper = box.lower.flatten(1), box.upper.flatten(1)
    if box.ball is None:
        return Box(lower, upper)
    scale = box.ball.scale.expand_as(box.ball.centre[:1]).flatten(1)
    return Box(lower, upper, Ball(box.ball.centre.flatten(1), scale, box.ball.radius))


@_apply.register
def _(operation: Unshuffle, inputs: Sequence[Box]) -> Box:
    (box,), p = inputs, operation.factor
    lower, upper = F.pixel_unshuffle(box.lower, p), F.pixel_unshuffle(box.upper, p)
    if box.ball is None:
        return Box(lower, upper)
    ball = box.ball
    scale = ball.scale.repeat_interleave(p * p, 1)
    return Box(lower, upper, Ball(F.pixel_unshuffle(ball.centre, p), scale, ball.radius))


@_apply.register
def _(operation: PadChannels, inputs: Sequence[Box]) -> Box:
    (box,) = inputs
    places: Any = (..., *(slice(None, None, operation.stride),) * (box.lower.dim() - 2))
    pads = [0, 0] * (box.lower.dim() - 2) + [operation.before, operation.behind]
    return Box(F.pad(box.lower[places], pads), F.pad(box.upper[places], pads))


@_apply.register
def _(operation: Activation, inputs: Sequence[Box]) -> Box:
    return _box(*operation.scalar.values(inputs[0].lower, inputs[0].upper))


@_apply.register
def _(operation: Winners, inputs: Sequence[Box]) -> Box:
    """A value is kept or set to 0; kept for sure if no smaller than the k-th largest that there can be."""
    (box,), first = inputs, 2 if operation.per_channel else 1

    def threshold(values: Tensor) -> Tensor:
        least = values.flatten(first).topk(operation.count, sorted=False).values.amin(-1)
        return least.view(*least.shape, *(1,) * (values.dim() - first))

    wins, loses = box.lower >= threshold(box.upper), box.upper < threshold(box.lower)
    lower = torch.where(wins, box.lower, box.lower.clamp(max=0)).masked_fill(loses, 0.0)
    upper = torch.where(wins, box.upper, box.upper.clamp(min=0)).masked_fill(loses, 0.0)
    return Box(lower, upper)


@_apply.register
def _(operation: Add, inputs: Sequence[Box]) -> Box:
    left, right = inputs
    return _box(*_outward(left.lower + right.lower, left.upper + right.upper))
