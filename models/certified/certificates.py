"""How far an image may move before a network could change its mind: radii that are proved, image by image.

In L-infinity by interval propagation: the largest radius at which every margin's lower bound is positive. In L2 by
Lipschitz constants (Tsuzuku, Sato, Sugiyama 2018): logit y − logit j of an image changes by at most L_yj ‖δ‖₂, so no
δ shorter than the least margin / L_yj changes the answer. Globally L_yj holds everywhere. Locally it is that of a ball
of radius R around the image, from the largest slopes that interval propagation leaves possible in it, and what it
certifies is no more than R. A ball of L2 radius R holds the box of radius R / sqrt(pixels), so L2 radii certify in
L-infinity too.

All this is about the real function that the network's parameters define. Evaluated in float32 it differs from that by
some 1e-6 of its logits, which can matter where a margin is no larger.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.certified import intervals
from models.certified.lipschitz import Bound
from models.certified.local_lipschitz import local_bound
from models.certified.operations import Step, Winners

LEAST, MOST = 2.0**-30, 1.0
"""Radii in L-infinity that are looked for; images are in [0, 1]."""
_HALVINGS = 15  # of the interval of the radius's logarithm, which ends 1.0013 wide
_TRIES, _CLOSE, _BOLD = 8, 1.05, 0.7  # balls to try, how close is enough, and where between the ends to try next
_ROUNDING = 1e-9  # of the largest logit, taken off margins at the image: float64 rounds some 1e-13 of it
_DOWN = 1 - 1e-12  # radii are rounded down by it


@dataclass(frozen=True, eq=False)
class Certificates:
    """Radii [N] within which the network's answer is proved to be the label; 0 where it is not even at the image.

    Args:
        intervals: in L-infinity, by interval propagation.
        lipschitz: in L2, by the network's global Lipschitz constants.
        local: in L2, by those around each image; never less than `lipschitz`.
        local_bound: [N], an upper bound of the Lipschitz constant of the logits in the ball of radius `local`.
        pixels: numbers of an image.
    """

    intervals: Tensor
    lipschitz: Tensor
    local: Tensor
    local_bound: Tensor
    pixels: int

    @property
    def linf(self) -> Tensor:  # [N]
        """In L-infinity, by whichever proves most."""
        return torch.maximum(self.intervals, self.local / self.pixels**0.5 * _DOWN)

    @property
    def l2(self) -> Tensor:  # [N]
        """In L2, by whichever proves most: a box of radius r holds the ball of radius r."""
        return torch.maximum(self.intervals, self.local)


def certify(network: Sequence[Step], bound: Bound, images: Tensor, labels: Tensor) -> Certificates:
    """Prove radii for a batch of images.

    Args:
        network: its steps, from `traced.steps`.
        bound: `upper_bound(network)`.
        images: [N, C, H, W] in [0, 1].
        labels: [N].

    Raises:
        ValueError: an image is not in [0, 1].
    """
    logits = intervals.logits(network, images)
    margins = logits.gather(1, labels.cpu()[:, None]) - logits - _ROUNDING * logits.abs().amax(1, keepdim=True)
    by_lipschitz = _radius(margins, bound, labels).clamp(max=images[0].numel() ** 0.5)  # no image is farther away
    local, local_bound = _local(network, bound, images, labels, margins, by_lipschitz)
    return Certificates(interval_radius(network, images, labels), by_lipschitz, local, local_bound, images[0].numel())


def interval_radius(network: Sequence[Step], images: Tensor, labels: Tensor) -> Tensor:  # [N]
    """Return the largest radius in L-infinity that interval propagation proves, by bisection, to within 0.2 %.

    All that is returned was tried. It is 0 below `LEAST`, and at most `MOST`.
    """

    def proved(radius: Tensor) -> Tensor:
        return _robust(intervals.margins(network, intervals.linf_box(images, radius), labels), labels)

    low = images.new_full((len(images),), LEAST, dtype=torch.float64, device="cpu")
    high = torch.full_like(low, MOST)
    ever, always = proved(low), proved(high)
    for _ in range(_HALVINGS):
        middle = (low * high).sqrt()
        good = proved(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(always, MOST, torch.where(ever, low, 0.0))


def _robust(margins: Tensor, labels: Tensor) -> Tensor:  # [N] bool
    return _others(margins, labels).amin(1) > 0


def _others(values: Tensor, labels: Tensor) -> Tensor:
    """Return values [N, K] with infinity at the label."""
    return values.scatter(1, labels.cpu()[:, None], torch.inf)


def _radius(margins: Tensor, bound: Bound, labels: Tensor) -> Tensor:  # [N]
    """Return the least margin / Lipschitz constant, 0 where a margin is not positive."""
    distances = _others(margins.clamp(min=0) / bound.margins(labels.cpu()), labels)
    return distances.nan_to_num(nan=0.0, posinf=torch.inf).amin(1) * _DOWN


def _local(
    network: Sequence[Step], bound: Bound, images: Tensor, labels: Tensor, margins: Tensor, least: Tensor
) -> tuple[Tensor, Tensor]:  # [N], [N]
    """Look for the ball whose own Lipschitz constant certifies it, between what is proved and what can be.

    The smaller the ball, the smaller its constant: so no ball certifies more than a smaller one would if it were
    allowed to reach beyond itself.
    """
    proved, constant = least, bound.upper.expand(len(images)).clone()
    if any(isinstance(step.operation, Winners) for step in network):
        return proved, constant
    possible = torch.full_like(proved, images[0].numel() ** 0.5)
    radius = least
    for _ in range(_TRIES):
        around = local_bound(network, images, radius)
        reach = _radius(margins, around, labels)
        found = torch.minimum(reach, radius)
        better = found > proved
        constant = torch.where(better | (radius == least), around.upper, constant)
        proved = torch.where(better, found, proved)
        possible = torch.minimum(possible, torch.maximum(reach, radius))
        if ((possible <= _CLOSE * proved) | (proved == 0)).all():
            break
        radius = proved ** (1 - _BOLD) * possible**_BOLD
    return proved, constant


def accuracy_at(radii: Tensor, at: Sequence[float]) -> list[float]:
    """Return the share of images whose radius [N] is at least each of the given ones, and above 0."""
    return [((radii >= radius) & (radii > 0)).double().mean().item() for radius in at]
