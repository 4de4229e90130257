"""Attacks that climb a smoothed loss, estimated from the network's outputs alone: NES and SPSA.

A network whose gradient misleads, because its function jumps (k-WTA) or is flat nearly everywhere, still has a slope
when it is averaged over a neighbourhood. For directions u with mean 0 and unit covariance the gradient of the margin
m(x) = max_{j≠y} z_j(x) - z_y(x), smoothed over steps σu, is about the mean of

    (m(x + σu) - m(x - σu)) / 2σ · u.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.attacks.linf import check_step, margin, misclassified, random_start

DISTRIBUTIONS = ("gaussian", "rademacher")
_DIRECTIONS = 64  # drawn at once
_POINTS, _VALUES = 1024, 2**26  # shown to the network at once, and numbers in them, but at least one image's pairs


@dataclass(frozen=True)
class SmoothedAttack:
    """Signed steps up the smoothed margin within |δ| ≤ eps and [0, 1], from outputs of the network alone.

    Gaussian directions make it NES (Ilyas et al. 2018), random signs SPSA (Uesato et al. 2018). With a growing number
    of samples it is the attack that Tramèr et al. 2020 broke k-WTA with: 100 steps of 0.01 at eps = sigma = 8/255, from
    100, 1,000 and 20,000 samples, growing after 20 and 40 steps.

    Args:
        eps: radius of the ball, in the units of the images, which are in [0, 1].
        distribution: "gaussian" or "rademacher".
        samples: outputs of the network per image and step, in pairs x ± sigma · u, before it grows.
        growth: factor of the number of samples after a fifth of the steps, and again after two fifths.
        sigma: how far to look; None for eps / 2. Points may leave the ball and [0, 1]; only what is found must not.
        steps: number of steps.
        momentum: share of the sum of earlier estimates that is kept at each step. Points move little, so that earlier
            estimates still tell something: with 0.9 half of the samples do as well as with 0.
        step: size of a step; None for eps / 4, or 2.5 eps / steps where that is more.
        restarts: the first start is x itself, the others are random points of the ball.
        name: what to call it.
    """

    eps: float
    distribution: str = "gaussian"
    samples: int = 100
    growth: int = 2
    sigma: float | None = None
    steps: int = 40
    step: float | None = None
    restarts: int = 1
    momentum: float = 0.9
    name: str = "nes"
    norm: ClassVar[str] = "Linf"

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 1:
            raise ValueError(f"eps must be in [0, 1], the range of the images, got {self.eps}")
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {self.distribution!r}")
        if self.samples < 2 or self.samples % 2:
            raise ValueError(f"samples come in pairs: wanted an even number from 2, got {self.samples}")
        if min(self.growth, self.steps, self.restarts) < 1:
            raise ValueError(
                f"growth, steps and restarts must be at least 1, got {self.growth}, {self.steps} and {self.restarts}"
            )
        if not (self.sigma is None or 0 < self.sigma <= 1):
            raise ValueError(f"sigma must be above 0 and at most 1, the range of the images, or None, got {self.sigma}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        check_step(self.step, self.steps, self.eps)

    @property
    def step_size(self) -> float:
        """The size of a step, chosen if none was given."""
        return max(2.5 * self.eps / self.steps, self.eps / 4) if self.step is None else self.step

    def samples_at(self, step: int) -> int:
        """Return how many samples step number `step` takes, counted from 0."""
        return self.samples * self.growth ** ((5 * step >= self.steps) + (5 * step >= 2 * self.steps))

    def search(
        self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:  # [N, C, H, W] in [0, 1], [N] bool
        """Look for a misclassified image near each image.

        An image leaves as soon as it is broken. Directions are shared by all images, so that what is tried for one
        does not depend on which others are left.
        """
        adversarial, found = x.clone(), torch.zeros_like(y, dtype=torch.bool)
        with torch.no_grad():
            for restart in range(self.restarts):
                points = random_start(x, self.eps if restart else 0, generator)
                trend = torch.zeros_like(x)
                todo = _unbroken(model, points, y, adversarial, found)
                for number in range(self.steps):
                    if len(todo) == 0:
                        return adversarial, found
                    slope = self._slope(model, points[todo], y[todo], self.samples_at(number), generator)
                    trend[todo] = self.momentum * trend[todo] + slope
                    moved = points[todo] + self.step_size * trend[todo].sign()
                    points[todo] = (x[todo] + (moved - x[todo]).clamp(-self.eps, self.eps)).clamp(0, 1)
                    todo = _unbroken(model, points, y, adversarial, found)
        return adversarial, found

    def _slope(self, model: nn.Module, points: Tensor, y: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        """Estimate the direction in which the smoothed margin of each point grows; its length is left out."""
        sigma = self.eps / 2 if self.sigma is None else self.sigma
        slope = torch.zeros_like(points)
        most = min(_POINTS, _VALUES // points[0].numel())
        for u in self._directions(points, samples // 2, generator):
            together = max(1, most // (2 * len(u)))
            parts = zip(points.split(together), y.split(together), slope.split(together), strict=True)
            for x, labels, sums in parts:
                around = torch.stack((x[:, None] + sigma * u, x[:, None] - sigma * u))  # [2, n, D, C, H, W]
                values = margin(model(around.flatten(0, 2)), labels.repeat(2).repeat_interleave(len(u)))
                plus, minus = values.view(2, len(x), len(u))
                apart = (plus - minus).nan_to_num(0.0, 0.0, 0.0)  # a pair that tells nothing
                sums += torch.tensordot(apart, u, 1)
        return slope

    def _directions(self, points: Tensor, count: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Draw `count` directions [D, C, H, W] in portions that do not depend on the number of points."""
        for start in range(0, count, _DIRECTIONS):
            shape = (min(_DIRECTIONS, count - start), *points.shape[1:])
            u = torch.empty(shape, dtype=points.dtype, device=points.device)
            if self.distribution == "gaussian":
                yield u.normal_(generator=generator)
            else:
                yield u.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def _unbroken(model: nn.Module, points: Tensor, y: Tensor, adversarial: Tensor, found: Tensor) -> Tensor:
    """Take over the points of the images not yet broken, note which are broken now, and return the others' indices."""
    todo = (~found).nonzero().squeeze(1)
    if len(todo):
        adversarial[todo] = points[todo]
        found[todo] = misclassified(model(points[todo]), y[todo])
    return todo[~found[todo]]
