"""`python -m models evaluate`."""

import argparse
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from models.attacks import ATTACKS, Attack, Transfer, check_classes, pgd
from models.data import made_up
from models.evaluation import (
    Accuracy,
    Outcome,
    evaluate_clean,
    evaluator,
    input_gradients,
    per_class,
    sanity,
    worst_case,
)
from models.evaluation.evaluator import Plan, Point
from models.evaluation.outcomes import Job, Outcomes, digest
from models.evaluation.sanity import Verdict
from models.figures import evaluation as figures
from models.figures import style
from models.registry import split
from models.runs import trained
from models.support import environment, files, terminal
from models.support.arguments import integer, radius
from models.support.errors import UserError
from models.support.interrupts import AFTER_THIS, Interrupted, StopRequest

_ABOUT = """
Attacks the network of a run and writes to RUN/evaluation: what each attack found, image by image, evaluation.json with
accuracies, intervals and verdicts, and figures.

Attacks: {names}.
pgd-50-10 is PGD with 50 steps and 10 restarts, and options follow a colon, as in nes:samples=200,steps=50. In the worst
case an image is broken when any attack in L-infinity breaks it.

Checks of Carlini et al. 2019 say whether the gradient hides weaknesses from the attacks. Ctrl-C stops at any time and
loses at most the batch under way: the same command goes on where it stopped.
"""

FORMAT = 1
DEFAULT_IMAGES = 1000
DEFAULT_ATTACKS = "pgd-50-10,autoattack,adaptive"


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    evaluate = commands.add_parser(
        "evaluate",
        help="attack a trained network",
        description=_ABOUT.format(names=textwrap.fill(", ".join(ATTACKS.names), 110)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    option = evaluate.add_argument
    option("folder", type=Path, metavar="RUN", help="folder of the trained network")
    option("--which", choices=tuple(trained.WHICH), default="best", help="state of the network (default: best)")
    option(
        "--attacks", type=attack_names, default=attack_names(DEFAULT_ATTACKS), metavar="NAMES",
        help=f"attacks, separated by commas (default: {DEFAULT_ATTACKS})",
    )  # fmt: skip
    option("--eps", type=_radius, metavar="X", help="radius, such as 8/255 (default: that of the training)")
    option("--images", type=integer(1), metavar="N", help=f"test images (default: {DEFAULT_IMAGES}, or all)")
    option("--curves", action="store_true", help="accuracy along radius, steps and restarts, with a figure")
    option(
        "--check-images", type=integer(0), default=200, metavar="N",
        help="images for checks and curves, 0 for no checks (default: 200)",
    )  # fmt: skip
    option("--transfer-from", type=Path, metavar="RUN", help="run whose network makes images to try on this one")
    option("--batch-size", type=integer(1), default=100, metavar="N", help="images at once (default: 100)")
    option("--seed", type=integer(0), default=0, help="of the attacks (default: 0)")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    option("--threads", type=integer(1, 4096), help="processor threads (default: PyTorch's choice)")
    option("--data-root", type=Path, metavar="DIR", help="folder of the data set (default: $KAFOPS_DATA, then ./data)")
    option("--out", type=Path, metavar="DIR", help="folder for all output (default: RUN/evaluation)")
    evaluate.set_defaults(run=_run, refuse=evaluate.error)


def attack_names(text: str) -> tuple[str, ...]:
    """Split names of attacks at the commas, but for those between the options of one attack.

    Raises:
        argparse.ArgumentTypeError: there is no such attack, or one is named twice.
    """
    names = split(text)
    try:
        for name in names:
            ATTACKS.parse(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"wanted each attack once, got {text}")
    return names


def _radius(text: str) -> float:
    value = radius(text)
    if value == 0:
        raise argparse.ArgumentTypeError("wanted a radius above 0: accuracy without attack is reported anyway")
    return value


def _run(options: argparse.Namespace, command: str) -> int:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    evaluation = Evaluation(options, command)
    console = terminal.console()
    with StopRequest(AFTER_THIS) as stop, terminal.progress(console) as progress:
        results = evaluation.run(progress, stop)
    _show(results, console)
    console.print(f"Written to {evaluation.folder}")
    return 0


class Evaluation:
    """One evaluation of one network, as the options of the command say.

    Raises:
        UserError: the options do not fit the run.
    """

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        self.options, self.command = options, command
        self.network = trained.load(options.folder, options.which, options.data_root)
        self.folder: Path = options.out or options.folder / "evaluation"
        self.images, self.labels = self._images()
        self.model = self.network.model.to(self.images.device).eval()
        self.plan = self._plan()
        identity = {"network": digest(self.network.checkpoint), "data": self.network.settings["data"]}
        self.outcomes = Outcomes(self.folder, identity, self.model, self.images, self.labels, options.batch_size)

    def run(self, progress: Progress, stop: StopRequest) -> dict[str, Any]:
        """Do what is left to do, write evaluation.json and the figures, and return the content of the former.

        Raises:
            Interrupted: a stop was requested; what is done is kept.
        """

        known: dict[Job, Outcome] = {}

        def do(name: str, attack: Attack, images: int, seed: int) -> Outcome:
            job = Job(name, attack, images, seed)
            if job in known:
                return known[job]
            task = progress.add_task(name, total=images, status="")

            def on_batch(so_far: Outcome) -> None:
                progress.update(task, completed=len(so_far.found), status=so_far.status)
                if stop.requested:
                    raise Interrupted

            known[job] = outcome = self.outcomes.get(job, on_batch)
            if name in self.plan.attacks:
                low, high = outcome.accuracy.interval
                told = f"{outcome.accuracy.value:.1%} ({low:.1%} to {high:.1%})"
                progress.console.print(f"{name}: {told} of {images} images, {outcome.seconds:.1f} s")
            return known[job]

        plan, size = self.plan, self.options.batch_size
        clean = evaluate_clean(self.model, self.images, self.labels, size)
        found = evaluator.attack_all(plan, do)
        verdicts, curves = [], {}
        if plan.checked:
            first = slice(plan.checked)
            gradients = input_gradients(self.model, self.images[first], self.labels[first], size)
            classes = self.network.data.images.classes
            verdicts = evaluator.check(plan, found, self.model, classes, gradients, do)
            curves = evaluator.curves(plan, clean, do) if plan.curves else {}
        results = self._results(clean, found, verdicts, curves)
        files.write_bytes(self.folder / "attacks.png", _draw_attacks(results))
        if curves:
            files.write_bytes(self.folder / "curves.png", _draw_curves(curves, plan.eps))
        files.write_json(self.folder / "evaluation.json", results)
        return results

    def _images(self) -> tuple[torch.Tensor, torch.Tensor]:
        wanted, there = self.options.images, len(self.network.data.test)
        if wanted is not None and wanted > there:
            data = self.network.settings["data"]
            raise UserError(f"--images {wanted} is more than the {there} test images of {data}")
        images, labels = self.network.data.test.tensors(wanted or min(DEFAULT_IMAGES, there))
        device = _device(self.options.device)
        return images.to(device), labels.to(device)

    def _plan(self) -> Plan:
        options, count = self.options, len(self.labels)
        eps = options.eps or self.network.settings.get("training", {}).get("eps")
        if not eps:
            raise UserError("the network was not trained for a radius; give --eps, such as --eps 8/255")
        try:
            attacks = {name: ATTACKS.create(name, eps) for name in options.attacks}
            for attack in attacks.values():
                check_classes(attack, self.network.data.images.classes)
        except ValueError as error:
            raise UserError(str(error)) from error
        if options.transfer_from is not None:
            attacks[f"transfer from {options.transfer_from.name}"] = self._transfer(options.transfer_from, eps)
        return Plan(eps, attacks, count, min(options.check_images, count), options.curves, options.seed)

    def _transfer(self, source: Path, eps: float) -> Attack:
        other = trained.load(source, self.options.which, self.options.data_root)
        ours, theirs = self.network.data.images, other.data.images
        if (ours.channels, ours.size, ours.classes) != (theirs.channels, theirs.size, theirs.classes):
            raise UserError(f"--transfer-from {source} is a network for other images: {theirs} instead of {ours}")
        return Transfer(other.model.to(self.images.device).eval(), pgd(eps, 50), digest(other.checkpoint))

    def _results(
        self,
        clean: Outcome,
        found: Mapping[str, Outcome],
        verdicts: list[Verdict],
        curves: Mapping[str, list[Point]],
    ) -> dict[str, Any]:
        plan, options = self.plan, self.options
        robust = {
            name: {
                "norm": attack.norm,
                "radius": getattr(attack, "radius", plan.eps),
                **_record(found[name].accuracy),
                "seconds": round(found[name].seconds, 3),
            }
            for name, attack in plan.attacks.items()
        }
        worst = worst_case([clean, *(found[n] for n, attack in plan.attacks.items() if attack.norm == "Linf")])
        classes = self.network.data.images.classes
        both = zip(*(per_class(o.found, self.labels, classes) for o in (clean, worst)), strict=True)
        return {
            "format": FORMAT,
            "command": self.command,
            "settings": self.network.settings,
            "which": options.which,
            "checkpoint": digest(self.network.checkpoint),
            "eps": plan.eps,
            "images": plan.images,
            "checked": plan.checked,
            "seed": plan.seed,
            "batch_size": options.batch_size,
            "clean": _record(clean.accuracy),
            "robust": robust,
            "worst_case": _record(worst.accuracy),
            "classes": [
                {"class": number, "clean": _record(a), "worst_case": _record(b)}
                for number, (a, b) in enumerate(both)
                if a is not None and b is not None
            ],
            "checks": [vars(verdict) for verdict in verdicts],
            "masking": sanity.masking(verdicts),
            "curves": {
                name: [{"at": at, **_record(accuracy)} for at, accuracy in points] for name, points in curves.items()
            },
            "environment": environment.describe(),
        }


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA asserts
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _record(accuracy: Accuracy) -> dict[str, Any]:
    return {**vars(accuracy), "accuracy": accuracy.value, "interval": list(accuracy.interval)}


def _draw_attacks(results: Mapping[str, Any]) -> bytes:
    def row(label: str, record: Mapping[str, Any], colour: str) -> figures.Row:
        return figures.Row(label, Accuracy(record["correct"], record["total"]), colour)

    attacks = [
        row(name if record["norm"] == "Linf" else f"{name} (in {record['norm']})", record, style.BLUE)
        for name, record in results["robust"].items()
    ]
    clean, worst = (results["clean"], style.GREY), (results["worst_case"], style.VERMILLION)
    return figures.draw_attacks([row("clean", *clean), *attacks, row("worst case", *worst)])


def _draw_curves(curves: Mapping[str, list[Point]], eps: float) -> bytes:
    return figures.draw_curves(
        [
            figures.Curve("PGD-20", "radius ε", curves["eps"], mark=eps),
            figures.Curve(f"ε = {eps:.3g}", "steps", curves["steps"], log=True),
            figures.Curve("PGD-20", "restarts", curves["restarts"]),
        ]
    )


def _show(results: Mapping[str, Any], console: Console) -> None:
    if made_up(results["settings"]["data"]):
        console.print("On made-up images, so that accuracies say nothing:", style="bold")
    attacks = terminal.table("attack", "radius", "accuracy", "95 % interval", "time")
    attacks.add_row("clean", "", *_cells(results["clean"]), "")
    for name, record in results["robust"].items():
        radius = f"{record['radius']:.4g} in {record['norm']}"
        attacks.add_row(name, radius, *_cells(record), f"{record['seconds']:.1f} s")
    attacks.add_row("worst case", f"{results['eps']:.4g} in Linf", *_cells(results["worst_case"]), "", style="bold")
    classes = terminal.table("class", "images", "clean", "worst case")
    for record in results["classes"]:
        clean, worst = record["clean"], record["worst_case"]
        classes.add_row(
            str(record["class"]), str(clean["total"]), f"{clean['accuracy']:.1%}", f"{worst['accuracy']:.1%}"
        )
    for table in (attacks, classes):
        console.print(table)
        console.print()
    if results["checks"]:
        checks = terminal.table("check", "verdict", "evidence")
        for verdict in results["checks"]:
            checks.add_row(verdict["check"], verdict["result"], verdict["evidence"], style=_STYLES[verdict["result"]])
        console.print(checks)
        console.print()
    for name, points in results["curves"].items():
        values = ", ".join(f"{point['at']:.3g}: {point['accuracy']:.1%}" for point in points)
        console.print(f"accuracy over {name}: {values}")
    console.print(results["masking"], style="bold")


_STYLES = {sanity.PASS: "", sanity.WARNING: "yellow", sanity.FAIL: "red"}


def _cells(record: Mapping[str, Any]) -> tuple[str, str]:
    low, high = record["interval"]
    return f"{record['accuracy']:.1%}", f"{low:.1%} to {high:.1%}"
