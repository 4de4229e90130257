"""What `python -m models gradients` writes: tables and figures of networks as they start, and along training."""

import itertools
import statistics
from pathlib import Path
from typing import Any

from models import data
from models.figures import gradients as figures
from models.reports import tables
from models.reports.tables import Table, bullets, ends, number, signed, spread
from models.study.page import head
from models.study.plan import Study
from models.study.statistics import MARGIN, equivalence, estimate
from models.study.summary import compared
from models.support import files


def starts(found: list[dict[str, Any]], command: str, images: str) -> str:
    """Return a Markdown page of networks as they start on a set of images; see `models.study.depth.start`."""
    network = f"network{data.marked(images)}"
    table = Table(network, "activation", "first to last", "along the trunk", "by theory", "factor", "for N(0, 1)")
    for (network, activation), group in itertools.groupby(found, key=lambda s: (s["network"], s["activation"])):
        same = list(group)
        cells = [_median([s[name] for s in same]) for name in ("ratio", "trunk_growth", "predicted")]
        cells += [_median([s[name] for s in same], ".2f") for name in ("factor", "normal_factor")]
        table.add(f"`{network}`", activation, *cells)
    pictures = ["![gradient norms](initial.png)", "![size of signals](signals.png)"]
    title = ["# Gradients as networks start", f"```sh\n{command}\n```"]
    return tables.markdown([*title, *pictures, _STARTS_SHOWN, _STARTS, table.markdown()])


_STARTS_SHOWN = (
    "*Above*: gradient norm of each convolution over that of the last one. *Below*: size of the signal behind each "
    "residual block (activation, in a network without blocks), the root of the mean variance of a channel. Of the "
    "first seed."
)
_STARTS = (
    "Medians over seeds. *First to last*: gradient norm of the first convolution over that of the last. *Along the "
    "trunk*: gradient at the output of the first residual block over that at the last one's, and *by theory*, for "
    "post-activation networks. *Factor*: sqrt(E[f′²] / Var f) of the activations, for their own inputs and for "
    "x ~ N(0, 1); – where they do not work on each value by itself, as k-WTA."
)
_LAYERS = (
    "dotted at the start and solid after the last epoch: the gradient norm of each convolution over that of the last "
    "one, and the size of the signal behind each residual block (the root of the mean variance of a channel)."
)
_TRAINING = (
    "Accuracy on test images in %, mean over seeds ± standard deviation between seeds, where a run that failed is "
    "wrong on every image; the difference is paired by seed, with the 95 % interval for the choice of seeds and "
    "images, uncorrected. *Within*: the 90 % interval, and whether it shows, by two one-sided tests at 5 %, that the "
    f"difference is below {100 * MARGIN:g} points. *First to last* is the gradient norm of the first convolution over "
    "that of the last one, in training mode on held-out images: the median over seeds at the start and at the end, and "
    "the largest or smallest (whichever is farther from 1) after any epoch of any seed. *Failed* counts runs whose "
    "loss became NaN or infinite."
)


def report(study: Study, done: dict[str, dict[str, Any]], results: Path, command: str) -> None:
    """Write README.md, training.png and layers.png for the runs that are done."""
    if not done:
        return
    shown = [(run, done[run.name]) for run in study.runs() if run.name in done]
    files.write_bytes(results / "training.png", figures.training([(r.panel.label, r.activation, x) for r, x in shown]))
    layers = []
    if whole := [(r.panel.label, r.activation, x["layers"]) for r, x in shown if "layers" in x]:
        files.write_bytes(results / "layers.png", figures.layers(whole))
        about = f"Of seed {study.seeds[0]}, {_LAYERS}"
        layers = ["## Layer by layer", "![norms layer by layer](layers.png)", about]
    first = study.activations[0]
    heads = ("activation", "accuracy", f"difference to {first}", f"within ± {100 * MARGIN:g}?")
    ratios = ("first to last at the start", "largest in training", "at the end")
    table = Table(f"network{data.marked(study.data)}", *heads, *ratios, "failed")
    for panel, activation in itertools.product(study.panels(), study.activations):
        same = {r.seed: x for r, x in shown if (r.panel, r.activation) == (panel, activation)}
        base = {r.seed: x for r, x in shown if (r.panel, r.activation) == (panel, first)}
        if same:
            table.add(panel.label, activation, *_row(same, base if activation != first else {}, study.count()))
    settings = [
        *(f"{label}: `{network}`" for label, network in study.networks.items()),
        f"images: `{study.data}`; {study.count()} test images",
        f"training: {', '.join(f'{k} = {v}' for k, v in study.training.items())}",
    ]
    title, extent = f"{study.name.capitalize()}: gradients along training", f"{len(done)} of {len(study.runs())} runs"
    parts = [
        *head(title, study.about, command, f", from {extent}"),
        bullets(settings),
        "![gradient norms along training](training.png)",
        _TRAINING,
        table.markdown(),
        *layers,
        "## Machine",
        bullets(sorted({_machine(x["environment"]) for x in done.values()})),
    ]
    files.write_text(results / "README.md", tables.markdown(parts))


def _row(same: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]], count: int) -> list[str]:
    wrong = {seed: x.get("wrong", "1" * count) for seed, x in same.items()}
    found = estimate([mask.count("0") / count for mask in wrong.values()])
    theirs = {seed: x.get("wrong", "1" * count) for seed, x in base.items() if seed in wrong}
    apart = compared(wrong, theirs)
    difference = within = ""
    if apart is not None:
        low, high = apart.interval() or (None, None)
        difference = signed({"mean": apart.mean, "low": low, "high": high})
        if apart.error is not None and apart.freedom is not None:
            small = equivalence(apart.mean, apart.error, apart.freedom)
            verdict = "yes" if small.shown else "no" if small.excluded else "not shown"
            within = f"{ends(small.low, small.high)}: {verdict}"
    ratios = [[g["ratio"] for g in x["gradients"]] for x in same.values()]
    every = [r for series in ratios for r in series]
    known = [r for r in every if r]
    farthest = max(known, key=lambda r: max(r, 1 / r), default=None) if len(known) == len(every) else None
    failed = sum("error" in x for x in same.values())
    start, end = (_median([series[place] for series in ratios]) for place in (0, -1))
    outcome = f"{failed} of {len(same)}" if failed else "none"
    return [spread(found.mean, found.std), difference, within, start, number(farthest, form=".2g"), end, outcome]


def _median(values: list[float | None], form: str = ".2g") -> str:
    known = [value for value in values if value is not None]
    return number(statistics.median(known) if len(known) == len(values) and known else None, form=form)


def _machine(environment: dict[str, Any]) -> str:
    return (
        f"{environment['processor']}, torch {environment['torch']}, kafops {environment['kafops']}, "
        f"commit {environment['commit']}"
    )
