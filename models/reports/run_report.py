"""A report of training runs: one HTML page that needs no other file, made of what other commands left in their folders.

Each part of a run's section is made from files of one command; a part whose files are not there says which command
makes them.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from models import runs
from models.evaluation.outcomes import digest
from models.figures import training
from models.reports import html
from models.runs import RunError, trained
from models.runs.settings import completed
from models.support import files

_ATTACKS = "Accuracy on test images under each attack, with 95 % Wilson intervals."
_ALONG = (
    "Accuracy along radius, steps and restarts of PGD; bands are 95 % intervals, the dashed line is the radius asked."
)
_INPUTS = "Inputs of activations on clean and on adversarial images, with the learned curve over them."
_OUTPUTS = "Outputs of activations on clean and on adversarial images."
_DEPTH = "How far an attack moves activations, layer by layer."
_STRIP = "Learned curves by epoch."
_USE = "Which parts of the dictionary inputs use, and what share of them lies outside."
_BOUNDS = (
    "Bounds of the Lipschitz constant from above and below, and accuracy that is certified or survives the attack."
)


@dataclass(frozen=True)
class RunReport:
    """What is there of one run.

    Args:
        label: of the run on the page.
        folder: of the run.
        settings, environments: of run.json.
        history: lines of metrics.jsonl.
        evaluation, bounds: contents of evaluation.json and bounds.json, None where not made yet.
    """

    label: str
    folder: Path
    settings: dict[str, Any]
    environments: list[dict[str, Any]]
    history: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    bounds: dict[str, Any] | None


def read(folder: Path, label: str) -> RunReport:
    """Read what commands left in a run's folder.

    Raises:
        RunError: the folder is no training run, or a file in it is damaged.
    """
    settings = runs.read_settings(folder)
    if "activation" not in settings or "training" not in settings:
        raise RunError(f"{folder} is no training run: its run.json has no activation or training")
    record = files.read_json(folder / "run.json")
    return RunReport(
        label,
        folder,
        settings,
        record["environments"],
        _history(folder / "metrics.jsonl"),
        _json(folder / "evaluation/evaluation.json", ("clean", "robust", "worst_case", "checks", "masking", "classes")),
        _json(folder / "bounds/bounds.json", ("upper", "lower", "layers")),
    )


def page(reports: Sequence[RunReport], command: str) -> str:
    """Return the page."""
    names = ", ".join(report.label for report in reports)
    several = len(reports) > 1
    body = f"""
<h1>Report: {escape(names)}</h1>
<pre>{escape(command)}</pre>
{_summary(reports) if several else ""}
{"".join(_section(number, report, several) for number, report in enumerate(reports))}
"""
    return html.page(f"kafops: {names}", body)


def _summary(reports: Sequence[RunReport]) -> str:
    head = ("run", "clean", "worst attack", "Lipschitz bound", "largest stretch found")
    rows = []
    for number, report in enumerate(reports):
        evaluation, bounds = report.evaluation, report.bounds
        rows.append(
            (
                f'<a href="#run{number}">{escape(report.label)}</a><br><small>{escape(_of(report))}</small>',
                "–" if evaluation is None else _percent(evaluation["clean"]),
                "–" if evaluation is None else _percent(evaluation["worst_case"]),
                "–" if bounds is None else _bound(bounds["upper"]),
                "–" if bounds is None else _number(bounds["lower"]),
            )
        )
    differing = _differing([completed(report.settings) for report in reports])
    note = f'<p class="note">The runs differ in: {escape(", ".join(differing) or "nothing")}.</p>'
    return f"<h2>All runs</h2>{html.table(head, rows)}{note}"


def _of(report: RunReport) -> str:
    settings = report.settings
    return f"{settings['activation']} in {settings['network']}, {settings['training']['method']}"


def _section(number: int, report: RunReport, several: bool) -> str:
    parts = [
        ("Training", _training(report)),
        ("Accuracy and attacks", _evaluation(report) + _state(report, "evaluation")),
        ("Lipschitz bounds", _bounds(report) + _state(report, "bounds")),
        (
            "Activations, clean and adversarial",
            _pictures(report, "distributions", _DISTRIBUTIONS) + _state(report, "distributions"),
        ),
        ("Learned curves", _curves(report) + _state(report, "curves")),
        ("Settings", html.pairs(html.flat(report.settings))),
        ("Machine and versions", "".join(html.pairs(html.flat(e)) for e in report.environments)),
    ]
    title = f"<h2>{escape(report.label)}</h2>" if several else ""
    inner = "".join(f"<h3>{escape(name)}</h3>{content}" for name, content in parts)
    return f'<section id="run{number}">{title}{inner}</section>'


def _training(report: RunReport) -> str:
    if not report.history:
        return _missing("python -m models train", "the history of training")
    picture = html.figure(training.draw(report.history), "Accuracy by epoch; robust: under the watch's short attack.")
    columns = [name for name in _EPOCH if any(line.get(name) is not None for line in report.history)]
    rows = [[_EPOCH[name][1](line[name]) if line.get(name) is not None else "–" for name in columns]
            for line in report.history]  # fmt: skip
    table = html.table([_EPOCH[name][0] for name in columns], rows)
    collapsed = [line["epoch"] for line in report.history if line.get("collapsed")]
    note = ""
    if collapsed:
        said = f"Training collapsed in epoch {collapsed[0]} and was stopped; the best state was restored."
        note = f"<p><strong>{said}</strong></p>"
    return f"{picture}{note}<details><summary>Epoch by epoch</summary>{table}</details>"


def _evaluation(report: RunReport) -> str:
    found = report.evaluation
    if found is None:
        return _missing(f"python -m models evaluate {report.folder} --curves", "attacks, and checks of them")
    rows = [("clean", "", _percent(found["clean"]))]
    rows += [
        (escape(name), f"{record['radius']:.4g} in {escape(record['norm'])}", _percent(record))
        for name, record in found["robust"].items()
    ]
    rows.append(("<b>worst case</b>", f"{found['eps']:.4g} in Linf", f"<b>{_percent(found['worst_case'])}</b>"))
    classes = [(str(c["class"]), str(c["clean"]["total"]), _percent(c["clean"]), _percent(c["worst_case"]))
               for c in found["classes"]]  # fmt: skip
    checks = [(escape(c["check"]), f'<b class="{c["result"]}">{escape(c["result"])}</b>', escape(c["evidence"]))
              for c in found["checks"]]  # fmt: skip
    parts = [
        _pictures(report, "evaluation", _EVALUATION, optional=True),
        html.table(("attack", "radius", "accuracy"), rows),
        f'<p class="note">{found["images"]} test images.</p>',
        f"<p><strong>{escape(found['masking'])}</strong></p>",
    ]
    if checks:
        parts.append(html.prose(("check", "verdict", "evidence"), checks))
    table = html.table(("class", "images", "clean", "worst case"), classes)
    parts.append(f"<details><summary>Class by class</summary>{table}</details>")
    return "".join(parts)


def _bounds(report: RunReport) -> str:
    found = report.bounds
    if found is None:
        return _missing(f"python -m models bounds {report.folder}", "bounds and certificates")
    rows = [
        ("bound for all images", _bound(found["upper"])),
        ("bound around an image, median", _bound(found["local"]["p50"])),
        ("largest stretch found", _number(found["lower"])),
    ]
    layers = []
    jumped = False  # from k-WTA on all bounds are infinite
    for layer in found["layers"]:
        jumps = layer["kind"] == "winners"
        jumped |= jumps
        slope = "∞" if jumps else _number(layer["slope"])
        bound = "∞" if jumped else _number(layer["bound"])
        layers.append((escape(layer["name"]), escape(layer["kind"]), _number(layer["norm"]), slope, bound))
    table = html.table(("layer", "kind", "norm", "largest slope", "bound up to here"), layers)
    return "".join(
        [
            _pictures(report, "bounds", (("bounds.png", _BOUNDS),)),
            html.table(("Lipschitz constant, images to logits in L2", ""), rows),
            f"<details><summary>Layer by layer</summary>{table}</details>",
        ]
    )


def _curves(report: RunReport) -> str:
    if not report.settings["activation"].startswith("kaf"):
        return f'<p class="note">{escape(report.settings["activation"])} has no learned curves.</p>'
    return _pictures(report, "curves", _CURVES)


def _pictures(report: RunReport, part: str, pictures: Iterable[tuple[str, str]], optional: bool = False) -> str:
    """Return the figures of a part that are there; without any, say how to get them, unless they are optional."""
    there = [(report.folder / part / name, caption) for name, caption in pictures]
    there = [(path, caption) for path, caption in there if path.is_file()]
    if not there and not optional:
        return _missing(f"python -m models {part} {report.folder}", "these figures")
    return "".join(html.figure(path.read_bytes(), caption) for path, caption in there)


def _state(report: RunReport, part: str) -> str:
    """Return which state of the network a part is about, and whether there is another by now."""
    content = _json(report.folder / part / f"{part}.json", ("which",))
    if content is None:
        return ""
    which = content["which"]
    checkpoint = report.folder / trained.WHICH[which]
    about = content["checkpoint"] if "checkpoint" in content else content["identity"]["checkpoint"]
    if checkpoint.is_file() and digest(checkpoint) != about:
        command = "evaluate" if part == "evaluation" else part
        again = f"<code>python -m models {command} {escape(str(report.folder))}</code> does it anew."
        return f"<p><strong>Of an earlier state of the network, which has been trained since: {again}</strong></p>"
    return f'<p class="note">State “{escape(which)}” of the network.</p>'


def _missing(command: str, what: str) -> str:
    return f'<p class="note">Not there yet: <code>{escape(command)}</code> makes {escape(what)}.</p>'


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
    flat = [html.flat(s) for s in settings]
    return [name for name in flat[0] if any(other.get(name) != flat[0][name] for other in flat)]


def _percent(record: Mapping[str, Any]) -> str:
    low, high = record["interval"]
    return f"{100 * record['accuracy']:.1f} % <small>{100 * low:.1f} to {100 * high:.1f}</small>"


def _bound(value: float | None) -> str:
    """Return a bound; None stands for infinity, which JSON has not."""
    return "∞" if value is None else f"{value:.3g}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


_EPOCH: dict[str, tuple[str, Callable[[Any], str]]] = {
    "epoch": ("epoch", str),
    "loss": ("loss", "{:.4f}".format),
    "accuracy": ("accuracy in training", _share),
    "clean": ("held out, clean", _share),
    "robust": ("held out, robust", _share),
    "outside": ("inputs outside the dictionary", _share),
    "lr": ("last learning rate", "{:.3g}".format),
    "seconds": ("time", "{:.1f} s".format),
}
_EVALUATION = (("attacks.png", _ATTACKS), ("curves.png", _ALONG))
_DISTRIBUTIONS = (("distributions.png", _INPUTS), ("outputs.png", _OUTPUTS), ("layers.png", _DEPTH))
_CURVES = (("curves.png", _STRIP), ("curves.gif", "The same as an animation."), ("dictionary.png", _USE))
