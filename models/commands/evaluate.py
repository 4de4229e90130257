"""`python -m models evaluate`."""

import argparse
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from models.attacks import ATTACKS, Attack, Transfer, pgd
from models.commands import looking, settings
from models.data import made_up
from models.evaluation import Outcome, evaluate_clean, evaluator, input_gradients, per_class, sanity, worst_case
from models.evaluation.evaluator import Plan, Point
from models.evaluation.outcomes import Job, Outcomes, digest
from models.evaluation.sanity import Verdict
from models.figures import accuracy as figures
from models.figures import style
from models.registry import split
from models.reports import evaluation as evaluation_page
from models.reports.tables import within
from models.runs import trained
from models.support import arguments, environment, files, terminal
from models.support.arguments import Commands
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


def add(commands: Commands) -> None:
    """Add the command."""
    about = _ABOUT.format(names=textwrap.fill(", ".join(ATTACKS.names), 110))
    evaluate = arguments.command(commands, "evaluate", "attack a trained network", about, _run)
    option = evaluate.add_argument
    option("folder", type=Path, metavar="RUN", help="folder of the trained network")
    option(
        "--attacks", type=attack_names, default=attack_names(DEFAULT_ATTACKS), metavar="NAMES",
        help=f"attacks, separated by commas (default: {DEFAULT_ATTACKS})",
    )  # fmt: skip
    looking.add_options(evaluate, DEFAULT_IMAGES, "test")
    option("--curves", action="store_true", help="accuracy along radius, steps and restarts, with a figure")
    option(
        "--check-images", type=arguments.integer(0), default=200, metavar="N",
        help="images for checks and curves, 0 for no checks (default: 200)",
    )  # fmt: skip
    option("--transfer-from", type=Path, metavar="RUN", help="run whose network makes images to try on this one")
    option("--out", type=Path, metavar="DIR", help="folder for all output (default: RUN/evaluation)")


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


def _run(options: argparse.Namespace, command: str) -> int:
    settings.use_threads(options)
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
                progress.console.print(
                    f"{name}: {within(outcome.accuracy.record)} of {images} images, {outcome.seconds:.1f} s"
                )
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
            files.write_bytes(self.folder / "curves.png", figures.along(results["curves"], plan.eps))
        files.write_json(self.folder / "evaluation.json", results)
        return results

    def _images(self) -> tuple[torch.Tensor, torch.Tensor]:
        test = self.network.data.test
        images, labels = test.tensors(looking.count(self.options, len(test), self.options.folder))
        device = looking.device(self.options.device)
        return images.to(device), labels.to(device)

    def _plan(self) -> Plan:
        options, count = self.options, len(self.labels)
        eps = looking.radius_of(self.network, options.eps)
        attacks = {name: looking.attack_on(self.network, name, eps)[0] for name in options.attacks}
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
        self, clean: Outcome, found: Mapping[str, Outcome], verdicts: list[Verdict], curves: Mapping[str, list[Point]]
    ) -> dict[str, Any]:
        plan, options = self.plan, self.options
        robust = {
            name: {
                "norm": attack.norm,
                "radius": getattr(attack, "radius", plan.eps),
                **found[name].accuracy.record,
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
            "clean": clean.accuracy.record,
            "robust": robust,
            "worst_case": worst.accuracy.record,
            "classes": [
                {"class": number, "clean": a.record, "worst_case": b.record}
                for number, (a, b) in enumerate(both)
                if a is not None and b is not None
            ],
            "checks": [vars(verdict) for verdict in verdicts],
            "masking": sanity.masking(verdicts),
            "curves": {
                name: [{"at": at, **accuracy.record} for at, accuracy in points] for name, points in curves.items()
            },
            "environment": environment.describe(),
        }


def _draw_attacks(results: Mapping[str, Any]) -> bytes:
    records = {
        name if record["norm"] == "Linf" else f"{name} (in {record['norm']})": (record, style.BLUE)
        for name, record in results["robust"].items()
    }
    records = {
        "clean": (results["clean"], style.GREY), **records, "worst case": (results["worst_case"], style.VERMILLION)
    }  # fmt: skip
    rows = [figures.Row(label, colour, [record]) for label, (record, colour) in records.items()]
    return figures.rows([figures.Panel("", "accuracy, %   (bars: 95 % intervals)", rows)])


def _show(results: Mapping[str, Any], console: Console) -> None:
    if made_up(results["settings"]["data"]):
        console.print("On made-up images, so that accuracies say nothing:", style="bold")
    tables = [evaluation_page.attacks(results), evaluation_page.classes(results)]
    tables += [evaluation_page.checks(results)] if results["checks"] else []
    for table in tables:
        console.print(table.terminal())
        console.print()
    for name, points in results["curves"].items():
        values = ", ".join(f"{point['at']:.3g}: {point['accuracy']:.1%}" for point in points)
        console.print(f"accuracy over {name}: {values}")
    console.print(results["masking"], style="bold")
