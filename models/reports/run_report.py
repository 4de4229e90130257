"""A report of training runs: one HTML page that needs no other file, made of what other commands left in their folders.

Each part of a run's section is made from files of one command; a part whose files are not there says which command
makes them.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import runs
from models.evaluation.outcomes import digest
from models.figures import training
from models.reports import bounds, evaluation, html
from models.reports.tables import NONE, Table, number, share, within
from models.runs import RunError, trained
from models.runs.settings import completed
from models.support import files

PARTS = ("evaluation", "bounds", "distributions", "curves")
_PICTURES = {
    "evaluation/attacks.png": "Accuracy on test images under each attack, with 95 % Wilson intervals.",
    "evaluation/curves.png": "Accuracy along radius, steps and restarts of PGD; bands are 95 % intervals, the dashed "
    "line is the radius asked.",
    "bounds/bounds.png": "Bounds of the Lipschitz constant from above and below, and accuracy that is certified or "
    "survives the attack.",
    "distributions/distributions.png": "Inputs of activations on clean and on adversarial images, with the learned "
    "curve over them.",
    "distributions/outputs.png": "Outputs of activations on clean and on adversarial images.",
    "distributions/layers.png": "How far an attack moves activations, layer by layer.",
    "curves/curves.png": "Learned curves by epoch.",
    "curves/curves.gif": "The same as an animation.",
    "curves/dictionary.png": "Which parts of the dictionary inputs use, and what share of them lies outside.",
}
_EPOCH: dict[str, tuple[str, Callable[[Any], str]]] = {
    "epoch": ("epoch", str),
    "loss": ("loss", "{:.4f}".format),
    "accuracy": ("accuracy in training", share),
    "clean": ("held out, clean", share),
    "robust": ("held out, robust", share),
    "outside": ("inputs outside the dictionary", share),
    "lr": ("last learning rate", "{:.3g}".format),
    "seconds": ("time", "{:.1f} s".format),
}


@dataclass(frozen=True)
class RunReport:
    """What is there of one run.

    Args:
        label: of the run on the page.
        folder: of the run.
        settings, environments: of run.json.
        history: lines of metrics.jsonl.
        evaluation, bounds: contents of evaluation.json and bounds.json, None where not made yet.
        states: of each part that is there, the state of the network it is about, and whether the run still has it.
        pictures: of each part, the figures that are there, PNG or GIF, with their captions.
    """

    label: str
    folder: Path
    settings: dict[str, Any]
    environments: list[dict[str, Any]]
    history: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    bounds: dict[str, Any] | None
    states: dict[str, tuple[str, bool]]
    pictures: dict[str, list[tuple[bytes, str]]]


def read(folder: Path, label: str) -> RunReport:
    """Read what commands left in a run's folder.

    Raises:
        RunError: the folder is no training run, or a file in it is damaged.
    """
    settings = runs.read_settings(folder)
    if "activation" not in settings or "training" not in settings:
        raise RunError(f"{folder} is no training run: its run.json has no activation or training")
    record = files.read_json(folder / "run.json")
    there = {folder / name: caption for name, caption in _PICTURES.items() if (folder / name).is_file()}
    return RunReport(
        label,
        folder,
        settings,
        record["environments"],
        _history(folder / "metrics.jsonl"),
        _json(folder / "evaluation/evaluation.json", ("clean", "robust", "worst_case", "checks", "masking", "classes")),
        _json(folder / "bounds/bounds.json", ("upper", "lower", "layers")),
        {part: state for part in PARTS if (state := _state(folder, part)) is not None},
        {part: [(p.read_bytes(), c) for p, c in there.items() if p.parent.name == part] for part in PARTS},
    )


def page(reports: Sequence[RunReport], command: str) -> str:
    """Return the page."""
    names = ", ".join(report.label for report in reports)
    return html.page(
        "runs.html",
        title=f"kafops: {names}",
        names=names,
        command=command,
        runs=reports,
        summary=_summary(reports),
        differing=_differing([completed(report.settings) for report in reports]),
        training=training,
        epochs=_epochs,
        evaluation=evaluation,
        bounds=bounds,
    )


def _summary(reports: Sequence[RunReport]) -> Table:
    table = Table("run", "network", "clean", "worst attack", "Lipschitz bound", "largest stretch found")
    for report in reports:
        settings, found, bound = report.settings, report.evaluation, report.bounds
        of = f"{settings['activation']} in {settings['network']}, {settings['training']['method']}"
        accuracies = [NONE] * 2 if found is None else [within(found["clean"]), within(found["worst_case"])]
        constants = [NONE] * 2 if bound is None else [number(bound["upper"], "∞"), number(bound["lower"])]
        table.add(report.label, of, *accuracies, *constants)
    return table


def _epochs(history: Sequence[Mapping[str, Any]]) -> Table:
    columns = [name for name in _EPOCH if any(line.get(name) is not None for line in history)]
    table = Table(*(_EPOCH[name][0] for name in columns))
    for line in history:
        table.add(*(NONE if line.get(name) is None else _EPOCH[name][1](line[name]) for name in columns))
    return table


def _state(folder: Path, part: str) -> tuple[str, bool] | None:
    content = _json(folder / part / f"{part}.json", ("which",))
    if content is None:
        return None
    checkpoint = folder / trained.WHICH[content["which"]]
    about = content["checkpoint"] if "checkpoint" in content else content["identity"]["checkpoint"]
    return content["which"], not checkpoint.is_file() or digest(checkpoint) == about


def _history(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); the command that trained the run writes it anew") from error


def _json(path: Path, wanted: Iterable[str]) -> dict[str, Any] | None:
    try:
        content = files.read_json(path)
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON ({error}); remove it and make it anew") from error
    if content is not None and not (isinstance(content, dict) and all(name in content for name in wanted)):
        raise RunError(f"{path} is of another version; remove it and make it anew")
    return content


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    first, *others = (runs.flat(of_one) for of_one in settings)
    return [name for name in first if any(other.get(name) != first[name] for other in others)]
