"""Upper bounds of a network's Lipschitz constant in a ball around each image.

A slope of an activation is bounded by what it can be at the inputs that the ball leaves possible, and those are known
when the activation is reached: no farther from the value at the image than the ball's radius times what one entry can
change by (`lipschitz.Reach.entries`), with the slopes of the activations before it in the same ball; and within what
interval propagation says. Both are taken, so that each helps the other from layer to layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.certified.intervals import Box, Propagation, l2_ball, linf_box
from models.certified.lipschitz import UP, Bound, Chain, Reach
from models.certified.operations import Activation, Step


def local_bound(network: Sequence[Step], images: Tensor, radius: Tensor | float) -> Bound:
    """Return upper bounds of the Lipschitz constant within L2 balls around images, cut to [0, 1].

    Norms of linear maps are computed once, with the largest slopes that any of the images leaves possible, and the
    slopes of each image are taken as a share of these: bounds for all images at the cost of one.

    Args:
        network: its steps, from `traced.steps`.
        images: [N, C, H, W] in [0, 1].
        radius: of the balls, a number or [N].

    Raises:
        ValueError: an image is not in [0, 1], or a radius is negative.
    """
    return _LocalChain(network, images, radius).bound()


class _LocalChain(Chain):
    def __init__(self, network: Sequence[Step], images: Tensor, radius: Tensor | float) -> None:
        super().__init__(network)
        ball = l2_ball(images, radius)
        self.radius = torch.as_tensor(radius, dtype=torch.float64).reshape(-1, 1)
        self.boxes = Propagation(network, ball)
        self.centres = Propagation(network, linf_box(images, 0.0), exact=True)

    def step(self, number: int, reaches: Sequence[Reach]) -> Reach:
        step = self.network[number]
        if isinstance(step.operation, Activation):
            self._narrow(step.inputs[0], reaches[step.inputs[0]])
        reach = super().step(number, reaches)
        self.boxes.step(number)
        self.centres.step(number)
        return reach

    def _narrow(self, source: int, reach: Reach) -> None:
        """Cut the box of the inputs of an activation to what the ball can reach."""
        box, centre = self.boxes.results[source], self.centres.results[source].lower
        # The centre's own rounding, some 1e-13 of it, is nothing next to this.
        away = self.radius * reach.entries * UP
        away = away.reshape(*away.shape, *(1,) * (centre.dim() - 2)) + 1e-9 * (1 + centre.abs())
        lower, upper = torch.fmax(box.lower, centre - away), torch.fmin(box.upper, centre + away)
        self.boxes.results[source] = Box(torch.minimum(lower, upper), torch.maximum(lower, upper))

    def activation(self, number: int, before: Reach) -> Reach:
        operation = self.network[number].operation
        assert isinstance(operation, Activation)
        box = self.boxes.results[self.network[number].inputs[0]]
        least, most = operation.scalar.slopes(box.lower, box.upper)
        largest = torch.maximum(least.abs(), most.abs()).reshape(*least.shape[:2], -1).amax(2)
        of_image = torch.fmin(largest, self.slopes[number])  # [N, C]; the other one where one is NaN
        common = of_image.amax(0) * UP
        share = (of_image / common.clamp(min=1e-300)).amax(1)
        self.slopes[number] = common
        return Reach.of(before.bound * share * UP, before.scale * common, before.entries * of_image * UP)
