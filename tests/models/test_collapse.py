"""Plain FGSM loses all robustness within an epoch (catastrophic overfitting), and the watch sees it."""

import dataclasses
from pathlib import Path

import pytest

from models.runs import session
from models.runs.settings import Settings
from models.training import Recipe

# Found by trying: smaller eps does not collapse, larger is not learnt.
SETTINGS = Settings(
    "mnist5k:train=2000,test=200",
    "vgg:width=8,dense=32,dropout=no,patch=2",
    "relu",
    Recipe(25, 50, 0.05, method="fgsm", eps=0.22),
)


def test_fgsm_collapses_and_the_watch_catches_it(tmp_path: Path) -> None:
    run = session.prepare(SETTINGS, tmp_path)
    run.run()
    assert run.collapsed
    before, last = run.history[-2], run.history[-1]
    assert last.robust < run.best - 0.2
    assert last.robust < 0.25
    # What makes it treacherous: to the attack that it trains with, the network looks better than before.
    assert last.accuracy > before.accuracy
    assert last.clean > 0.8
    assert run.watch.look(run.result, run.device).robust == run.best


@pytest.mark.slow  # half a minute
def test_nfgsm_in_its_place_does_not_collapse(tmp_path: Path) -> None:
    """The same epochs that FGSM needs to collapse."""
    recipe = dataclasses.replace(SETTINGS.training, method="nfgsm:k=2", lr=0.1)
    run = session.prepare(dataclasses.replace(SETTINGS, training=recipe), tmp_path)
    run.run()
    assert not run.collapsed
    assert len(run.history) == 25
    assert run.history[-1].robust > 0.3
