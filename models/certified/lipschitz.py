"""Guaranteed upper bounds of a network's Lipschitz constant, from images to logits in L2.

Every value of the network is given a diagonal matrix S and a number K, such that for any two images u, v

    value(u) − value(v) = S w   with   ‖w‖ ≤ K ‖u − v‖.

A linear map A takes that to K ‖A S‖ and S = 1; a batch norm, or an activation of slopes at most L_c, multiplies S by
its factor of each channel; a sum adds the K of both, once their S are at most 1. So norms and slopes are folded into
the convolution behind them. They might as well go into the one before: for any positive T, ‖A₂ S A₁‖ is at most
‖A₂ S T⁻¹‖ ‖T A₁‖. T_c = sqrt(S_c q_c / r_c), with r_c the norm of row c of A₁ and q_c that of column c of A₂, is the
best one for diagonal matrices, and is taken for all; before a sum, where S must go, T = S.

Beside it goes what any one entry of a channel can change by, ‖row c of A S‖ K behind a linear map: less than ‖A S‖ K.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
from models.certified.operators import convolution_norm, matrix_norm, pooling_overlap

UP = 1 + 1e-12
"""Each product is rounded up by this factor, more than the few roundings of float64 in it."""
_LEAST = 1e-6  # of the largest entry of T, so that a channel that hardly passes makes no S of 1 / 0


@dataclass(frozen=True, eq=False)
class Reach:
    """How far a value goes when the image moves by 1: S w with ‖w‖ ≤ K. N is 1 where the bound is for all images.

    Args:
        bound: [N], K.
        scale: [C], the diagonal of S.
        entries: [N, C], no entry of a channel changes by more.
    """

    bound: Tensor
    scale: Tensor
    entries: Tensor

    @classmethod
    def of(cls, bound: Tensor, scale: Tensor, entries: Tensor) -> "Reach":
        """Make one whose entries change by no more than the whole."""
        return cls(bound, scale, torch.minimum(entries, bound[:, None] * scale * UP))


@dataclass(frozen=True)
class Layer:
    """One row of the table: a step of the network that changes the bound.

    Args:
        name, kind: of the step.
        norm: operator norm with what was folded into it, or how much a pooling can add; None for an activation.
        slope: largest |slope| of all channels; None where there is none.
        bound: of the Lipschitz constant of all up to here; None where part of what is behind is in the norm already.
    """

    name: str
    kind: str
    norm: float | None
    slope: float | None
    bound: float | None


@dataclass(frozen=True, eq=False)
class Bound:
    """An upper bound of a network's Lipschitz constant, with that of the difference of any two logits.

    Args:
        layers: what it is the product of.
        before: [N] or [1], the part that depends on the image.
        differences: [K, K], times `before` a Lipschitz constant of logit i − logit j.
        last: times `before` a Lipschitz constant of all logits.
    """

    layers: list[Layer]
    before: Tensor
    differences: Tensor
    last: float

    @property
    def upper(self) -> Tensor:  # [N] or [1]
        """The Lipschitz constant's upper bound, infinite for a network that jumps."""
        return self.before * self.last * UP

    def margins(self, labels: Tensor) -> Tensor:  # [N] -> [N, K]
        """Return a Lipschitz constant of logit y − logit j for each label y and class j; 0 for j = y."""
        return self.before[:, None] * self.differences[labels] * UP


def upper_bound(network: Sequence[Step]) -> Bound:
    """Return an upper bound of the Lipschitz constant of a network, L2 of images to L2 of logits, for all images.

    Args:
        network: its steps, from `traced.steps`.

    Example:
        >>> upper_bound(steps(model, (1, 28, 28))).upper
    """
    return Chain(network).bound()


class Chain:
    """The rules of this file's head, applied from the first step to the last.

    Args:
        network: its steps.
    """

    def __init__(self, network: Sequence[Step]) -> None:
        self.network = network
        self.slopes = {  # on ℝ
            number: step.operation.scalar.lipschitz.cpu().double().expand(step.shape[0])
            for number, step in enumerate(network)
            if isinstance(step.operation, Activation)
        }
        self.users: list[list[int]] = [[] for _ in network]
        for number, step in enumerate(network):
            for source in step.inputs:
                self.users[source].append(number)
        self.layers: list[Layer] = []

    def bound(self) -> Bound:
        """Return the bound of the whole network."""
        reaches: list[Reach] = []
        for number in range(len(self.network) - 1):
            reaches.append(self.step(number, reaches))
        last = self.network[-1]
        if isinstance(last.operation, Linear):
            before = reaches[last.inputs[0]]
            weight = last.operation.weight * before.scale
            norm = matrix_norm(weight)
            # Not by a matrix product, which would lose small differences.
            differences = torch.cdist(weight, weight, compute_mode="donot_use_mm_for_euclid_dist") * UP
            self._note(last, norm, None, Reach(before.bound * norm, weight.new_ones(1), before.entries))
            return Bound(self.layers, before.bound, differences, norm)
        reach = _level(self.step(len(self.network) - 1, reaches))
        different = 1 - torch.eye(last.shape[0], dtype=torch.float64)
        return Bound(self.layers, reach.bound, different * 2**0.5, 1.0)

    def step(self, number: int, reaches: Sequence[Reach]) -> Reach:
        """Return the reach of a step's result, from those of the steps before it."""
        step = self.network[number]
        operation, inputs = step.operation, [reaches[source] for source in step.inputs]
        if isinstance(operation, Image):
            ones = torch.ones(1, step.shape[0], dtype=torch.float64)
            return Reach(ones[:, 0], ones[0], ones)
        if isinstance(operation, Add):
            left, right = (_level(reach) for reach in inputs)
            scale, entries = torch.maximum(left.scale, right.scale), left.entries + right.entries
            return self._note(step, None, None, Reach.of((left.bound + right.bound) * UP, scale, entries * UP))
        (before,) = inputs
        if isinstance(operation, Winners):
            reach = Reach(before.bound * torch.inf, torch.ones_like(before.scale), before.entries * torch.inf)
            return self._note(step, None, float("inf"), reach)
        if isinstance(operation, Activation):
            return self._note(step, None, self.slopes[number].max().item(), self.activation(number, before))
        if isinstance(operation, Affine):
            factor = operation.factor.abs() * UP
            return Reach(before.bound, before.scale * factor, before.entries * factor)
        size = self.network[step.inputs[0]].shape[1:]
        if isinstance(operation, (Convolution, Linear)):
            turn = self._turn(number)
            norm = _norm(operation, before.scale, turn, size)
            entries = before.bound[:, None] * _rows(operation, before.scale) * UP
            return self._note(step, norm, None, Reach.of(before.bound * norm * UP, 1 / turn, entries))
        norm, move = _shared(operation, size)
        reach = Reach.of(before.bound * norm * UP, move(before.scale), move(before.entries))
        return reach if norm == 1 else self._note(step, norm, None, reach)

    def activation(self, number: int, before: Reach) -> Reach:
        """Return the reach behind an activation."""
        slope = self.slopes[number] * UP
        return Reach(before.bound, before.scale * slope, before.entries * slope)

    def _note(self, step: Step, norm: float | None, slope: float | None, reach: Reach) -> Reach:
        behind = isinstance(step.operation, (Convolution, Linear)) and not (reach.scale == 1).all()
        bound = None if behind else (reach.bound.max() * reach.scale.max()).nan_to_num(nan=0.0, posinf=torch.inf).item()
        self.layers.append(Layer(step.name, step.operation.kind, norm, slope, bound))
        return reach

    def _turn(self, number: int) -> Tensor:  # [C]
        """Return T of a linear step: how much of what is behind it goes into it."""
        operation = self.network[number].operation
        assert isinstance(operation, (Convolution, Linear))
        rows = operation.weight.flatten(1).norm(dim=1)
        behind, columns = self._behind(number)
        best = behind if columns is None else (behind * columns / rows.clamp(min=1e-300)).sqrt()
        largest = best.max()
        if not 0 < largest < torch.inf:
            return torch.ones_like(best)
        return best.clamp(min=_LEAST * largest.item()) / largest

    def _behind(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Return S of the way from a linear step to the next, and the norms of its columns, if there is one alone."""
        channels = self.network[number].shape[0]
        scale, repeats = torch.ones(channels, dtype=torch.float64), 1  # each channel has so many entries of scale
        while len(self.users[number]) == 1:
            (following,) = self.users[number]
            step = self.network[following]
            operation, size = step.operation, self.network[number].shape[1:]
            if isinstance(operation, (Convolution, Linear)):
                return _most(scale, repeats), _most(_columns(operation), repeats)
            if isinstance(operation, Activation):
                scale = scale * self.slopes[following]
            elif isinstance(operation, Affine):
                scale = scale * operation.factor.abs()
            elif isinstance(operation, (Flatten, Unshuffle, Mean, AveragePool, MaxPool)):
                scale = _shared(operation, size)[1](scale)
            else:
                break
            repeats = len(scale) // channels
            number = following
        return _most(scale, repeats), None


def _level(reach: Reach) -> Reach:
    """Return the same with a scale of at most 1."""
    largest = reach.scale.max()
    if not 0 < largest < torch.inf:
        return reach
    return Reach(reach.bound * largest * UP, reach.scale / largest * UP, reach.entries)


def _most(values: Tensor, repeats: int) -> Tensor:
    return values.view(-1, repeats).amax(1)


@functools.singledispatch
def _norm(operation: Operation, scale: Tensor, turn: Tensor, size: tuple[int, ...]) -> float:
    """Return the norm of T A S."""
    raise NotImplementedError


@_norm.register
def _(operation: Linear, scale: Tensor, turn: Tensor, size: tuple[int, ...]) -> float:
    return matrix_norm(turn[:, None] * operation.weight * scale)


@_norm.register
def _(operation: Convolution, scale: Tensor, turn: Tensor, size: tuple[int, ...]) -> float:
    return convolution_norm(
        _scaled(operation, scale, turn), size, operation.stride, operation.padding, operation.dilation, operation.groups
    )


def _scaled(operation: Convolution, scale: Tensor, turn: Tensor) -> Tensor:
    weight, ones = operation.weight, (1,) * (operation.weight.dim() - 2)
    by_group = scale.view(operation.groups, 1, -1)  # inputs of each group
    weight = weight.unflatten(0, (operation.groups, -1)) * by_group.reshape(*by_group.shape, *ones)
    return weight.flatten(0, 1) * turn.view(-1, 1, *ones)


def _rows(operation: Convolution | Linear, scale: Tensor) -> Tensor:  # [C]
    """Return the norms of the rows of A S."""
    if isinstance(operation, Linear):
        return (operation.weight * scale).norm(dim=1)
    ones = torch.ones(len(operation.weight), dtype=torch.float64)
    return _scaled(operation, scale, ones).flatten(1).norm(dim=1)


def _columns(operation: Convolution | Linear) -> Tensor:  # [C]
    weight = operation.weight
    if isinstance(operation, Linear):
        return weight.norm(dim=0)
    return weight.unflatten(0, (operation.groups, -1)).transpose(1, 2).flatten(2).norm(dim=2).flatten()


def _shared(operation: Operation, size: tuple[int, ...]) -> tuple[float, Callable[[Tensor], Tensor]]:
    """Return the norm of what treats all channels alike, and where it moves what belongs to a channel, [*, C]."""
    positions = math.prod(size)
    if isinstance(operation, Mean):
        return positions**-0.5 * UP, _same
    if isinstance(operation, AveragePool):
        kernel = torch.full((1, 1, *operation.kernel), 1 / math.prod(operation.kernel), dtype=torch.float64)
        padding = [(p, p) for p in operation.padding]
        return convolution_norm(kernel, size, operation.stride, padding, (1,) * len(size)) * UP, _same
    if isinstance(operation, MaxPool):
        overlap = pooling_overlap(operation.kernel, operation.stride, operation.dilation)
        return overlap**0.5 * UP if overlap > 1 else 1.0, _same
    if isinstance(operation, Flatten):
        return 1.0, lambda channels: channels.repeat_interleave(positions, -1)
    if isinstance(operation, Unshuffle):
        return 1.0, lambda channels: channels.repeat_interleave(operation.factor**2, -1)
    if isinstance(operation, PadChannels):
        return 1.0, lambda channels: F.pad(channels, (operation.before, operation.behind))
    raise NotImplementedError(operation.kind)


def _same(channels: Tensor) -> Tensor:
    return channels
