"""Ratios that survive a busy machine: candidate and baseline take turns, and each pair of neighbours gives one ratio.

pytest-benchmark times the candidate. Before each of its rounds this module times a copy and the baseline, so that a
change of the machine's speed meets all three; the median of the pairs' ratios is the result, with its 20th and 80th
percentiles. Each is called once untimed before it is timed, so that none pays for the caches another has emptied.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

WARMUP_ROUNDS = 2
Timer = Callable[[], float]
Work = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """The median of some numbers, with the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def take_turns(
    benchmark: Any, candidate: Work, baseline: Work, copy: Work, rounds: int, timer: Timer = time.perf_counter
) -> dict[str, list[float]]:
    """Time copy, baseline and candidate in turn, the candidate by `benchmark`; return the others' seconds per round."""
    seconds: dict[str, list[float]] = {"copy": [], "baseline": []}

    def before() -> None:
        for name, work in (("copy", copy), ("baseline", baseline)):
            work()
            start = timer()
            work()
            seconds[name].append(timer() - start)
        candidate()

    benchmark.pedantic(candidate, setup=before, rounds=rounds, warmup_rounds=WARMUP_ROUNDS)
    return {name: taken[WARMUP_ROUNDS : WARMUP_ROUNDS + rounds] for name, taken in seconds.items()}


def repeated(work: Work, calls: int) -> Work:
    """Make many calls one, for work too small for the timer."""
    if calls == 1:
        return work

    def many() -> None:
        for _ in range(calls):
            work()

    return many


def spread(numbers: Sequence[float]) -> Spread:
    """Return median, 20th and 80th percentile."""
    return Spread(*(percentile(numbers, q) for q in (0.5, 0.2, 0.8)))


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Return the spread of the ratios of numbers measured in the same round."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def percentile(numbers: Sequence[float], q: float) -> float:
    """Return the q-quantile, 0 to 1, by linear interpolation."""
    if not numbers:
        raise ValueError("numbers must hold at least one number, got none")
    ordered = sorted(numbers)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
