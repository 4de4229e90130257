"""`python -m models study`."""

import argparse
import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models import data
from models.figures import study as figures
from models.study import page, plan, workers
from models.study.plan import TUNED, Run, Study
from models.study.summary import CLEAN, WORST, accuracies, summarise
from models.study.workers import Do
from models.support import arguments, files, terminal
from models.support.arguments import Commands

_STUDY = """
Trains and attacks every network, activation and seed of a study, and writes to the folder OUT: a result for each run,
summary.json, figures and README.md. Ctrl-C stops at any time; the same command goes on with what is left, and runs
whose results are there are not done again. Checkpoints are kept in RUNS. Runs that fail are reported, and count as
wrong on every image; to try one again remove its result. Studies are for processors, a run for each core.
"""

Report = Callable[[Study, dict[str, dict[str, Any]], Path, str], None]
"""Writes what is known so far: (study, results by run, folder, command)."""


def add(commands: Commands) -> None:
    """Add the command."""
    purpose = "train and attack a grid of networks, activations and seeds"
    parser = arguments.command(commands, "study", purpose, _STUDY, _run)
    add_file(parser)
    add_options(parser)


def add_file(parser: argparse.ArgumentParser) -> None:
    """Add which study it is."""
    names = ", ".join(plan.names())
    parser.add_argument("study", metavar="STUDY", help=f"one of {names}, or a .json file like theirs")


def add_options(parser: argparse.ArgumentParser, below: str = "") -> None:
    """Add the options that `carry_out` reads; `below` is where checkpoints are kept below the study's folder."""
    option = parser.add_argument
    option("--out", type=Path, metavar="DIR", help="folder of the results (default: results/STUDY)")
    option("--runs", type=Path, metavar="DIR", help=f"folder of the checkpoints (default: runs/study/STUDY{below})")
    option("--jobs", type=arguments.integer(1, 4096), help="runs at a time (default: one for each core)")
    option("--threads", type=arguments.integer(1, 4096), default=1, help="threads of each run (default: 1)")
    option("--plan", action="store_true", help="show what is done, what is left and how long it may take, and stop")


def _run(options: argparse.Namespace, command: str) -> int:
    try:
        study = load(options.study, options.out)
    except ValueError as error:
        options.refuse(str(error))
    return carry_out(study, options, command, report)


def load(name: str, out: Path | None) -> Study:
    """Read a study, and the rates that were chosen for it where it is at such.

    Args:
        name: of the study, or its file.
        out: folder of the results, where it was given.

    Raises:
        ValueError: there is no such study, the file is none, or there are no rates for it.
    """
    study = plan.load(name)
    if TUNED not in study.rates:
        return study
    where = Path("results") / study.tuned_by if study.tuned_by else out or Path("results") / study.name
    made_by = study.tuned_by or name + (f" --out {out}" if out else "")
    return _at_tuned_rates(study, where / "tuned.json", f"python -m models tune {made_by}")


def _at_tuned_rates(study: Study, path: Path, made_by: str) -> Study:
    """Return the study with what `python -m models tune` chose."""
    found = files.read_json(path)
    if found is None:
        raise ValueError(f"{path} is not there; choose the rates first: {made_by}")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), dict) for name in ("settings", "rates")):
        raise ValueError(f"{path} has no rates and the settings they were chosen under; write it anew: {made_by}")
    try:
        study.check_tuning(found["settings"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}; choose them anew: {made_by}") from error
    return study.with_tuned(found["rates"])


def carry_out(study: Study, options: argparse.Namespace, command: str, report: Report, do: Do | None = None) -> int:
    """Do what is left of a study, and report whenever a run is done."""
    results = options.out or Path("results") / study.name
    jobs = options.jobs or len(os.sched_getaffinity(0))
    console = terminal.console()
    done = workers.read(results, study)
    todo = [run for run in study.runs() if run.name not in done]
    runs = f"{len(study.runs())} runs{data.marked(study.data)}"
    console.print(f"{study.about}\n{len(done)} of {runs} are done, {_left(study, done, jobs)}")
    if options.plan:
        for run in study.runs():
            console.print(f"  {run.name:30} {_line(done[run.name]) if run.name in done else 'to do'}")
        return 0

    def on_result(run: Run, result: dict[str, Any]) -> None:
        done[run.name] = result
        report(study, done, results, command)
        console.print(f"{len(done)}/{len(study.runs())} {run.name:26} {_line(result)}; {_left(study, done, jobs)}")

    with console.status("") as shown:

        def on_change(status: workers.Status) -> None:
            shown.update("; ".join(f"{name}: {text}" for name, text in status.items()))

        if todo and (there := len(workers.part(study, 0))) < study.count():
            options.refuse(f"{study.data} has {there} {study.part} images, and the study attacks {study.count()}")
        folder = options.runs or Path("runs/study") / study.name
        workers.work(study, todo, results, folder, jobs, options.threads, on_change, on_result, do)
    report(study, done, results, command)
    console.print(f"Results: {results / 'README.md'}")
    return 0


def report(study: Study, done: dict[str, dict[str, Any]], results: Path, command: str) -> None:
    """Write summary.json, the figures and the page for the runs that are done."""
    if not done:
        return
    summary = summarise(study, done)
    if not summary["rates"]:
        return
    files.write_result(results / "summary.json", summary)
    drawings = {}
    if len(study.radii) > 1:
        drawings["radii"] = figures.over_radii(summary, WORST)
    else:
        drawings["accuracies"] = figures.accuracies(summary)
    if len(study.radii) == 1 and len(summary["activations"]) > 1:
        if summary["comparisons"]:
            drawings["comparisons"] = figures.comparisons(summary)
        drawings["differences"] = figures.differences(summary, WORST)
        drawings["robust-clean"] = figures.robust_against_clean(summary, WORST)
    for name, png in drawings.items():
        files.write_bytes(results / f"{name}.png", png)
    files.write_text(results / "README.md", page.markdown(study, summary, done, command))


def seconds(result: dict[str, Any]) -> float:
    """Return how long a run took: training, and all attacks."""
    return sum(epoch["seconds"] for epoch in result.get("history", ())) + sum(result.get("seconds", {}).values())


def _left(study: Study, done: dict[str, dict[str, Any]], jobs: int) -> str:
    todo = [run for run in study.runs() if run.name not in done]
    if not todo:
        return "nothing is left"
    if not done:
        return "how long they take is known when the first is done"
    of_panel: dict[str, list[float]] = {}
    for run in study.runs():
        if run.name in done:
            of_panel.setdefault(run.panel.name, []).append(seconds(done[run.name]))
    every = [s for times in of_panel.values() for s in times]
    total = sum(_mean(of_panel.get(run.panel.name, every)) for run in todo)
    return f"about {datetime.timedelta(seconds=round(total / jobs))} left"


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def _line(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"failed: {result['error']}"
    shown = accuracies(result).items() if result["found"] else [(CLEAN, accuracies(result)[CLEAN])]
    return ", ".join(f"{name} {value:.1%}" for name, value in shown)
