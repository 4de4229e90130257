"""`python -m models compare`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from models import recipes, runs
from models.commands import looking
from models.evaluation import Accuracy
from models.evaluation.outcomes import digest
from models.figures import comparison as figure
from models.recipes import Published, Recipe
from models.recipes.comparison import Comparison, Line, Measured, closest, compare
from models.runs import trained
from models.runs.settings import Settings
from models.support import files, terminal
from models.support.errors import UserError

_COMPARE = """
Lines up evaluated runs with the numbers published for their recipe, and writes comparison.md and comparison.png, a
scatter of accuracy and robustness, to the folder OUT. Settings that are not the recipe's are listed.
"""

_CAVEAT = (
    "An interval covers the choice of this run's test images alone. Runs of one recipe differ by their seeds too, and "
    "most published numbers are of a single one."
)


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "compare",
        help="line runs up with published numbers",
        description=_COMPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="folder of an evaluated run")
    parser.add_argument("--recipe", metavar="NAME", help="recipe of the runs (default: the closest to each)")
    parser.add_argument(
        "--out", type=Path, metavar="OUT", help="folder for all output (default: RUN/comparison, runs/comparison)"
    )
    parser.set_defaults(run=_compare, refuse=parser.error)


def _compare(options: argparse.Namespace, command: str) -> int:
    try:
        recipe = None if options.recipe is None else recipes.load(options.recipe)
    except ValueError as error:
        options.refuse(str(error))
        raise
    one = options.folders[0] if len(options.folders) == 1 else Path("runs")
    report(
        [read(folder) for folder in options.folders],
        recipe,
        options.out or one / "comparison",
        command,
        terminal.console(),
    )
    return 0


def report(
    measured: Sequence[Measured], recipe: Recipe | None, out: Path, command: str, console: Console
) -> list[Comparison]:
    """Compare runs with a recipe, or each with the closest one; print a table and write page and figure to `out`."""
    every = [recipes.load(name) for name in recipes.names()]
    pairs = [(run, recipe or closest(run.settings, every)) for run in measured]
    comparisons = [compare(run, its, recipes.published_for(its.name)) for run, its in pairs]
    rows = [row for name in dict.fromkeys(its.name for _, its in pairs) for row in recipes.published_for(name)]
    files.write_bytes(out / "comparison.png", figure.draw(comparisons, rows))
    files.write_text(out / "comparison.md", markdown(comparisons, command))
    for comparison in comparisons:
        _show(comparison, console)
    console.print(f"Written to {out}")
    return comparisons


def read(run: Path) -> Measured:
    """Read what a run was trained with and what its evaluation found.

    Raises:
        RunError: there is no run in the folder.
        UserError: it has not been evaluated, or its evaluation is damaged or of an earlier state.
    """
    settings = runs.read_settings(run)
    path = run / "evaluation" / "evaluation.json"
    again = f"run `python -m models evaluate {run}`"
    try:
        record = files.read_json(path)
        if record is None:
            raise UserError(f"{run} has not been evaluated: there is no {path}; {again}")
        if record["settings"] != settings or not _current(run, record):
            raise UserError(f"{path} is of another training than {run} holds now; {again}")
        return Measured(
            run.resolve().name + looking.marked(run),
            Settings.from_dict(settings),
            float(record["eps"]),
            _accuracy(record["clean"]),
            {name: _accuracy(found) for name, found in record["robust"].items()},
            record["which"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} and run.json cannot be compared with a recipe ({error!r}); {again}") from error


def _current(run: Path, record: dict[str, Any]) -> bool:
    checkpoint = run / trained.WHICH[record["which"]]
    return not checkpoint.exists() or digest(checkpoint) == record["checkpoint"]


def _accuracy(record: dict[str, Any]) -> Accuracy:
    return Accuracy(int(record["correct"]), int(record["total"]))


def markdown(comparisons: Sequence[Comparison], command: str) -> str:
    """Return the comparison as a page in Markdown."""
    parts = ["# Comparison with published numbers", f"```sh\n{command}\n```", "![comparison](comparison.png)", _CAVEAT]
    for name in dict.fromkeys(comparison.recipe.name for comparison in comparisons):
        parts += _section([comparison for comparison in comparisons if comparison.recipe.name == name])
    return "\n\n".join(parts) + "\n"


def _section(comparisons: Sequence[Comparison]) -> list[str]:
    recipe = comparisons[0].recipe
    lines = [_row(("run", "activation", *_HEAD)), "|---" * (len(_HEAD) + 2) + "|"]
    for c in comparisons:
        lines += [_row((c.measured.run, c.measured.settings.activation, *_cells(line))) for line in c.lines]
    parts = [f"## Recipe {recipe.name}", recipe.about, f"Source: {recipe.source}.", "\n".join(lines)]
    for comparison in comparisons:
        parts += [f"**{comparison.measured.run}.** {comparison.verdict}", _bullets(_remarks(comparison))]
    rows = dict.fromkeys(line.row for c in comparisons for line in c.lines if line.row is not None)
    if rows:
        parts += ["Where the numbers are from:", _bullets(sources(list(rows)))]
    parts += ["What is not as in the source:", _bullets(recipe.notes)]
    return [part for part in parts if part]


def sources(rows: Sequence[Published]) -> list[str]:
    """Return where published numbers are from, and what else to know of them, in sentences."""
    origins = dict.fromkeys(f"{row.label}: {row.source} ({row.verified})." for row in rows)
    notes = dict.fromkeys(f"{row.label}, {row.activation}: {row.note}" for row in rows if row.note)
    return [*origins, *notes]


def points(value: float | None) -> str:
    """Return an accuracy in %, without the sign, or a dash."""
    return "–" if value is None else f"{100 * value:.2f}"


_HEAD = ("measure", "here, %", "interval", "published", "difference", "within", "by")


def _show(comparison: Comparison, console: Console) -> None:
    table = terminal.table()
    for head in _HEAD:
        table.add_column(head, no_wrap=head != "by")
    for line in comparison.lines:
        table.add_row(*_cells(line))
    run, settings = comparison.measured.run, comparison.measured.settings
    console.print(
        f"\n{run}, {settings.activation}, and recipe {comparison.recipe.name}", style="bold",
    )  # fmt: skip
    console.print(table)
    for sentence in (comparison.verdict, *_remarks(comparison)):
        console.print(sentence)


def _cells(line: Line) -> tuple[str, ...]:
    low, high = line.ours.interval
    by = "–" if line.row is None else line.row.label + (", from memory" if line.row.remembered else "")
    return (
        line.measure,
        points(line.ours.value),
        f"{100 * low:.1f} to {100 * high:.1f}",
        points(line.published),
        "–" if line.difference is None else f"{100 * line.difference:+.2f}",
        {None: "–", True: "yes", False: "no"}[line.within],
        by,
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _remarks(comparison: Comparison) -> list[str]:
    recipe, activation = comparison.recipe, comparison.measured.settings.activation
    remarks = [f"{difference}." for difference in comparison.differences]
    if recipe.own_settings(activation) is None:
        first = recipe.settings.activation
        remarks.append(f"The recipe has no settings for {activation}; it is compared with those for {first}.")
    if comparison.missing:
        remarks.append(f"Published, but not evaluated here: {', '.join(comparison.missing)}.")
    return remarks


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
