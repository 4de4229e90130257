"""`python -m models tune`."""

import argparse
from pathlib import Path
from typing import Any

from models import data
from models.commands import study as study_command
from models.figures import rates as figure
from models.reports import tables
from models.reports.tables import NONE, Table, points
from models.study import plan, tuning
from models.study.page import head
from models.study.plan import Study
from models.support import arguments, files
from models.support.arguments import Commands

_TUNE = """
Chooses the learning rate of each activation of a study, and the rate of its own parameters where it learns any, by
robust accuracy on images held out of training: never the test images, and with seeds that the study does not use.
Writes to the folder OUT: tuned.json, which `python -m models study` reads, and tuning/ with a result for each run, a
figure and README.md. Ctrl-C stops at any time; the same command goes on with what is left.
"""


def add(commands: Commands) -> None:
    """Add the command."""
    purpose = "choose the learning rates of each activation of a study"
    parser = arguments.command(commands, "tune", purpose, _TUNE, _run)
    study_command.add_file(parser)
    study_command.add_options(parser, "/tuning")


def _run(options: argparse.Namespace, command: str) -> int:
    try:
        study = plan.load(options.study)
        tries = study.tuning_runs()
    except ValueError as error:
        options.refuse(str(error))
    out = options.out or Path("results") / study.name
    options.out = out / "tuning"
    options.runs = options.runs or Path("runs/study") / study.name / "tuning"

    def report(tries: Study, done: dict[str, dict[str, Any]], results: Path, command: str) -> None:
        found = tuning.tried(tries, done)
        if not found:
            return
        files.write_json(out / "tuned.json", {"settings": study.tuning_settings(), "rates": tuning.chosen(tries, done)})
        lines = {network: {a: _line(tries, r) for a, r in entries.items()} for network, entries in found.items()}
        files.write_bytes(results / "rates.png", figure.draw(lines, study.training["lr"]))
        files.write_text(results / "README.md", _page(tries, found, done, command))

    return study_command.carry_out(tries, options, command, report)


def _line(tries: Study, entries: list[dict[str, Any]]) -> dict[float, list[float]]:
    """Return by learning rate the accuracies at the activation rate that is best overall, or so far."""
    top = tuning.best(tries, entries) or max(entries, key=tuning.mean)
    return {e["lr"]: e["values"] for e in entries if e["activation_lr"] == top["activation_lr"]}


def _page(tries: Study, found: dict[str, dict[str, Any]], done: dict[str, Any], command: str) -> str:
    assert tries.tuning is not None  # its runs were made
    parts = [
        *head(f"Learning rates: {tries.name}", tries.about, command, f", from {len(done)} of {len(tries.runs())} runs"),
        f"Robust accuracy under `{tries.tuning.attack}` on {tries.count()} images held out of training "
        f"(`{tries.data}`, eps = {tries.radii[0]:g}); seeds {', '.join(map(str, tries.seeds))}, which the study itself "
        "does not use. The best mean is chosen, and of equals the lowest rates.",
        "![robust accuracy over the learning rate](rates.png)",
        "*A line for each activation, at its best activation rate; dots are seeds, the band is the common rate.*",
    ]
    for network, activations in found.items():
        parts += [f"## {network}", _table(tries, activations), _ends(tries, activations)]
    return tables.markdown(parts)


def _table(tries: Study, activations: dict[str, list[dict[str, Any]]]) -> str:
    assert tries.tuning is not None
    rates = tries.tuning.lr
    table = Table(f"activation{data.marked(tries.data)}", "its rate", *(f"lr {lr:g}" for lr in rates))
    for activation, entries in activations.items():
        top = tuning.best(tries, entries)
        for factor in dict.fromkeys(e["activation_lr"] for e in entries):
            cells = {e["lr"]: _cell(e, e is top) for e in entries if e["activation_lr"] == factor}
            own = f"× {factor:g}" if tries.learns(activation) else "frozen" if tries.frozen(activation) else NONE
            table.add(activation, own, *(cells.get(lr, "") for lr in rates))
    return table.markdown()


def _cell(entry: dict[str, Any], top: bool) -> str:
    text = points(tuning.mean(entry))
    text = f"**{text}**" if top else text
    notes = [f"{entry[n]} {n}" for n in ("failed", "collapsed") if entry[n]]
    return text + (f" ({', '.join(notes)})" if notes else "")


def _ends(tries: Study, activations: dict[str, list[dict[str, Any]]]) -> str:
    said = []
    for activation, entries in activations.items():
        if (top := tuning.best(tries, entries)) is not None:
            ends = tuning.at_the_end(tries, activation, {n: top[n] for n in ("lr", "activation_lr")})
            said += [f"{activation}: {', '.join(ends)}"] if ends else []
    return f"At the end of what was tried, so that better rates may lie beyond: {'; '.join(said)}." if said else ""
