import pytest
import torch

from models.evaluation import Gradients, sanity
from models.evaluation.sanity import FAIL, INCONCLUSIVE, PASS, WARNING, Attacked, Comparison, Verdict


def broken(*images: int, of: int = 200) -> torch.Tensor:
    found = torch.zeros(of, dtype=torch.bool)
    found[list(images)] = True
    return found


def attacked(name: str, start: int, end: int, of: int = 200) -> Attacked:
    """An attack that breaks the images from `start` to `end`."""
    return Attacked(name, broken(*range(start, end), of=of))


@pytest.mark.parametrize(
    ("beyond", "of", "result", "least"),
    [
        (
            5,
            200,
            PASS,
            "would have failed from 17 images on",
        ),  # Wilson's interval of 17 begins at 5.4 %, of 16 at 4.98
        (10, 200, PASS, ""),
        (11, 200, WARNING, ""),
        (34, 200, FAIL, ""),  # 73.5 % under PGD, 56.5 % under AutoAttack
        (60, 200, FAIL, ""),  # 47 and 17 %
        (1, 1, FAIL, ""),
    ],
)
def test_a_thorough_attack_that_finds_much_more(beyond: int, of: int, result: str, least: str) -> None:
    usual, thorough = attacked("PGD", 0, 0, of), attacked("AutoAttack", 0, beyond, of)
    verdict = sanity.finds_little_more("gap", usual, thorough)
    assert verdict.result == result
    assert f"AutoAttack breaks {beyond} of {of} images beyond those that PGD does" in verdict.evidence
    assert verdict.evidence.endswith(least)
    # What PGD alone breaks is of no account: it is no sign that PGD failed.
    both = attacked("AutoAttack and not all of PGD", 0, beyond // 2, of)
    assert sanity.finds_little_more("gap", thorough, both).result == (PASS if of > 1 else INCONCLUSIVE)


def test_a_check_that_could_not_fail_is_inconclusive() -> None:
    """7 images that only one attack breaks are the fewest that are no noise, and 17 of 200 the fewest beyond 5 %."""
    for left, result in ((7, PASS), (6, INCONCLUSIVE), (0, INCONCLUSIVE)):
        stronger = attacked("PGD", 0, 200 - left)
        assert sanity.never_beats("check", stronger, stronger).result == result
        assert sanity.more_never_helps("steps", [stronger, stronger]).result == result
    assert sanity.never_beats("check", attacked("FGSM", 0, 193), attacked("PGD", 0, 193)).evidence == (
        "FGSM alone breaks 0 of 200 images, PGD alone 0; it would have failed from 7 images on"
    )
    for left, result in ((17, PASS), (16, INCONCLUSIVE)):
        usual = attacked("PGD", 0, 200 - left)
        assert sanity.finds_little_more("gap", usual, usual).result == result
    assert sanity.falls_to_chance("ε", attacked("PGD", 0, 3, 3), classes=2).result == INCONCLUSIVE
    assert sanity.falls_to_chance("ε", attacked("PGD", 0, 4, 4), classes=2).result == PASS


@pytest.mark.parametrize(
    ("more", "fewer", "p"),
    [(0, 0, 1.0), (1, 0, 0.5), (3, 0, 1 / 8), (2, 2, 11 / 16), (7, 0, 1 / 128), (9, 1, 11 / 1024)],
)
def test_sign_test_by_hand(more: int, fewer: int, p: float) -> None:
    assert sanity.sign_test(more, fewer) == pytest.approx(p)


def test_comparisons_count_images_that_one_attack_breaks_alone() -> None:
    found = sanity.compare(broken(0, 1, 2, 3), broken(2, 3, 4))
    assert found == Comparison(only_weaker=2, only_stronger=1, total=200, left=197)
    assert found.excess == 1
    with pytest.raises(ValueError, match="attacks on the same images are compared, got 200 and 100 images"):
        sanity.compare(broken(1), broken(1, of=100))


@pytest.mark.parametrize(
    ("found", "significant"),
    [
        (Comparison(6, 0, 200, left=0), False),  # p = 1/64
        (Comparison(7, 0, 200, left=0), True),  # p = 1/128
        (Comparison(9, 1, 200, left=0), False),  # p = 11/1024
        (Comparison(40, 10, 200, left=0), True),
        (Comparison(10, 40, 200, left=0), False),
        (Comparison(19, 0, 10_000, left=0), False),  # not noise, but below 0.2 %
        (Comparison(21, 0, 10_000, left=0), True),
    ],
)
def test_a_difference_must_be_neither_noise_nor_small(found: Comparison, significant: bool) -> None:
    assert found.significant is significant


@pytest.mark.parametrize(
    ("alone", "of", "result"),
    [
        (0, 200, PASS),
        (1, 200, PASS),  # 0.5 %, but one image
        (2, 200, WARNING),
        (2, 2000, PASS),
        (5, 2000, WARNING),
        (50, 200, FAIL),
    ],
)
def test_the_weaker_attack_must_not_win(alone: int, of: int, result: str) -> None:
    """The stronger one breaks 10 images, the weaker one half of them and `alone` others."""
    weaker = Attacked("NES", broken(*range(5), *range(10, 10 + alone), of=of))
    verdict = sanity.never_beats("check", weaker, attacked("PGD", 0, 10, of))
    assert verdict.result == result
    assert verdict.evidence.startswith(f"NES alone breaks {alone} of {of} images, PGD alone 5")
    assert ("use both" in verdict.evidence) is (result == WARNING)


def test_a_weaker_attack_that_is_ahead_by_luck_does_not_fail() -> None:
    weaker, stronger = attacked("FGSM", 0, 23), attacked("PGD", 3, 20)
    verdict = sanity.never_beats("check", weaker, stronger)
    assert verdict.result == WARNING


def test_more_steps_must_not_help() -> None:
    falling = [attacked("PGD-1", 0, 20), attacked("PGD-10", 0, 60), attacked("PGD-50", 0, 61)]
    verdict = sanity.more_never_helps("steps", falling)
    assert verdict.result == PASS
    assert verdict.evidence.startswith("accuracy goes from 90.0% with PGD-1 to 69.5% with PGD-50; it would have failed")
    wavering = [*falling, attacked("PGD-100", 0, 59)]
    assert sanity.more_never_helps("steps", wavering).result == WARNING
    assert sanity.more_never_helps("steps", [*falling, attacked("PGD-100", 0, 60)]).result == PASS
    verdict = sanity.more_never_helps("steps", [*falling, attacked("PGD-100", 0, 40)])
    assert verdict.result == FAIL
    assert verdict.evidence == "accuracy rises from 70.0% with PGD-10 to 80.0% with PGD-100 (20 of 200 images)"


def test_a_slow_rise_is_seen_between_points_that_are_no_neighbours() -> None:
    """Each step to the next is noise; from the first to the last it is not."""
    curve = [attacked(f"PGD-{n}", 0, 60 - 4 * n) for n in range(4)]
    verdict = sanity.more_never_helps("steps", curve)
    assert verdict.result == FAIL
    assert "from 70.0% with PGD-0 to 76.0% with PGD-3" in verdict.evidence


def test_a_longer_curve_has_more_pairs_that_may_rise_by_luck() -> None:
    """Nine images have p = 1/512: below 1 % for one pair, above a sixth of it for the six pairs of four points."""
    ends = [attacked("PGD-1", 0, 60), attacked("PGD-50", 0, 51)]
    assert sanity.more_never_helps("steps", ends).result == FAIL
    assert sanity.more_never_helps("steps", [ends[0], ends[0], ends[1], ends[1]]).result == WARNING


def test_a_curve_has_two_points() -> None:
    with pytest.raises(ValueError, match="a curve needs at least two points, got 1"):
        sanity.more_never_helps("steps", [attacked("PGD-1", 0, 20)])


@pytest.mark.parametrize(("left", "result"), [(0, PASS), (20, PASS), (25, WARNING), (60, FAIL)])
def test_any_image_within_reach_leaves_chance(left: int, result: str) -> None:
    verdict = sanity.falls_to_chance("ε", attacked("PGD at ε = 1", left, 200), classes=10)
    assert verdict.result == result
    assert verdict.evidence.startswith(f"accuracy is {left / 200:.1%} with PGD at ε = 1, guessing gives 10.0%")


@pytest.mark.parametrize(
    ("gradients", "result"),
    [
        (Gradients(100, 0, 0, 0.3), PASS),
        (Gradients(100, 1, 0, 0.3), WARNING),
        (Gradients(100, 5, 0, 0.3), WARNING),
        (Gradients(100, 6, 0, 0.3), FAIL),
        (Gradients(100, 0, 1, 0.3), FAIL),
        (Gradients(0, 0, 0, 0.0), INCONCLUSIVE),
    ],
)
def test_gradients_must_be_there(gradients: Gradients, result: str) -> None:
    verdict = sanity.has_gradients("gradients", gradients)
    assert verdict.result == result
    assert f"of {gradients.total} images classified correctly {gradients.zero} have" in verdict.evidence


def test_masking_is_named() -> None:
    good, doubt, bad = Verdict("a", PASS, "A"), Verdict("b", WARNING, "B"), Verdict("c", FAIL, "C")
    assert sanity.masking([good, doubt, bad, bad]) == "gradient masking: likely, because C; C"
    assert sanity.masking([good, doubt]) == "gradient masking: possible, because B"
    blind = Verdict("d", INCONCLUSIVE, "D")
    assert sanity.masking([good, good]) == "gradient masking: no sign of it in 2 checks"
    unsaid = "; 1 more are inconclusive, as too few images are left"
    assert sanity.masking([good, blind]) == "gradient masking: no sign of it in 1 checks" + unsaid
    assert sanity.masking([blind]) == "gradient masking: not checked, too few images are left for 1 checks"
    assert sanity.masking([]) == "gradient masking: not checked"
