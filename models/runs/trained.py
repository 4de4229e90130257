"""A trained network, read back from its run folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from models import data, networks, runs
from models.data import DataSet
from models.support import checkpoints
from models.training.trainer import BEST, LATEST

WHICH = {"best": BEST, "latest": LATEST}


@dataclass(frozen=True)
class Trained:
    """A network in evaluation mode, the settings it was trained with, and its data."""

    model: nn.Module
    settings: dict[str, Any]
    data: DataSet
    checkpoint: Path


def load(run: Path, which: str = "best", root: Path | None = None) -> Trained:
    """Rebuild the network of a run folder, with its weights, their average where one was kept.

    Args:
        run: a folder that `python -m models train` has made.
        which: "best", the state with the best robust accuracy on held-out images, or "latest".
        root: where data sets lie, see `models.data.load`.

    Raises:
        RunError: the folder is no such run, or holds no such checkpoint yet.
        CheckpointError: the checkpoint is damaged, or of another network.
        DataError: the data set cannot be had.
    """
    if which not in WHICH:
        raise ValueError(f"which must be best or latest, got {which!r}")
    settings = runs.read_settings(run)
    missing = [name for name in ("data", "network", "activation", "seed") if name not in settings]
    if missing:
        raise runs.RunError(f"{run} is no training run: its run.json has no {', '.join(missing)}")
    path = run / WHICH[which]
    if not path.exists():
        others = [name for name, file in WHICH.items() if (run / file).exists()]
        hint = f"; there is {' and '.join(others)}" if others else "; it has not finished an epoch"
        raise runs.RunError(f"{run} has no {path.name}{hint}")
    try:
        sets = data.load(settings["data"], settings["seed"], root)
        model = networks.build(settings["network"], settings["activation"], sets.images, settings["seed"])
    except ValueError as error:
        raise runs.RunError(f"{run}/run.json is of another version: {error}") from error
    checkpoints.load_weights(model, checkpoints.weights(checkpoints.load(path)[0]), path)
    return Trained(model.eval(), settings, sets, path)
