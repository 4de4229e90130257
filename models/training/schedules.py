"""Learning rates as functions of training's progress: a factor of the peak rate, by name."""

import math
from collections.abc import Callable

from models.registry import Registry

Schedule = Callable[[float], float]  # epochs done, a fraction inside an epoch -> factor in [0, 1]

SCHEDULES: Registry[Schedule] = Registry("schedule")


@SCHEDULES.register("triangular", "cyclic")
def triangular(epochs: int, *, peak: float = 0.5, floor: float = 0.0) -> Schedule:
    """Rise from `floor` to 1 at `peak` of training and fall back to `floor`: one cycle.

    The peak is at 1/2 in Wong et al. 2020 and N-FGSM, at 0.4 in GradAlign. Rates from 0.0001 to 0.08 and back are
    lr = 0.08 with floor=0.0001/0.08.
    """
    if not 0 < peak < 1:
        raise ValueError(f"peak must be inside (0, 1), got {peak}")
    if not 0 <= floor <= 1:
        raise ValueError(
            f"floor, the part of the peak rate that training starts and ends with, must be in [0, 1], got {floor}"
        )

    def factor(epoch: float) -> float:
        return floor + (1 - floor) * min(epoch / (peak * epochs), (epochs - epoch) / ((1 - peak) * epochs))

    return factor


@SCHEDULES.register("piecewise")
def piecewise(epochs: int, *, at: str = "1/2;3/4", gamma: float = 0.1, warmup: float = 0.0) -> Schedule:
    """Rise linearly for `warmup` epochs, stay, and multiply by `gamma` at each place in `at`.

    Places are epochs, such as 30;60;90, or parts of training below 1, such as 1/2;3/4.
    """
    places = [_place(text, epochs) for text in at.split(";")]
    if not (0 <= warmup < epochs and 0 < gamma <= 1):
        raise ValueError(f"warmup must be in [0, {epochs}) and gamma in (0, 1], got {warmup:g} and {gamma:g}")
    if places != sorted(places):
        raise ValueError(f"the places of a piecewise schedule must rise, got {at}")

    def factor(epoch: float) -> float:
        rise = min(1.0, epoch / warmup) if warmup else 1.0
        return rise * gamma ** sum(epoch >= place for place in places)

    return factor


@SCHEDULES.register("cosine")
def cosine(epochs: int, *, warmup: float = 0.0) -> Schedule:
    """Rise linearly for `warmup` epochs and fall to 0 as half a cosine (Loshchilov and Hutter 2017)."""

    def factor(epoch: float) -> float:
        if epoch < warmup:
            return epoch / warmup
        return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))

    if not 0 <= warmup < epochs:
        raise ValueError(f"warmup must be at least 0 and less than the {epochs} epochs, got {warmup}")
    return factor


@SCHEDULES.register("constant")
def constant(epochs: int) -> Schedule:
    """Stay at 1."""
    return lambda epoch: 1.0


def step_progress(step: int, steps: int) -> float:
    """Place step 0, ..., steps - 1 strictly inside (0, 1), so that no step has learning rate 0."""
    return (step + 1) / (steps + 1)


def _place(text: str, epochs: int) -> float:
    numerator, _, denominator = text.partition("/")
    try:
        place = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"places of a piecewise schedule are epochs or fractions with ; between, got {text!r}"
        ) from None
    place = place * epochs if place < 1 else place
    if not 0 < place < epochs:
        raise ValueError(f"place {text} of a piecewise schedule is not inside its {epochs} epochs")
    return place
