"""The demo: train a small ResNet20 with three activations, attack them, measure what a step costs, and report.

Every stage leaves a file in the run folder, and a stage whose file is there is not done again.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID

import kafops
from models import attacks, data
from models.analysis.curves import DictionaryUse, evolution
from models.data import DataSet
from models.evaluation import Outcome, evaluate_attack, evaluate_clean, step_cost
from models.figures import accuracy as accuracy_figure
from models.figures import cost as cost_figure
from models.figures import curve_strip, style
from models.reports import demo_report
from models.reports.tables import share
from models.runs import RunFolder, session
from models.runs.settings import Settings as RunSettings
from models.support import checkpoints, environment, files, terminal
from models.training import Recipe, Trainer
from models.training.trainer import LATEST

LABELS = {"relu": "ReLU", "silu": "SiLU", "kaf_isometric": "KAF"}
KAF = "kaf_isometric"
RATES: dict[str, dict[str, float]] = {
    "relu": {"lr": 0.8, "activation_lr": 1.0},
    "silu": {"lr": 0.8, "activation_lr": 1.0},
    KAF: {"lr": 0.8, "activation_lr": 0.1},
}
"""Each network's learning rates: robust on held-out images in `python -m models tune demo`, see results/demo/tuning."""
_RESULT = "result.json"
_KINDS = ("clean", "robust")
_OUTPUTS = (
    "metrics.json",
    "step_cost.json",
    "*.png",
    "report.html",
    *(f"{name}/{file}" for name in LABELS for file in ("run.json", *session.OUTPUTS, _RESULT)),
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides the demo's numbers, besides the machine.

    Args:
        lr: peak learning rate of all networks; None for each network's own, RATES.
    """

    seed: int = 0
    epochs: int = 5
    width: int = 8
    train: int = 4000
    test: int = 1000
    batch_size: int = 64
    lr: float | None = None
    eps: float = 0.2
    pgd_steps: int = 20

    @property
    def held_out(self) -> int:
        """How many of the training images are kept back, to watch training with."""
        return min(128, max(1, self.train // 5))

    def rates(self, activation: str) -> dict[str, float]:
        """Return "lr" of one network's training and "activation_lr", a multiple of it."""
        return RATES[activation] if self.lr is None else {"lr": self.lr, "activation_lr": 1.0}

    def of(self, activation: str) -> RunSettings:
        """Return the settings of one network's run."""
        images = f"mnist5k:train={self.train},validation={self.held_out},test={self.test}"
        rates = self.rates(activation)
        recipe = Recipe(
            self.epochs, self.batch_size, rates["lr"], "fast", self.eps,
            nesterov=True, activation_lr=rates["activation_lr"], watch_steps=5,
        )  # fmt: skip
        return RunSettings(images, f"resnet20:width={self.width}", activation, recipe, self.seed)


class Demo:
    """One run of the demo in one folder."""

    def __init__(self, out: Path, settings: Settings, restart: bool, compiled: bool, command: str) -> None:
        self.settings, self.command = settings, command
        self.data: DataSet = data.load(settings.of(KAF).data, settings.seed)
        self.folder = RunFolder.open(out, asdict(settings), restart, _OUTPUTS)
        self.implementations = tuple(n for n in step_cost.IMPLEMENTATIONS if compiled or n != "compiled")
        self.console = terminal.console()

    def run(self) -> None:
        """Do what is left to do, then write metrics.json, the figures and the report."""
        self.console.print(f"kafops backend: {kafops.backends.explain(torch.empty(1))}")
        results = {}
        with terminal.progress(self.console, stays=True) as progress:
            for name in LABELS:
                task = progress.add_task(LABELS[name], total=None, status="")
                results[name] = self._network(name, progress, task)
            cost = self._step_cost(progress, progress.add_task("step cost", total=None, status=""))
        metrics = self._metrics(results, cost)
        files.write_json(self.folder.path / "metrics.json", metrics)
        self._write_report(metrics)
        self.console.print(demo_report.accuracies(metrics, LABELS).terminal())
        self.console.print(f"Report: {self.folder.path / 'report.html'}")

    def _network(self, name: str, progress: Progress, task: TaskID) -> dict[str, Any]:
        """Train and evaluate one network, or read what an earlier call found."""
        place = self.folder.path / name / _RESULT
        result = files.read_json(place)
        if result is None:
            self.folder.note_environment(environment.describe())
            trainer = self._train(name, progress, task)
            result = self._evaluate(trainer, progress, task)
            files.write_json(place, result)
        status = ", ".join(f"{kind} {share(result[kind]['accuracy'])}" for kind in _KINDS)
        progress.update(task, total=1, completed=1, status=status)
        return result

    def _train(self, name: str, progress: Progress, task: TaskID) -> Trainer:
        trainer = session.prepare(self.settings.of(name), self.folder.path / name)

        def on_step(trainer: Trainer) -> None:
            sums = trainer.tally
            status = f"epoch {trainer.epoch + 1}/{self.settings.epochs}, accuracy {sums.correct / sums.images:.0%}"
            progress.update(task, completed=trainer.steps_done, status=status)

        progress.update(task, total=trainer.steps, completed=trainer.steps_done)
        trainer.run(on_step)
        return trainer

    def _evaluate(self, trainer: Trainer, progress: Progress, task: TaskID) -> dict[str, Any]:
        settings, model = self.settings, trainer.model
        images, labels = self.data.test.tensors(settings.test)
        progress.update(task, total=settings.test, completed=0, status=f"PGD-{settings.pgd_steps}")

        def on_batch(so_far: Outcome) -> None:
            progress.update(task, completed=len(so_far.found))

        clean, attack = evaluate_clean(model, images, labels), attacks.pgd(settings.eps, settings.pgd_steps)
        robust = evaluate_attack(model, images, labels, attack, settings.seed, on_batch=on_batch)
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "clean": clean.accuracy.record,
            "robust": robust.accuracy.record,
            "history": [asdict(epoch) for epoch in trainer.history],
        }

    def _step_cost(self, progress: Progress, task: TaskID) -> dict[str, Any]:
        place = self.folder.path / "step_cost.json"
        cost = files.read_json(place)
        if cost is None or set(cost["implementations"]) != set(self.implementations):
            self.folder.note_environment(environment.describe())
            progress.update(task, total=step_cost.expected_steps(self.implementations))
            of_step = (self.settings.batch_size, self.settings.width, self.settings.seed)
            cost = step_cost.measure(
                self.implementations, *of_step, on_step=lambda name: progress.update(task, advance=1, status=name)
            )
            files.write_json(place, cost)
        progress.update(task, total=1, completed=1, status="")
        return cost

    def _metrics(self, results: dict[str, dict[str, Any]], cost: dict[str, Any]) -> dict[str, Any]:
        """Sort numbers that a seed fixes from timings, which no two runs share."""
        timings, fixed = {}, {}
        for name, result in results.items():
            timings[name] = {"epoch_seconds": [epoch["seconds"] for epoch in result["history"]]}
            history = [{k: epoch[k] for k in ("epoch", "loss", "accuracy", "lr")} for epoch in result["history"]]
            fixed[name] = {n: result[n] for n in ("parameters", *_KINDS)} | {"history": history}
        return {
            "command": self.command,
            "settings": asdict(self.settings),
            "held_out": self.settings.held_out,
            "rates": {name: self.settings.rates(name) for name in results},
            "environments": self.folder.environments,
            "results": fixed,
            "timings": timings,
            "step_cost": cost,
        }

    def _write_report(self, metrics: dict[str, Any]) -> None:
        drawings = {
            "accuracy": self._draw_accuracy(metrics["results"]),
            "curves": self._draw_curves(),
            "cost": cost_figure.draw(metrics["step_cost"]),
        }
        for name, png in drawings.items():
            files.write_bytes(self.folder.path / f"{name}.png", png)
        files.write_text(self.folder.path / "report.html", demo_report.page(metrics, LABELS, drawings))

    def _draw_accuracy(self, results: dict[str, Any]) -> bytes:
        rows = [
            accuracy_figure.Row(LABELS[name], style.COLOURS[name], [result[kind] for kind in _KINDS])
            for name, result in results.items()
        ]
        attack = f"PGD-{self.settings.pgd_steps}, ε = {self.settings.eps:.3g}"
        about = f"accuracy, %   (● under {attack}   ○ clean   bars: 95 % intervals)"
        return accuracy_figure.rows([accuracy_figure.Panel("", about, rows)])

    def _draw_curves(self) -> bytes:
        path = self.folder.path / KAF / LATEST
        before, after = (session.build(self.settings.of(KAF), self.data.images) for _ in range(2))
        tensors, record = checkpoints.load(path)
        checkpoints.load_weights(after, checkpoints.weights(tensors), path)
        use = DictionaryUse(after)
        use.add(self.data.test.tensors(min(256, self.settings.test))[0])
        layers = use.layers()
        return curve_strip.strip(evolution([before, after]), [0, int(record["epoch"])], len(layers), layers)
