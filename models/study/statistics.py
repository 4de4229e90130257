"""Means, spreads and paired differences of a study's accuracies, over seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# 97.5 % quantiles of Student's t by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval (Student's t), and the standard deviation between seeds.

    With one seed there is no interval: low and high are None.
    """

    mean: float
    std: float | None
    low: float | None
    high: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean, deviation and interval of numbers, one per seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, None, None, None)
    std = statistics.stdev(values)
    half = t_quantile(len(values) - 1) * std / math.sqrt(len(values))
    return Estimate(mean, std, mean - half, mean + half)


def paired(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Return the same of the differences of two activations, seed by seed: same weights, batches and test images."""
    return estimate([a - b for a, b in zip(values, baseline, strict=True)])


@dataclass(frozen=True)
class Noise:
    """The standard deviation between seeds, and the degrees of freedom that it is estimated with."""

    std: float
    freedom: int

    @property
    def difference(self) -> float:
        """How far apart two single runs are with 95 % probability at most, if only their seeds differ."""
        return t_quantile(self.freedom) * math.sqrt(2) * self.std


def noise(groups: Sequence[Sequence[float]]) -> Noise | None:
    """Return the noise between seeds, pooled over groups of at least two: the root of the mean variance."""
    variances = [(statistics.variance(group), len(group) - 1) for group in groups if len(group) > 1]
    if not variances:
        return None
    freedom = sum(n for _, n in variances)
    return Noise(math.sqrt(sum(v * n for v, n in variances) / freedom), freedom)


def t_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t; of the normal distribution's expansion above 10 degrees."""
    if freedom < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {freedom}")
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
