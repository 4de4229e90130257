"""`python -m models compare`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from models import recipes, runs
from models.activations import ACTIVATIONS
from models.commands import looking
from models.evaluation import Accuracy
from models.evaluation.outcomes import digest
from models.figures import accuracy as figures
from models.figures import style
from models.recipes import Published, Recipe
from models.recipes.comparison import Comparison, Line, Measured, attack_name, closest, compare
from models.reports import tables
from models.reports.tables import NONE, Table, bullets, points
from models.runs import trained
from models.runs.settings import Settings
from models.support import arguments, files, terminal
from models.support.arguments import Commands
from models.support.errors import UserError

_COMPARE = """
Lines up evaluated runs with the numbers published for their recipe, and writes comparison.md and comparison.png,
clean and robust accuracies side by side, to the folder OUT. Settings that are not the recipe's are listed.
"""

_CAVEAT = (
    "An interval covers the choice of this run's test images alone. Runs of one recipe differ by their seeds too, and "
    "most published numbers are of a single one."
)


def add(commands: Commands) -> None:
    """Add the command."""
    parser = arguments.command(commands, "compare", "line runs up with published numbers", _COMPARE, _compare)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="folder of an evaluated run")
    parser.add_argument("--recipe", metavar="NAME", help="recipe of the runs (default: the closest to each)")
    parser.add_argument(
        "--out", type=Path, metavar="OUT", help="folder for all output (default: RUN/comparison, runs/comparison)"
    )


def _compare(options: argparse.Namespace, command: str) -> int:
    try:
        recipe = None if options.recipe is None else recipes.load(options.recipe)
    except ValueError as error:
        options.refuse(str(error))
        raise
    one = options.folders[0] if len(options.folders) == 1 else Path("runs")
    measured = [read(folder) for folder in options.folders]
    report(measured, recipe, options.out or one / "comparison", command, terminal.console())
    return 0


def report(
    measured: Sequence[Measured], recipe: Recipe | None, out: Path, command: str, console: Console
) -> list[Comparison]:
    """Compare runs with a recipe, or each with the closest one; print a table and write page and figure to `out`."""
    every = [recipes.load(name) for name in recipes.names()]
    pairs = [(run, recipe or closest(run.settings, every)) for run in measured]
    comparisons = [compare(run, its, recipes.published_for(its.name)) for run, its in pairs]
    rows = [row for name in dict.fromkeys(its.name for _, its in pairs) for row in recipes.published_for(name)]
    files.write_bytes(out / "comparison.png", figures.rows(_panels(comparisons, rows)))
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
    return tables.markdown(parts)


def _section(comparisons: Sequence[Comparison]) -> list[str]:
    recipe = comparisons[0].recipe
    table = Table("run", "activation", *_HEAD)
    for c in comparisons:
        for line in c.lines:
            table.add(c.measured.run, c.measured.settings.activation, *_cells(line))
    parts = [f"## Recipe {recipe.name}", recipe.about, f"Source: {recipe.source}.", table.markdown()]
    for comparison in comparisons:
        parts += [f"**{comparison.measured.run}.** {comparison.verdict}", bullets(_remarks(comparison))]
    rows = dict.fromkeys(line.row for c in comparisons for line in c.lines if line.row is not None)
    if rows:
        parts += ["Where the numbers are from:", bullets(sources(list(rows)))]
    return [*parts, "What is not as in the source:", bullets(recipe.notes)]


def sources(rows: Sequence[Published]) -> list[str]:
    """Return where published numbers are from, and what else to know of them, in sentences."""
    origins = dict.fromkeys(f"{row.label}: {row.source} ({row.verified})." for row in rows)
    notes = dict.fromkeys(f"{row.label}, {row.activation}: {row.note}" for row in rows if row.note)
    return [*origins, *notes]


_HEAD = ("measure", "here, %", "n", "interval", "published", "difference", "within", "by")


def _show(comparison: Comparison, console: Console) -> None:
    table = Table(*_HEAD)
    for line in comparison.lines:
        table.add(*_cells(line))
    run, settings = comparison.measured.run, comparison.measured.settings
    console.print(f"\n{run}, {settings.activation}, and recipe {comparison.recipe.name}", style="bold")
    console.print(table.terminal())
    for sentence in (comparison.verdict, *_remarks(comparison)):
        console.print(sentence)


def _cells(line: Line) -> tuple[str, ...]:
    low, high = line.ours.interval
    by = NONE if line.row is None else line.row.label + (", from memory" if line.row.remembered else "")
    return (
        line.measure,
        points(line.ours.value, ".2f"),
        str(line.ours.total),
        f"{points(low)} to {points(high)}",
        points(line.published, ".2f"),
        points(line.difference, "+.2f"),
        {None: NONE, True: "yes", False: "no"}[line.within],
        by,
    )


def _remarks(comparison: Comparison) -> list[str]:
    recipe, activation = comparison.recipe, comparison.measured.settings.activation
    remarks = [f"{difference}." for difference in comparison.differences]
    if recipe.own_settings(activation) is None:
        first = recipe.settings.activation
        remarks.append(f"The recipe has no settings for {activation}; it is compared with those for {first}.")
    if comparison.missing:
        remarks.append(f"Published, but not evaluated here: {', '.join(comparison.missing)}.")
    return remarks


def _panels(comparisons: Sequence[Comparison], rows: Sequence[Published]) -> list[figures.Panel]:
    """Return a panel for each recipe and attack: those of the runs, if some of them are published those only."""
    panels = []
    for recipe in dict.fromkeys(comparison.recipe.name for comparison in comparisons):
        runs = [comparison.measured for comparison in comparisons if comparison.recipe.name == recipe]
        theirs = [row for row in rows if row.recipe == recipe and row.robust is not None]
        ours = list(dict.fromkeys(attack_name(text) for run in runs for text in run.robust))
        for attack in [a for a in ours if a in {row.attack for row in theirs}] or ours:
            found = [
                figures.Row(f"{run.run} (here)", _colour(run.settings.activation), [run.clean.record, robust.record])
                for run in runs
                for text, robust in run.robust.items()
                if attack_name(text) == attack
            ]
            alike = [row for row in theirs if row.attack == attack and row.clean is not None]
            found += [_published(row, alike) for row in alike]
            panels.append(figures.Panel(recipe, f"accuracy, %   (○ clean   ● under {attack})", found))
    return panels


def _published(row: Published, rows: Sequence[Published]) -> figures.Row:
    """Return a row that is named after what is not the same in all."""
    words = []
    if len({other.activation for other in rows}) > 1:
        words.append(ACTIVATIONS.parse(row.activation)[0])
    if len({other.network for other in rows}) > 1:
        words.append(row.network.partition(":")[0])
    if len({other.label for other in rows}) > 1 or not words:
        words.append(row.label)
    label = " ".join(words) + (", from memory" if row.remembered else "")
    values = [value for value in (row.clean, row.robust) if value is not None]
    marks = [{"accuracy": value, "interval": (value, value)} for value in values]
    return figures.Row(label, _colour(row.activation), marks)


def _colour(activation: str) -> str:
    name = ACTIVATIONS.parse(activation)[0]
    return style.GREY if name == "relu" else style.VERMILLION if name.startswith("kaf") else style.BLUE
