"""Means, spreads, paired differences and equivalence of a study's accuracies, over seeds and images; correlations."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from scipy.stats import t as student
from statsmodels.stats.multitest import multipletests

LEVEL = 0.05
MARGIN = 0.02
"""A difference in accuracy below which two networks count as equally accurate here."""
_RESAMPLES = 9999
_ENOUGH_SEEDS = 4  # for Welch and Satterthwaite's degrees of freedom: the tests simulate it
_ENOUGH_RANKED = 8  # of what is compared, for a bootstrap of ranks


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
    half = float(student.ppf(1 - LEVEL / 2, len(values) - 1)) * std / math.sqrt(len(values))
    return Estimate(mean, std, mean - half, mean + half)


def paired(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Return the same of the differences of two activations, seed by seed: same weights, batches and test images."""
    return estimate([a - b for a, b in zip(values, baseline, strict=True)])


@dataclass(frozen=True)
class Difference:
    """The mean difference of two activations' accuracies, and what it is uncertain by.

    Args:
        mean: of all seeds and images.
        seeds, images: how many.
        between_seeds: the standard deviation of one seed's difference; None with one seed.
        of_images: the standard error through the choice of images, the networks kept.
        error: the standard error through both; None with one seed.
        freedom: degrees of freedom that it is estimated with, by Welch and Satterthwaite's formula; with fewer than
            four seeds no more than theirs.
    """

    mean: float
    seeds: int
    images: int
    between_seeds: float | None
    of_images: float
    error: float | None
    freedom: float | None

    def interval(self, level: float = LEVEL) -> tuple[float, float] | None:
        """Return the interval with confidence 1 - level, by Student's t."""
        if self.error is None:
            return None
        half = float(student.ppf(1 - level / 2, self.freedom)) * self.error
        return self.mean - half, self.mean + half

    @property
    def p(self) -> float | None:
        """How likely a difference at least as large is where there is none; None with one seed."""
        if self.error is None:
            return None
        if self.error == 0:
            return float(self.mean == 0)
        return 2 * float(student.sf(abs(self.mean) / self.error, self.freedom))


def difference(right: NDArray[np.bool_], baseline: NDArray[np.bool_]) -> Difference:
    """Compare two activations by what is right of the same images under the same seeds.

    The error is that of the bootstrap that draws seeds and images anew, both with replacement and at once: the networks
    that might have been trained and the images that might have been attacked. Its variance has a closed form (Owen
    2007, "The pigeonhole bootstrap"): that of the seeds' means over their number, that of the images' means over
    theirs (both unbiased here, where a bootstrap's lack a part of n), and what is left over both. It is larger than
    the true one by up to twice the last, so an error is rather too large than too small; degrees of freedom are those
    of the first two alone, which are fewer. With two or three seeds their spread is so uncertain that where it comes
    out small by chance the formula finds dozens of degrees: it then rejects up to five times too often. There the
    degrees are at most those of the seeds, with which it rejects far too seldom.

    Args:
        right, baseline: [seeds, images].

    Raises:
        ValueError: they have not the same seeds and images.
    """
    if right.shape != baseline.shape or right.ndim != 2:
        raise ValueError(f"wanted [seeds, images] of both, got {right.shape} and {baseline.shape}")
    gain = right.astype(float) - baseline
    seeds, images = gain.shape
    mean, of_seed, of_image = gain.mean(), gain.mean(axis=1, keepdims=True), gain.mean(axis=0, keepdims=True)
    through_images = float(of_image.var(ddof=1)) / images if images > 1 else 0.0
    if seeds < 2:
        return Difference(float(mean), seeds, images, None, math.sqrt(through_images), None, None)
    spread = float(of_seed.var(ddof=1))
    through_seeds = spread / seeds
    rest = float(np.square(gain - of_seed - of_image + mean).mean()) / (seeds * images)
    parts = through_seeds**2 / (seeds - 1) + through_images**2 / max(images - 1, 1)
    freedom = (through_seeds + through_images) ** 2 / parts if parts > 0 else seeds - 1.0
    if seeds < _ENOUGH_SEEDS:
        freedom = min(freedom, seeds - 1.0)
    error = math.sqrt(through_seeds + through_images + rest)
    return Difference(float(mean), seeds, images, math.sqrt(spread), math.sqrt(through_images), error, freedom)


@dataclass(frozen=True)
class Corrected:
    """A comparison among several that were named beforehand, by Holm's correction.

    Args:
        p: Holm's, of all.
        low, high: the interval at the level at which Holm's procedure tests this one; from the first on that it does
            not find, which ends it, at that one's.
        found: whether it says that there is a difference: where the interval excludes 0.
    """

    p: float
    low: float
    high: float
    found: bool


def holm_p(p: Sequence[float]) -> list[float]:
    """Return p-values by Holm's correction, in the order of those given."""
    return [float(corrected) for corrected in multipletests(p, LEVEL, "holm")[1]] if len(p) else []


def holm(differences: Sequence[Difference], planned: int = 0) -> list[Corrected | None]:
    """Correct for the number of comparisons.

    Args:
        differences: those of one seed have no p, and nothing is said of them.
        planned: how many there are to be, where more than have a p so far.
    """
    known = [d for d in differences if d.p is not None]
    count = max(planned, len(known))
    corrected = holm_p([d.p for d in known if d.p is not None] + [1.0] * (count - len(known)))[: len(known)]
    found = [p <= LEVEL for p in corrected]
    order = sorted(range(len(known)), key=lambda i: known[i].p or 0.0)
    results: dict[int, Corrected] = {}
    for rank, i in enumerate(order):
        interval = known[i].interval(LEVEL / (count - min(rank, sum(found))))
        assert interval is not None  # it has a p
        results[id(known[i])] = Corrected(corrected[i], *interval, found[i])
    return [results.get(id(d)) for d in differences]


@dataclass(frozen=True)
class Equivalence:
    """Whether a difference is shown to be small, by two one-sided tests (Schuirmann 1987).

    Args:
        low, high: the 90 % interval, which both tests at 5 % come down to.
        margin: what counts as small, named before the runs.
    """

    low: float
    high: float
    margin: float

    @property
    def shown(self) -> bool:
        """Whether the interval lies within ± margin. Where not, equality has not been shown, nor a difference."""
        return -self.margin < self.low and self.high < self.margin

    @property
    def excluded(self) -> bool:
        """Whether it lies beyond the margin, to one side."""
        return self.high < -self.margin or self.margin < self.low


def equivalence(mean: float, error: float, freedom: float, margin: float = MARGIN) -> Equivalence:
    """Test whether a difference lies within ± margin.

    Args:
        mean: the difference.
        error: its standard error.
        freedom: degrees of freedom that the error is estimated with.
        margin: above 0.

    Example:
        >>> gained = paired([0.953, 0.961, 0.958], [0.960, 0.962, 0.966])  # three seeds
        >>> equivalence(gained.mean, gained.std / math.sqrt(3), freedom=2).shown
        True
    """
    half = float(student.ppf(1 - LEVEL, freedom)) * error
    return Equivalence(mean - half, mean + half, margin)


@dataclass(frozen=True)
class Rank:
    """Spearman's rank correlation, with its 95 % interval by a bootstrap that draws what is compared anew.

    Args:
        rho: the correlation; None where one of the two numbers is the same everywhere.
        low, high: percentiles of the resamples that have a correlation; None where fewer than half have, or where
            fewer than eight are compared: a perfect order of four has chance 1/12, and an interval of no width.
        count: of what is compared.
    """

    rho: float | None
    low: float | None
    high: float | None
    count: int


def rank(x: Sequence[float], y: Sequence[float], seed: int = 0) -> Rank:
    """Correlate two numbers of each of several things, such as runs; without a third one there is nothing to say."""
    pairs = np.array([x, y], dtype=float)  # [2, n]
    count = pairs.shape[1]
    if count < 3 or not np.isfinite(pairs).all():
        return Rank(None, None, None, count)
    rho = float(_spearman(pairs))
    if count < _ENOUGH_RANKED:
        return Rank(None if math.isnan(rho) else rho, None, None, count)
    drawn = np.random.default_rng(seed).integers(count, size=(_RESAMPLES, count))
    found = _spearman(pairs[:, drawn])
    found = found[~np.isnan(found)]
    if math.isnan(rho) or len(found) < _RESAMPLES / 2:
        return Rank(None if math.isnan(rho) else rho, None, None, count)
    low, high = np.percentile(found, [100 * LEVEL / 2, 100 * (1 - LEVEL / 2)]).tolist()
    return Rank(rho, low, high, count)


def _spearman(pairs: NDArray[np.float64]) -> NDArray[np.float64]:  # [2, ..., n] -> [...]
    ranks = rankdata(pairs, axis=-1)
    x, y = ranks - ranks.mean(-1, keepdims=True)
    size = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.divide((x * y).sum(-1), size, out=np.full_like(size, math.nan), where=size > 0)
