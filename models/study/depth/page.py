"""What `python -m models gradients` writes: tables and figures of networks as they start, and along training."""

import itertools
import statistics
from pathlib import Path
from typing import Any

from models import data
from models.figures import gradients as figures
from models.study.plan import Study
from models.study.statistics import estimate, paired
from models.study.summary import CLEAN, accuracies
from models.support import files


def starts(found: list[dict[str, Any]], command: str, images: str) -> str:
    """Return a Markdown page of networks as they start on a set of images; see `models.study.depth.start`."""
    lines = [
        "# Gradients as networks start",
        "",
        f"```sh\n{command}\n```",
        "",
        "![gradient norms](initial.png)",
        "",
        "![size of signals](signals.png)",
        "",
        "*Above*: gradient norm of each convolution over that of the last one. *Below*: size of the signal behind each "
        "residual block (activation, in a network without blocks), the root of the mean variance of a channel. Of the "
        "first seed.",
        "",
        "Medians over seeds. *First to last*: gradient norm of the first convolution over that of the last. *Along the "
        "trunk*: gradient at the output of the first residual block over that at the last one's, and *by theory*, for "
        "post-activation networks. *Factor*: sqrt(E[f′²] / Var f) of the activations, for their own inputs and for "
        "x ~ N(0, 1); – where they do not work on each value by itself, as k-WTA.",
        "",
        f"| network{data.marked(images)} | activation | first to last | along the trunk | by theory | factor | "
        "for N(0, 1) |",
        "|---|---|---|---|---|---|---|",
    ]
    for (network, activation), group in itertools.groupby(found, key=lambda s: (s["network"], s["activation"])):
        same = list(group)
        cells = [_median([s[name] for s in same]) for name in ("ratio", "trunk_growth", "predicted")]
        cells += [_median([s[name] for s in same], ".2f") for name in ("factor", "normal_factor")]
        lines.append(f"| `{network}` | {activation} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(study: Study, done: dict[str, dict[str, Any]], results: Path, command: str) -> None:
    """Write README.md, training.png and layers.png for the runs that are done."""
    if not done:
        return
    runs = [run for run in study.runs() if run.name in done]
    shown = [(run, done[run.name]) for run in runs]
    files.write_bytes(results / "training.png", figures.training([(r.network, r.activation, x) for r, x in shown]))
    layers = []
    if whole := [(r.network, r.activation, x["layers"]) for r, x in shown if "layers" in x]:
        files.write_bytes(results / "layers.png", figures.layers(whole))
        layers = [
            "## Layer by layer",
            "![norms layer by layer](layers.png)",
            f"Of seed {study.seeds[0]}, dotted at the start and solid after the last epoch: the gradient norm of each "
            "convolution over that of the last one, and the size of the signal behind each residual block (the root of "
            "the mean variance of a channel).",
        ]
    rows = [
        f"| network{data.marked(study.data)} | activation | accuracy | difference to {study.activations[0]} | first to "
        "last at the start | largest in training | at the end | failed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for network, activation in itertools.product(study.networks, study.activations):
        same = {r.seed: x for r, x in shown if (r.network, r.activation) == (network, activation)}
        base = {r.seed: x for r, x in shown if (r.network, r.activation) == (network, study.activations[0])}
        if same:
            rows.append(f"| {network} | {activation} | {' | '.join(_row(same, base, activation, study))} |")
    parts = [
        f"# {study.name.capitalize()}: gradients along training",
        study.about,
        f"```sh\n{command}\n```",
        f"That command made this page, from {len(done)} of {len(study.runs())} runs.",
        "\n".join(
            [
                *(f"- {label}: `{network}`" for label, network in study.networks.items()),
                f"- images: `{study.data}`; {study.count()} test images",
                f"- training: {', '.join(f'{k} = {v}' for k, v in study.training.items())}",
            ]
        ),
        "![gradient norms along training](training.png)",
        "Accuracy on test images in %, mean over seeds ± standard deviation between seeds; the difference is paired by "
        "seed, with the 95 % interval of Student's t. *First to last* is the gradient norm of the first convolution "
        "over that of the last one, in training mode on held-out images: the median over seeds at the start and at "
        "the end, and the largest or smallest (whichever is farther from 1) after any epoch of any seed. *Failed* "
        "counts runs whose loss became NaN or infinite.",
        "\n".join(rows),
        *layers,
        "## Machine",
        "\n".join(sorted({_machine(x["environment"]) for x in done.values()})),
    ]
    files.write_text(results / "README.md", "\n\n".join(parts) + "\n")


def _row(same: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]], activation: str, study: Study) -> list[str]:
    finished = {seed: accuracies(x)[CLEAN] for seed, x in same.items() if "error" not in x}
    compared = {seed: accuracies(x)[CLEAN] for seed, x in base.items() if "error" not in x and seed in finished}
    accuracy = difference = ""
    if finished:
        found = estimate(list(finished.values()))
        accuracy = f"{100 * found.mean:.1f}" + ("" if found.std is None else f" ± {100 * found.std:.1f}")
    if compared and activation != study.activations[0]:
        apart = paired([finished[s] for s in compared], list(compared.values()))
        difference = f"{100 * apart.mean:+.1f}"
        if apart.low is not None and apart.high is not None:
            difference += f" [{100 * apart.low:+.1f}, {100 * apart.high:+.1f}]"
    ratios = [[g["ratio"] for g in x["gradients"]] for x in same.values()]
    every = [r for series in ratios for r in series]
    known = [r for r in every if r]
    farthest = max(known, key=lambda r: max(r, 1 / r), default=None) if len(known) == len(every) else None
    failed = len(same) - len(finished)
    return [
        accuracy,
        difference,
        _median([series[0] for series in ratios]),
        _number(farthest),
        _median([series[-1] for series in ratios]),
        f"{failed} of {len(same)}" if failed else "none",
    ]


def _median(values: list[float | None], form: str = ".2g") -> str:
    known = [value for value in values if value is not None]
    return _number(statistics.median(known) if len(known) == len(values) and known else None, form)


def _number(value: float | None, form: str = ".2g") -> str:
    return "–" if value is None else format(value, form)


def _machine(environment: dict[str, Any]) -> str:
    return (
        f"- {environment['processor']}, torch {environment['torch']}, kafops {environment['kafops']}, "
        f"commit {environment['commit']}"
    )
