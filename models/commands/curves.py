"""`python -m models curves`."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import nn

from models import networks
from models.analysis.curves import DictionaryUse, Use, dense_size, evolution, suggested_boundary
from models.commands import looking, settings
from models.evaluation.outcomes import described
from models.figures import curve_strip, dictionary_use
from models.reports.tables import Table
from models.runs.trained import Trained
from models.support import arguments, checkpoints, files, terminal
from models.support.arguments import Commands
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

DEFAULT_IMAGES = 500
_LEGEND = (
    "Outside: share of inputs beyond the dictionary. Used: points, of {size}, that a channel uses, on average; "
    "empty: those that none of its inputs reached.\n"
)


def add(commands: Commands) -> None:
    """Add the command."""
    purpose = "show how learned curves evolved, and dead zones"
    looking.add(arguments.command(commands, "curves", purpose, _ABOUT, _run), DEFAULT_IMAGES, "validation", None)


def _run(options: argparse.Namespace, command: str) -> int:
    settings.use_threads(options)
    if options.eps is not None and options.attack is None:
        options.refuse("--eps is the radius of --attack, which is not given; add for example --attack pgd-20")
    console = terminal.console()
    labels = looking.labels(options.folders)
    results = []
    with StopRequest(AFTER_THIS) as stop, terminal.progress(console) as progress:
        for folder, label in zip(options.folders, labels, strict=True):
            results.append(_Look(folder, label, options, command).result(progress, stop))
    if len(results) == 1:
        console.print(_layers(results[0]).terminal())
        console.print(_LEGEND.format(size=len(uses_of(results[0])[0].cells[0])))
    console.print(_networks(labels, results).terminal())
    for label, result in zip(labels, results, strict=True):
        console.print(f"{label}: {advice(result)}")
    console.print(looking.written(_Look.PART, options))
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


class _Look(looking.Look):
    PART = kept.FOLDER

    def result(self, progress: Progress, stop: StopRequest) -> dict[str, Any]:
        """Do what is left to do, write the figures, and return the content of curves.json.

        Raises:
            Interrupted: a stop was requested.
        """
        model = self.network.model.to(self.device)
        if not kept.kaf_layers(model):
            name = self.network.settings["activation"]
            raise UserError(f"{self.run} is a network with {name}, which has no learned curves; give runs with a KAF")
        attack = None if self.attack is None else described(self.attack)
        identity = self.identity(attack=attack, images=self.count)
        task = progress.add_task(self.label, total=self.count, status="dictionary")
        path = self.folder / "curves.json"
        result = looking.kept(path, identity, lambda content: (uses_of(content), uses_of(content, "adversarial")))
        if result is None:
            clean, adversarial = DictionaryUse(model), DictionaryUse(model)
            for _, x, y, generator in self.batches():
                clean.add(x)
                if self.attack is not None:
                    adversarial.add(looking.adversarial(model, self.attack, x, y, generator))
                progress.update(task, advance=len(x))
                if stop.requested:
                    raise Interrupted
            layers = clean.layers()
            result = self.content(
                identity,
                suggested_boundary=suggested_boundary(layers),
                clean=[asdict(use) for use in layers],
                adversarial=None if self.attack is None else [asdict(use) for use in adversarial.layers()],
            )
            files.write_json(path, result)
        progress.update(task, completed=self.count, status="figures")
        epochs, states = _states(self.run, self.network)
        evolutions, uses = evolution(states()), uses_of(result)
        files.write_bytes(self.folder / "curves.png", curve_strip.strip(evolutions, epochs, len(uses), uses))
        files.write_bytes(self.folder / "curves.gif", curve_strip.animation(evolutions, epochs, len(uses)))
        drawing = dictionary_use.draw(uses, uses_of(result, "adversarial"))
        files.write_bytes(self.folder / "dictionary.png", drawing)
        progress.update(task, status="done")
        return result


def _states(run: Path, network: Trained) -> tuple[list[int], Callable[[], Iterator[nn.Module]]]:
    """Return the epochs with curves up to the state looked at, and what yields the network with those of each.

    The last one is the network itself: it may be some batches past the epoch's end, or restored after a collapse.
    """
    made = network.settings
    model = networks.build(made["network"], made["activation"], network.data.images, made["seed"])
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


def _layers(result: dict[str, Any]) -> Table:
    attacked = uses_of(result, "adversarial")
    under = ["attacked"] if attacked else []
    table = Table("layer", "outside", *under, "worst channel", "99 % in", "99.9 % in", "used", "empty")
    for number, use in enumerate(uses_of(result)):
        shares = [use.share, *([attacked[number].share] if attacked else []), max(use.outside)]
        reaches = [f"±{use.reach_99:.3g}", f"±{use.reach:.3g}"]
        empty = sum(use.never) / len(use.never)
        table.add(use.name, *(f"{s:.2%}" for s in shares), *reaches, f"{sum(use.users):.1f}", f"{empty:.1f}")
    return table


def _networks(labels: list[str], results: list[dict[str, Any]]) -> Table:
    table = Table("run", "boundary", "suggested", "99 % in", "outside", "worst layer", "points used")
    for label, result in zip(labels, results, strict=True):
        uses = uses_of(result)
        shares = [use.share for use in uses]
        used = [share for use in uses for share in use.users]
        size = len(uses[0].cells[0])
        table.add(
            label, f"{max(use.high for use in uses):.3g}", f"{result['suggested_boundary']:g}",
            f"±{max(use.reach_99 for use in uses):.3g}", f"{sum(shares) / len(shares):.2%}", f"{max(shares):.2%}",
            f"{size * sum(used) / len(used):.1f} of {size}",
        )  # fmt: skip
    return table
