from collections.abc import Callable

import pytest

from bench.paired import WARMUP_ROUNDS, Spread, percentile, ratios, repeated, spread, take_turns


class Clock:
    """A timer that only work moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: Callable[[int], float]) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds(self.log.count(name))
            self.log.append(name)

        return call


class Pedantic:
    """The part of pytest-benchmark's fixture that is used."""

    def pedantic(self, target, setup, rounds, warmup_rounds):
        for _ in range(warmup_rounds + rounds):
            setup()
            target()


def test_copy_baseline_and_candidate_take_turns_each_warm():
    clock = Clock()
    copy, baseline, candidate = (clock.work(name, lambda n: 1.0) for name in ("copy", "baseline", "candidate"))
    take_turns(Pedantic(), candidate, baseline, copy, rounds=2, timer=clock)
    turn = ["copy", "copy", "baseline", "baseline", "candidate", "candidate"]
    assert clock.log == turn * (WARMUP_ROUNDS + 2)


def test_seconds_are_of_the_second_call_of_the_rounds_after_the_warmup():
    clock = Clock()
    copy = clock.work("copy", lambda n: 0.25)
    baseline = clock.work("baseline", lambda n: 100.0 if n % 2 == 0 else n)  # the n-th call
    seconds = take_turns(Pedantic(), clock.work("candidate", lambda n: 7.0), baseline, copy, rounds=3, timer=clock)
    assert seconds["copy"] == [0.25] * 3
    first = 2 * WARMUP_ROUNDS + 1
    assert seconds["baseline"] == [first, first + 2, first + 4]


def test_a_change_of_the_machines_speed_leaves_the_ratio():
    speed = [1.0, 1.0, 3.0, 10.0, 10.0]
    assert ratios([2 * s for s in speed], [4 * s for s in speed]) == Spread(0.5, 0.5, 0.5)


def test_ratio_is_the_median_of_ratios_not_the_ratio_of_medians():
    assert ratios([1.0, 2.0, 9.0], [1.0, 4.0, 3.0]).median == 1.0


@pytest.mark.parametrize(
    ("q", "expected"), [(0.0, 1.0), (0.2, 1.8), (0.5, 3.0), (0.8, 4.2), (1.0, 5.0), (0.25, 2.0), (0.375, 2.5)]
)
def test_percentile_interpolates(q, expected):
    assert percentile([5.0, 1.0, 4.0, 2.0, 3.0], q) == pytest.approx(expected)


def test_percentile_of_one_number_is_that_number():
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)


def test_percentile_of_nothing_raises():
    with pytest.raises(ValueError, match="got none"):
        percentile([], 0.5)


def test_repeated_calls_many_times():
    calls = []
    repeated(lambda: calls.append(1), 5)()
    assert len(calls) == 5
