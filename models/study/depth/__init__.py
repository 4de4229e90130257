"""Gradients along training: runs of a study without attacks, with the norms of `models.analysis.gradients` by epoch."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from models import data, networks
from models.analysis.gradients import finite, measure
from models.data import DataSet
from models.evaluation import EvaluationError, evaluate_clean
from models.images import ImageFormat
from models.runs import session
from models.study import workers
from models.study.plan import Run, Study
from models.support import files
from models.support.interrupts import Interrupted
from models.training import EpochRecord, Trainer, TrainingError
from models.training.lipschitz import SlopeError

DEPTH = Path(__file__).parent / "depth.json"
_IMAGES = 64
_GRADIENTS = "gradients.json"


def batch(sets: DataSet) -> tuple[Tensor, Tensor]:
    """Return the held-out images on which norms are measured, 64 or as many as there are, and their labels."""
    return sets.validation.tensors(min(_IMAGES, len(sets.validation)))


def start(
    network: str, activation: str, seed: int, form: ImageFormat, images: Tensor, labels: Tensor
) -> dict[str, Any]:
    """Measure a network as it starts: names and seed, and what `page` shows of it.

    "trunk_growth" is the gradient at the output of the first residual block over that at the output of the last one,
    "predicted" what the theory makes of it, for post-activation ResNets. "factor" and "normal_factor" are root mean
    squares over the activations that have them. None stands for what there is not, or is not finite.
    """
    found = measure(networks.build(network, activation, form, seed), images, labels)
    trunk = found.trunk
    factors = [(a.factor, a.normal_factor) for a in found.activations]
    return {
        "network": network,
        "activation": activation,
        "seed": seed,
        "ratio": found.ratio,
        "trunk_growth": finite(trunk[0] / trunk[-1]) if trunk and trunk[0] is not None and trunk[-1] else None,
        "predicted": finite(math.prod(found.growth[1:])) if found.growth else None,
        "factor": _rms([own for own, _ in factors]),
        "normal_factor": _rms([normal for _, normal in factors]),
        "weights": found.weights,
        "signals": found.signals,
    }


def train(study: Study, run: Run, results: Path, folder: Path) -> dict[str, Any]:
    """Do one run of a study, or go on with it, and write its result; of a run that fails, the reason.

    A `workers.Do`: the result has what is wrong on test images, as that of `workers.train_and_attack`, and "gradients":
    by epoch, from 0 on, the ratio of the first to the last gradient norm; of the first seed "layers" too, the norms of
    all layers at the start and at the end. Those of all epochs stay beside the checkpoints.
    """
    place = folder / run.name
    common = workers.described(study, run)
    try:
        trainer = session.prepare(run.settings, place)
        images, labels = batch(data.load(study.data, run.seed))
        kept = _Kept(folder / f"{run.name}.{_GRADIENTS}", trainer, images, labels)
        result = {**common, **_train(study, run, trainer, kept)}
    except KeyboardInterrupt as error:
        raise Interrupted from error
    files.write_result(workers.result_file(results, run), result)
    return result


def _train(study: Study, run: Run, trainer: Trainer, kept: "_Kept") -> dict[str, Any]:
    try:
        trainer.run(lambda t: workers.say(run, f"training, {t.steps_done / t.steps:.0%}"), kept.add)
        images, labels = workers.part(study, run.seed).tensors(study.count())
        clean = evaluate_clean(trainer.result.eval(), images, labels)
    except (TrainingError, SlopeError, EvaluationError) as error:
        return {"error": str(error), "gradients": kept.ratios}
    result = {
        "history": [asdict(epoch) for epoch in trainer.history],
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "wrong": clean.mask,
        "found": {},
        "seconds": {},
        "gradients": kept.ratios,
    }
    if run.seed == study.seeds[0] and kept.records[0]["epoch"] == 0:  # the figure shows one seed, from its start on
        result["layers"] = {"start": kept.records[0], "end": kept.records[-1]}
    return result


class _Kept:
    """Norms by epoch, in a file, so that a run that goes on has those of before."""

    def __init__(self, path: Path, trainer: Trainer, images: Tensor, labels: Tensor) -> None:
        self.path, self.model, self.images, self.labels = path, trainer.model, images, labels
        kept = files.read_json(path) or []
        self.records: list[dict[str, Any]] = [record for record in kept if record["epoch"] <= trainer.epoch]
        # A run that was stopped between the end of an epoch and its measurement is measured now, if no batch is done.
        if trainer.batch == 0 and all(record["epoch"] != trainer.epoch for record in self.records):
            self._add(trainer.epoch)

    @property
    def ratios(self) -> list[dict[str, Any]]:
        """What goes into the result."""
        return [{"epoch": record["epoch"], "ratio": record["ratio"]} for record in self.records]

    def add(self, record: EpochRecord) -> None:
        """Measure after an epoch."""
        self._add(record.epoch)

    def _add(self, epoch: int) -> None:
        found = measure(self.model, self.images, self.labels)
        norms = {"weights": found.weights, "trunk": found.trunk, "signals": found.signals}
        self.records.append({"epoch": epoch, "ratio": found.ratio, **norms})
        files.write_json(self.path, self.records)


def _rms(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    mean = sum(v**2 for v in known) / len(known) if known else math.nan
    return math.sqrt(mean) if math.isfinite(mean) else None
