"""`python -m models curves`."""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from models import networks
from models.analysis.curves import DictionaryUse, Use, dense_size, evolution, suggested_boundary
from models.commands import looking
from models.evaluation.outcomes import described, digest
from models.figures import curve_strip, dictionary_use
from models.runs import trained
from models.support import checkpoints, environment, files, seeds, terminal
from models.support.errors import UserError
from models.support.interrupts import AFTER_THIS, Interrupted, StopRequest
from models.training import curves as kept

_ABOUT = """
Shows how the curves of KAF networks evolved in training, and what of their dictionaries they use on validation images:
which points, and what share of the inputs lies outside, where curves end. Prints the boundary that this suggests.

Writes to RUN/curves: curves.json, curves.png (a strip of curves, coloured by epoch), curves.gif (the same, moving) and
dictionary.png. With --attack the use of the dictionary under that attack is shown beside that on clean images.

Runs trained before curves were kept show them before and after training. Ctrl-C stops at any time and loses at most
the run under way: the same command goes on where it stopped.
"""

FORMAT = 1
DEFAULT_IMAGES = 500


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "curves",
        help="show how learned curves evolved, and dead zones",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    looking.add(parser, DEFAULT_IMAGES, "validation", None)
    parser.set_defaults(run=_run, refuse=parser.error)


def _run(options: argparse.Namespace, command: str) -> int:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.eps is not None and options.attack is None:
        options.refuse("--eps is the radius of --attack, which is not given; add for example --attack pgd-20")
    console = terminal.console()
    labels = looking.labels(options.folders)
    results = []
    with StopRequest(AFTER_THIS) as stop, terminal.progress(console) as progress:
        for folder, label in zip(options.folders, labels, strict=True):
            results.append(_look(folder, label, options, command, progress, stop))
    if len(results) == 1:
        _show_layers(results[0], console)
    _show_runs(labels, results, console)
    for label, result in zip(labels, results, strict=True):
        console.print(f"{label}: {advice(result)}")
    console.print(f"Written to {', '.join(str(f / kept.FOLDER) for f in options.folders)}")
    return 0


def uses_of(result: dict[str, Any], kind: str = "clean") -> list[Use]:
    """Return the layers in the content of a curves.json, on "clean" or "adversarial" images; none if not looked at."""
    return [Use(**entry) for entry in result[kind] or ()]


def advice(result: dict[str, Any]) -> str:
    """Return what the content of a curves.json says about the boundary, in a sentence."""
    uses = uses_of(result)
    boundary, size, suggested = max(use.high for use in uses), len(uses[0].cells[0]), result["suggested_boundary"]
    text = f"boundary={suggested:g} encloses 99.9 % of the inputs of every layer (now {boundary:.3g})"
    dense = dense_size(size, boundary, suggested)
    return text if dense == size else f"{text}; dictionary_size={dense} keeps its points as dense as now (now {size})"


def _look(
    run: Path, label: str, options: argparse.Namespace, command: str, progress: Progress, stop: StopRequest
) -> dict[str, Any]:
    """Do what is left to do for a run, write its figures, and return the content of its curves.json."""
    network = trained.load(run, options.which, options.data_root)
    device = looking.device(options.device)
    model = network.model.to(device)
    if not kept.kaf_layers(model):
        activation = network.settings["activation"]
        raise UserError(f"{run} is a network with {activation}, which has no learned curves; give runs with a KAF")
    source = network.data.validation
    images = looking.count(options.images, DEFAULT_IMAGES, len(source), f"validation images of {run}")
    attack, eps = (None, None) if options.attack is None else looking.attack_on(network, options.attack, options.eps)
    asked = {
        "format": FORMAT,
        "checkpoint": digest(network.checkpoint),
        "data": network.settings["data"],
        "attack": None if attack is None else described(attack),
        "eps": eps,
        "images": images,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "device": device.type,
    }
    identity = json.loads(json.dumps(asked))
    task = progress.add_task(label, total=images, status="dictionary")
    path = run / kept.FOLDER / "curves.json"
    result = looking.kept(path, identity, lambda content: (uses_of(content), uses_of(content, "adversarial")))
    if result is None:
        clean, adversarial = DictionaryUse(model), DictionaryUse(model)
        for number, (x, y) in enumerate(source.ordered(options.batch_size, images)):
            x, y = x.to(device), y.to(device)
            clean.add(x)
            if attack is not None:
                generator = seeds.generator(device, options.seed, "attack", number)
                adversarial.add(looking.adversarial(model, attack, x, y, generator))
            progress.update(task, advance=len(x))
            if stop.requested:
                raise Interrupted
        layers = clean.layers()
        result = {
            "format": FORMAT,
            "command": command,
            "identity": identity,
            "settings": network.settings,
            "which": options.which,
            "suggested_boundary": suggested_boundary(layers),
            "clean": [asdict(use) for use in layers],
            "adversarial": None if attack is None else [asdict(use) for use in adversarial.layers()],
            "environment": environment.describe(),
        }
        files.write_json(path, result)
    progress.update(task, completed=images, status="figures")
    epochs, states = _states(run, network, options)
    evolutions, uses = evolution(states()), uses_of(result)
    folder = run / kept.FOLDER
    files.write_bytes(folder / "curves.png", curve_strip.strip(evolutions, epochs, len(uses), uses))
    files.write_bytes(folder / "curves.gif", curve_strip.animation(evolutions, epochs, len(uses)))
    files.write_bytes(folder / "dictionary.png", dictionary_use.draw(uses, uses_of(result, "adversarial")))
    progress.update(task, status="done")
    return result


def _states(
    run: Path, network: trained.Trained, options: argparse.Namespace
) -> tuple[list[int], Callable[[], Iterator[nn.Module]]]:
    """Return the epochs with curves up to the state looked at, and what yields the network with those of each.

    The last one is the network itself: it may be some batches past the epoch's end, or restored after a collapse.
    """
    settings = network.settings
    model = networks.build(settings["network"], settings["activation"], network.data.images, settings["seed"])
    last = int(checkpoints.load(network.checkpoint)[1]["epoch"])
    saved = kept.epochs(run)
    before = [epoch for epoch in saved or [0] if epoch < last]  # without files, as built: how training started

    def states() -> Iterator[nn.Module]:
        for epoch in before:
            if saved:
                kept.load(model, run, epoch)
            yield model
        yield network.model.cpu()

    return [*before, last], states


def _show_layers(result: dict[str, Any], console: Console) -> None:
    attacked = uses_of(result, "adversarial")
    table = terminal.table()
    table.add_column("layer", no_wrap=True)
    columns = ["outside", "attacked", "worst channel", "99 % in", "99.9 % in", "used", "empty"]
    for column in columns if attacked else [column for column in columns if column != "attacked"]:
        table.add_column(column)
    for number, use in enumerate(uses_of(result)):
        under = [f"{attacked[number].share:.2%}"] if attacked else []
        table.add_row(
            use.name, f"{use.share:.2%}", *under, f"{max(use.outside):.2%}", f"±{use.reach_99:.3g}",
            f"±{use.reach:.3g}", f"{sum(use.users):.1f}", f"{sum(use.never) / len(use.never):.1f}",
        )  # fmt: skip
    console.print(table)
    size = len(uses_of(result)[0].cells[0])
    console.print(
        f"Outside: share of inputs beyond the dictionary. Used: points, of {size}, that a channel uses, on average; "
        "empty: those that none of its inputs reached.\n",
    )


def _show_runs(labels: list[str], results: list[dict[str, Any]], console: Console) -> None:
    table = terminal.table()
    table.add_column("run", overflow="fold")
    for column in ("boundary", "suggested", "99 % in", "outside", "worst layer", "points used"):
        table.add_column(column)
    for label, result in zip(labels, results, strict=True):
        uses = uses_of(result)
        shares = [use.share for use in uses]
        used = [share for use in uses for share in use.users]
        size = len(uses[0].cells[0])
        table.add_row(
            label, f"{max(use.high for use in uses):.3g}", f"{result['suggested_boundary']:g}",
            f"±{max(use.reach_99 for use in uses):.3g}", f"{sum(shares) / len(shares):.2%}", f"{max(shares):.2%}",
            f"{size * sum(used) / len(used):.1f} of {size}",
        )  # fmt: skip
    console.print(table)
