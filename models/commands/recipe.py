"""`python -m models recipes` and `recipe`."""

import argparse
import shlex
from pathlib import Path
from types import ModuleType

from rich.console import Console

from models import recipes
from models.commands import compare, evaluate, train
from models.commands import settings as options_of
from models.commands.compare import sources
from models.recipes import Recipe
from models.recipes.comparison import training_differences
from models.reports.tables import Table, points
from models.runs.settings import Settings
from models.support import arguments, terminal
from models.support.arguments import Commands
from models.training.processes import Processes

_RECIPE = """
Trains by a recipe, evaluates with the recipe's attacks and lines the result up with the numbers published for it:
train, evaluate and compare in one. Options change the recipe's settings; what differs from it is said in the end.

An activation has the settings that the recipe's source used for it. Ctrl-C stops at any time and loses nothing: the
same command goes on where it stopped.
"""


def add(commands: Commands) -> None:
    """Add the commands."""
    listing = arguments.command(commands, "recipes", "list the recipes, or show one", "", _list)
    listing.add_argument("name", nargs="?", metavar="NAME", help="recipe to show with its notes and published numbers")
    parser = arguments.command(commands, "recipe", "train and evaluate by a recipe", _RECIPE, _recipe)
    option = parser.add_argument
    option("name", metavar="NAME", help="a recipe, see `python -m models recipes`, or a .json file like theirs")
    option("more", nargs="*", help=argparse.SUPPRESS)
    option("--out", dest="folder", type=Path, metavar="RUN", help="folder for all output (default: runs/NAME-...)")
    option("--restart", action="store_true", help="discard the run that RUN holds and start anew")
    option("--fsdp", action="store_true", help="shard the network among processes instead of copying it")
    option("--no-tensorboard", action="store_true", help="write no TensorBoard events")
    option("--attacks", metavar="NAMES", help="attacks of the evaluation, separated by commas (default: the recipe's)")
    option("--images", type=arguments.integer(1), metavar="N", help="test images, see `python -m models evaluate`")
    option("--check-images", type=arguments.integer(0), metavar="N", help="images for its checks, 0 for no checks")
    options_of.add(parser)


def _list(options: argparse.Namespace, command: str) -> int:
    console = terminal.console()
    if options.name is not None:
        _show(_load(options), console)
        return 0
    table = Table("name", "data", "network", "method", "eps", "epochs")
    abouts = []
    for name in recipes.names():
        recipe = recipes.load(name)
        settings, training = recipe.settings, recipe.settings.training
        texts = settings.data, settings.network, training.method
        words = [text.partition(":")[0] for text in texts]
        table.add(name, *words, recipe.evaluation["eps"], str(training.epochs))
        abouts.append(f"{name}: {recipe.about}")
    console.print(table.terminal())
    console.print("", *abouts, sep="\n")
    return 0


def _show(recipe: Recipe, console: Console) -> None:
    def say(text: str = "") -> None:
        console.print(text)

    say(f"{recipe.name}: {recipe.about}\nSource: {recipe.source}")
    settings = recipe.settings.as_dict()
    say("\nSettings")
    for name, value in {**settings, **settings.pop("training")}.items():
        if name not in ("seed", "training"):
            say(f"  {name}: {value}")
    for variant in recipe.variants:
        changes = [f"{d.name} {d.ours}" for d in training_differences(variant, recipe.settings)]
        say(f"  variant: {', '.join(changes)}")
    say("\nEvaluation")
    for name, text in recipe.evaluation.items():
        say(f"  {name}: {text}")
    say("\nNot as in the source, or not said there")
    for note in recipe.notes:
        say(f"  - {note}")
    rows = recipes.published_for(recipe.name)
    if not rows:
        say("\nNo numbers are published for it.")
        return
    say()
    table = Table("network", "activation", "attack", "clean, %", "robust, %", "by")
    for row in rows:
        accuracies = points(row.clean, ".2f"), points(row.robust, ".2f")
        table.add(row.network, row.activation, row.attack, *accuracies, row.label, look="dim" if row.remembered else "")
    console.print(table.terminal())
    say()
    for sentence in sources(rows):
        say(f"  - {sentence}")


def _recipe(options: argparse.Namespace, command: str) -> int:
    if options.more:
        options.refuse(f"the folder is an option here: --out {shlex.quote(options.more[0])}")
    recipe = _load(options)
    settings = options_of.collect(options, options.name, options.refuse)
    options.folder = options.folder or Path("runs") / "-".join((recipe.name, settings.activation.partition(":")[0]))
    train.train(options, settings)
    if not Processes.from_environment().first:
        return 0
    chosen = _parser(evaluate, "evaluate").parse_args(_evaluation(options, settings, recipe))
    chosen.run(chosen, command)
    compare.report([compare.read(options.folder)], recipe, options.folder / "comparison", command, terminal.console())
    return 0


def _load(options: argparse.Namespace) -> Recipe:
    try:
        return recipes.load(options.name)
    except ValueError as error:
        options.refuse(str(error))
        raise


def _evaluation(options: argparse.Namespace, settings: Settings, recipe: Recipe) -> list[str]:
    """Return the arguments of `python -m models evaluate`."""
    own = settings.training.eps != recipe.settings.training.eps
    given = {
        "--attacks": options.attacks or recipe.evaluation["attacks"],
        "--eps": repr(settings.training.eps) if own else recipe.evaluation["eps"],
        "--which": recipe.evaluation["which"] if settings.training.watch_steps else "latest",
        "--images": options.images,
        "--check-images": options.check_images,
        "--data-root": options.data_root,
    }
    return [str(options.folder), *(str(a) for pair in given.items() if pair[1] is not None for a in pair)]


def _parser(module: ModuleType, name: str) -> argparse.ArgumentParser:
    """Return the parser of another command; its default `run` is what the command does."""
    commands = argparse.ArgumentParser(prog="python -m models").add_subparsers()
    module.add(commands)
    return commands.choices[name]
