"""A learning rate that grows step by step: which ones are too small, which too large (Smith 2017)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from models import data
from models.runs import session
from models.runs.settings import Settings
from models.training.optimizer import set_learning_rate
from models.training.processes import Processes, device
from models.training.trainer import Trainer, TrainingError

_SMOOTHING = 0.9  # of the loss, an exponential average over steps
_FALL = 0.97  # of the first loss: less than that is noise
_DIVERGED = 4.0  # times the lowest smoothed loss


@dataclass(frozen=True)
class Range:
    """Losses over learning rates, and the range that they suggest: from where the loss falls to where it is lowest.

    Where it never falls, there is no range: low and high are None.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]  # of each step
    smoothed: tuple[float, ...]
    low: float | None
    high: float | None
    diverged: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @property
    def verdict(self) -> str:
        """What to make of it, in a sentence."""
        end = f"it diverges above {self.rates[-1]:.2g}" if self.diverged else "it did not diverge"
        if self.low is None:
            return (
                f"The loss never fell in {len(self.rates)} steps, and {end}. Give more --steps, a smaller --eps, or "
                "--method standard."
            )
        return (
            f"The loss falls from learning rate {self.low:.2g} on and is lowest at {self.high:.2g}; {end}. A peak "
            "between these, rather the lower, is a good start."
        )


def run(
    settings: Settings,
    low: float,
    high: float,
    steps: int,
    root: Path | None = None,
    on_step: Callable[[float, float], None] = lambda rate, loss: None,
) -> Range:
    """Train a fresh network for at most `steps` steps with rates from `low` to `high`, evenly spaced in the logarithm.

    It ends early where the smoothed loss is 4 times its lowest or not finite.

    Raises:
        TrainingError: the loss is not finite at the lowest learning rates already.
    """
    sets = data.load(settings.data, settings.seed, root)
    model = session.build(settings, sets.images)
    batches = sets.train.batches(settings.training.batch_size)
    recipe = replace(settings.training, epochs=math.ceil(steps / batches), watch_steps=0, schedule="constant", ema=0.0)
    rates: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    diverged = False
    # A sweep saves nothing, so any folder will do.
    trainer = _Sweep(model, recipe, settings.seed, sets.train, None, Path(), Processes(device=device()))
    trainer.rates = [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]
    for loss in trainer.sweep():
        rate = trainer.rates[len(losses)]
        average = loss if not smoothed else _SMOOTHING * smoothed[-1] + (1 - _SMOOTHING) * loss
        diverged = not math.isfinite(loss) or average > _DIVERGED * min(smoothed, default=math.inf)
        if diverged:
            break
        rates.append(rate)
        losses.append(loss)
        smoothed.append(average)
        on_step(rate, loss)
    if len(rates) < 3:
        raise TrainingError(f"the loss diverges at learning rate {low:g} already; begin lower, with --from")
    return _judge(rates, losses, smoothed, diverged)


class _Sweep(Trainer):
    """A trainer whose learning rate is given step by step."""

    rates: list[float]

    def sweep(self) -> Iterator[float]:
        """Yield the loss of each step."""
        with torch.random.fork_rng(devices=[]):
            for epoch in range(self.recipe.epochs):
                for x, y in self.source.shuffled(self.recipe.batch_size, epoch):
                    if self.steps_done >= len(self.rates):
                        return
                    self._progress()
                    before = self.tally.loss
                    try:
                        self._step(self._here(x), self._here(y), False)
                    except TrainingError:
                        yield math.inf
                        return
                    yield (self.tally.loss - before) / len(y)
                self.epoch, self.batch = epoch + 1, 0

    def _set_learning_rate(self, update: int) -> float:
        lr = self.rates[min(self.steps_done, len(self.rates) - 1)]
        set_learning_rate(self.optimizer, lr)
        return lr


def _judge(rates: list[float], losses: list[float], smoothed: list[float], diverged: bool) -> Range:
    lowest = min(range(len(rates)), key=smoothed.__getitem__)
    if smoothed[lowest] > _FALL * smoothed[0]:
        return Range(tuple(rates), tuple(losses), tuple(smoothed), None, None, diverged)
    # The loss falls where it has lost a tenth of what it will lose.
    threshold = smoothed[0] - 0.1 * (smoothed[0] - smoothed[lowest])
    start = next(i for i in range(len(rates)) if smoothed[i] <= threshold or i == lowest)
    return Range(tuple(rates), tuple(losses), tuple(smoothed), rates[start], rates[lowest], diverged)
