"""Signs that an attack failed where the network is weak: the checks of Carlini et al. 2019, with a verdict each.

Reported robustness is an upper bound: the attack may have missed what is there, most often because the network's
gradient hides it (gradient masking). Each check compares what must hold of any attack that works. Attacks are compared
image by image on the same images, so that the luck of the choice of images cancels out, and only images count that one
of the two breaks and the other does not. A difference is noise unless a one-sided sign test over them has p < 1 %,
divided by the number of pairs that a check compares, and it is too small to matter up to 0.2 % of the images, the share
at which AutoAttack warns of the same thing. Each check says from how many images on it would have failed; where so many
are not there, it is inconclusive.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from scipy.stats import binom
from torch import Tensor

from models.evaluation import Accuracy, Gradients, accuracy

PASS, INCONCLUSIVE, WARNING, FAIL = "pass", "inconclusive", "warning", "fail"
_SMALL, _LEVEL = 0.002, 0.01
_GAP = 0.05  # of the images: what the most thorough attack may break beyond PGD
_ZERO_IMAGES = 0.05  # with more images than that without a gradient, accuracy under gradient attacks means little


@dataclass(frozen=True)
class Verdict:
    """What a check came to: "pass", "inconclusive", "warning" or "fail", and one sentence with the numbers."""

    check: str
    result: str
    evidence: str


@dataclass(frozen=True)
class Attacked:
    """An attack by name, and for which of the images it found something: [N] bool."""

    name: str
    found: Tensor


@dataclass(frozen=True)
class Comparison:
    """Two attacks on the same images: how many are broken by one alone, one of so many pairs that are compared."""

    only_weaker: int
    only_stronger: int
    total: int
    left: int  # that the stronger one does not break
    pairs: int = 1

    @property
    def excess(self) -> int:
        """By how many images the attack that should be weaker breaks more than the other."""
        return self.only_weaker - self.only_stronger

    @property
    def significant(self) -> bool:
        """Whether the excess is neither small nor noise."""
        return self._significant(self.only_weaker)

    @property
    def least(self) -> int | None:
        """From how many images on that the weaker attack alone breaks this would be so; None: there are too few."""
        return next((n for n in range(self.left + 1) if self._significant(n)), None)

    def _significant(self, only_weaker: int) -> bool:
        excess = only_weaker - self.only_stronger
        return excess > _SMALL * self.total and sign_test(only_weaker, self.only_stronger) < _LEVEL / self.pairs


def sign_test(more: int, fewer: int) -> float:
    """Return the probability of at least `more` heads in `more + fewer` tosses of a fair coin."""
    return float(binom.sf(more - 1, more + fewer, 0.5))


def compare(weaker: Tensor, stronger: Tensor, pairs: int = 1) -> Comparison:
    """Compare what two attacks found, [N] bool each, as one of so many pairs."""
    if weaker.shape != stronger.shape:
        raise ValueError(f"attacks on the same images are compared, got {len(weaker)} and {len(stronger)} images")
    only_weaker, only_stronger = int((weaker & ~stronger).sum()), int((stronger & ~weaker).sum())
    return Comparison(only_weaker, only_stronger, len(weaker), int((~stronger).sum()), pairs)


def never_beats(check: str, weaker: Attacked, stronger: Attacked) -> Verdict:
    """Judge that an attack which has less to go on does not find more.

    Fails when the weaker one beats the stronger one for good. Warns when it breaks more than one image, and more than
    0.2 % of them, that the stronger one does not: then neither alone is the whole truth.
    """
    found = compare(weaker.found, stronger.found)
    evidence = (
        f"{weaker.name} alone breaks {found.only_weaker} of {found.total} images, "
        f"{stronger.name} alone {found.only_stronger}"
    )
    if found.significant:
        return Verdict(check, FAIL, evidence)
    if found.only_weaker > max(1, _SMALL * found.total):
        return Verdict(check, WARNING, evidence + ": use both, or a stronger attack")
    return _unless_blind(check, evidence, found.least)


def more_never_helps(check: str, curve: Sequence[Attacked]) -> Verdict:
    """Judge that along a row of ever stronger attacks accuracy never rises; a pair that differs by noise may.

    Warns when the strongest breaks at least two images, and 0.2 %, less than one before it.
    """
    if len(curve) < 2:
        raise ValueError(f"a curve needs at least two points, got {len(curve)}")
    count = math.comb(len(curve), 2)
    pairs = [(a, b, compare(a.found, b.found, count)) for a, b in combinations(curve, 2)]
    for a, b, found in pairs:
        if found.significant:
            return Verdict(check, FAIL, f"accuracy rises from {_share(a.found)} with {a.name} to {_rise(b, found)}")
    a, b, found = max(pairs, key=lambda pair: pair[2].excess)
    if found.excess > max(1, _SMALL * found.total):
        return Verdict(
            check, WARNING, f"accuracy rises from {_share(a.found)} with {a.name} to {_rise(b, found)}; perhaps noise"
        )
    first, last = curve[0], curve[-1]
    evidence = f"accuracy goes from {_share(first.found)} with {first.name} to {_share(last.found)} with {last.name}"
    rises = [found.least - found.only_stronger for _, _, found in pairs if found.least is not None]
    return _unless_blind(check, evidence, min(rises, default=None), "a rise of")


def finds_little_more(check: str, usual: Attacked, thorough: Attacked) -> Verdict:
    """Judge that an attack of many kinds breaks few images that the usual one, by gradient, leaves.

    Where it breaks many, the usual one's gradients did not lead there: the network hides something, and perhaps more
    than the thorough one finds too. Fails when the 95 % interval of the share of such images lies above 5 %, and warns
    when only the share does. Says from how many images on it would have failed.
    """
    found = compare(usual.found, thorough.found)
    beyond = found.only_stronger

    def surely(count: int) -> bool:
        return Accuracy(count, found.total).interval[0] > _GAP

    left = int((~usual.found).sum())
    evidence = f"{thorough.name} breaks {beyond} of {found.total} images beyond those that {usual.name} does"
    if surely(beyond):
        return Verdict(check, FAIL, evidence)
    if beyond > _GAP * found.total:
        return Verdict(check, WARNING, evidence)
    return _unless_blind(check, evidence, next((n for n in range(left + 1) if surely(n)), None))


def falls_to_chance(check: str, largest: Attacked, classes: int) -> Verdict:
    """Judge that under an attack which may change the image completely, accuracy is that of guessing at most.

    Fails when the 95 % interval lies above 1 / classes, and warns when only the accuracy does.
    """
    chance, now = 1 / classes, accuracy(largest.found)
    evidence = f"accuracy is {now.value:.1%} with {largest.name}, guessing gives {chance:.1%}"
    if now.interval[0] > chance:
        return Verdict(check, FAIL, evidence)
    if now.value > chance:
        return Verdict(check, WARNING, evidence)
    right = (n for n in range(now.total + 1) if Accuracy(n, now.total).interval[0] > chance)
    return _unless_blind(check, evidence, next(right, None))


def has_gradients(check: str, gradients: Gradients) -> Verdict:
    """Judge that the gradient is finite and not exactly 0.

    Fails when it is not finite for an image or 0 for more than 5 % of them, and warns when it is 0 for any.
    """
    evidence = (
        f"of {gradients.total} images classified correctly {gradients.zero} have a gradient of exactly 0 and "
        f"{gradients.bad} one that is not finite; {gradients.zero_pixels:.1%} of all pixels' gradients are 0"
    )
    if gradients.bad or gradients.zero > _ZERO_IMAGES * gradients.total:
        return Verdict(check, FAIL, evidence)
    if gradients.zero:
        return Verdict(check, WARNING, evidence)
    fails = math.floor(_ZERO_IMAGES * gradients.total) + 1
    return _unless_blind(check, evidence, fails if fails <= gradients.total else None)


def masking(verdicts: Sequence[Verdict]) -> str:
    """Say in one sentence what the verdicts say together about gradient masking."""
    for result, word in ((FAIL, "likely"), (WARNING, "possible")):
        reasons = [verdict.evidence for verdict in verdicts if verdict.result == result]
        if reasons:
            return f"gradient masking: {word}, because {'; '.join(reasons)}"
    blind = sum(verdict.result == INCONCLUSIVE for verdict in verdicts)
    if blind == len(verdicts):
        return "gradient masking: not checked" + (f", too few images are left for {blind} checks" if blind else "")
    unsaid = f"; {blind} more are inconclusive, as too few images are left" if blind else ""
    return f"gradient masking: no sign of it in {len(verdicts) - blind} checks{unsaid}"


def _unless_blind(check: str, evidence: str, least: int | None, what: str = "") -> Verdict:
    """Pass a check that would have failed from so many images on; None: there are too few for it to fail."""
    if least is None:
        return Verdict(check, INCONCLUSIVE, f"{evidence}; too few images are left for the check to fail")
    return Verdict(check, PASS, f"{evidence}; it would have failed from {f'{what} ' if what else ''}{least} images on")


def _share(found: Tensor) -> str:
    return f"{accuracy(found).value:.1%}"


def _rise(later: Attacked, found: Comparison) -> str:
    return f"{_share(later.found)} with {later.name} ({found.excess} of {found.total} images)"
