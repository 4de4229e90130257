"""`python -m models report`."""

import argparse
import shlex
from pathlib import Path

from models.commands import looking
from models.reports import run_report
from models.runs import RunError
from models.support import arguments, files, terminal
from models.support.arguments import Commands

_ABOUT = """
Writes one HTML page about runs that needs no other file: settings, training, attacks and the verdicts on them, bounds,
distributions, learned curves, machine and versions, all that other commands have left in the folders of the runs. What
is not there yet is named with the command that makes it.
"""


def add(commands: Commands) -> None:
    """Add the command."""
    parser = arguments.command(commands, "report", "write one HTML page about runs", _ABOUT, _run)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="folder of a training run")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="page to write (default: RUN/report.html, of the first)"
    )


def _run(options: argparse.Namespace, command: str) -> int:
    out: Path = options.out or options.folders[0] / "report.html"
    if out.is_dir():
        raise RunError(f"--out {out} is a folder; give a file, such as {shlex.quote(str(out / 'report.html'))}")
    labels = looking.labels(options.folders)
    reports = [run_report.read(folder, label) for folder, label in zip(options.folders, labels, strict=True)]
    files.write_text(out, run_report.page(reports, command))
    terminal.console().print(f"Report: {out}", soft_wrap=True)
    return 0
