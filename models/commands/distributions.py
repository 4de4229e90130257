"""`python -m models distributions`."""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress

from models.analysis.distributions import ALL, SIDES, Density, Images, Moved, Panel, Recorder, across
from models.attacks import Attack
from models.commands import looking, settings
from models.evaluation.outcomes import described
from models.figures import distributions as figures
from models.reports.tables import NONE, Table, number, share
from models.runs.settings import completed
from models.study.statistics import rank
from models.support import arguments, checkpoints, files, terminal
from models.support.arguments import Commands
from models.support.interrupts import AFTER_THIS, Interrupted, StopRequest

_LINES = 8  # networks whose distances along the depth can still be told apart in one figure
_ABOUT = """
Attacks the networks of runs and compares their activations on clean and on adversarial images, of each layer and
channel, the inputs of the activations and their outputs. Writes to RUN/distributions: distributions.json (relative L2
distances of the pairs, Wasserstein-1 distances of the distributions), distributions.png (densities of the inputs of
some channels, with the learned curves over them), outputs.png (of the outputs) and layers.png (distances over depth).

Of several runs, distributions.json and (of up to eight) layers.png in OUT show all; of three or more, against.png and
Spearman's rank correlation say whether the networks that move images less are the more robust, on all images and on
those that the attack did not break.

Ctrl-C stops at any time and loses at most the batch under way: the same command goes on where it stopped.
"""

DEFAULT_IMAGES = 500
DEFAULT_ATTACK = "pgd-20"
_PARTIAL, _SAVE_SECONDS = "partial.safetensors", 60.0


def add(commands: Commands) -> None:
    """Add the command."""
    purpose = "compare activations on clean and adversarial images"
    parser = arguments.command(commands, "distributions", purpose, _ABOUT, _run)
    looking.add(parser, DEFAULT_IMAGES, "test", DEFAULT_ATTACK)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/distributions"), metavar="OUT",
        help="folder for what compares several runs (default: runs/distributions)",
    )  # fmt: skip


def _run(options: argparse.Namespace, command: str) -> int:
    settings.use_threads(options)
    console = terminal.console()
    labels = looking.labels(options.folders)
    results = {}
    with StopRequest(AFTER_THIS) as stop, terminal.progress(console) as progress:
        for folder, label in zip(options.folders, labels, strict=True):
            results[label] = _Look(folder, label, options, command).result(progress, stop)
    if len(results) > 1:
        runs = _summaries(options.folders, results)
        ranks = _ranks(runs)
        summary = {"format": _Look.FORMAT, "command": command, "runs": runs, "ranks": ranks}
        files.write_result(options.out / "distributions.json", summary)
        if len(results) <= _LINES:
            files.write_bytes(options.out / "layers.png", figures.depth(results))
        files.write_bytes(options.out / "against.png", figures.against(runs))
    console.print(_distances(results).terminal())
    if len(results) > 1:
        console.print(_correlations(ranks).terminal())
    console.print(looking.written(_Look.PART, options))
    return 0


def images_of(result: dict[str, Any]) -> Images:
    """Return what became of each image, in the content of a distributions.json."""
    entry = result["by_image"]
    clean, attacked = ([mark == "0" for mark in entry["wrong"][name]] for name in ("clean", "attacked"))
    moved = {side: [math.nan if v is None else v for v in entry["moved"][side]] for side in SIDES}
    return Images(moved, (clean, attacked))


def _check(content: dict[str, Any]) -> None:
    for entry in content["layers"]:
        entry["name"], Moved(**entry["inputs"]), Moved(**entry["outputs"])
    for entry in content["panels"]:
        Panel(**entry), Density(**entry["inputs"]), Density(**entry["outputs"])
    images_of(content)


class _Look(looking.Look):
    FORMAT = 2
    PART = "distributions"
    attack: Attack

    def __init__(self, run: Path, label: str, options: argparse.Namespace, command: str) -> None:
        super().__init__(run, label, options, command)
        self.model = self.network.model.to(self.device)
        self.asked = self.identity(attack=described(self.attack), images=self.count)

    def result(self, progress: Progress, stop: StopRequest) -> dict[str, Any]:
        """Do what is left to do, and return the content of distributions.json.

        Raises:
            Interrupted: a stop was requested; what is done is kept.
        """
        path = self.folder / "distributions.json"
        task = progress.add_task(self.label, total=self.count, status="")
        found = looking.kept(path, self.asked, _check)
        if found is None:
            found = self._measure(lambda images: progress.update(task, completed=images), stop)
            files.write_json(path, found)
            (self.folder / _PARTIAL).unlink(missing_ok=True)
        progress.update(task, completed=self.count)
        panels, count = found["panels"], len(found["layers"])
        files.write_bytes(self.folder / "distributions.png", figures.inputs(panels, count))
        files.write_bytes(self.folder / "outputs.png", figures.outputs(panels, count))
        files.write_bytes(self.folder / "layers.png", figures.depth({self.label: found}))
        return found

    def _measure(self, on_images: Callable[[int], None], stop: StopRequest) -> dict[str, Any]:
        recorder = Recorder(self.model)
        self._take_up(recorder)
        on_images(recorder.images)
        saved = time.monotonic()
        for batch, x, y, generator in self.batches():
            if batch * self.options.batch_size < recorder.images:
                continue
            recorder.add(x, looking.adversarial(self.model, self.attack, x, y, generator), y)
            on_images(recorder.images)
            if stop.requested or time.monotonic() - saved > _SAVE_SECONDS:
                tensors, record = recorder.state()
                checkpoints.save(self.folder / _PARTIAL, tensors, {**record, "identity": self.asked})
                saved = time.monotonic()
            if stop.requested:
                raise Interrupted
        layers, panels = ([asdict(found) for found in of] for of in (recorder.layers(), recorder.panels()))
        return self.content(self.asked, layers=layers, panels=panels, by_image=_by_image(recorder.by_image()))

    def _take_up(self, recorder: Recorder) -> None:
        """Give the recorder what an interrupted call with the same options has seen."""
        path = self.folder / _PARTIAL
        if path.exists():
            tensors, record = checkpoints.load(path)
            if record.get("identity") == self.asked:
                recorder.load_state(tensors, record)


def _by_image(images: Images) -> dict[str, Any]:
    """Return what `images_of` reads: distances to four digits, and "1" where the network is wrong."""
    moved = {side: [_four(v) for v in images.moved[side]] for side in SIDES}
    wrong = {
        n: "".join("01"[not r] for r in right) for n, right in zip(("clean", "attacked"), images.right, strict=True)
    }
    return {"moved": moved, "wrong": wrong}


def _four(value: float) -> float | None:
    """Round to four digits; None for NaN, which JSON has not."""
    return None if math.isnan(value) else float(f"{value:.4g}")


def _summaries(folders: list[Path], results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each run its accuracies, how far its images are moved, and its distances over depth, by layer."""
    kept = ("l2", "l2_std", "w1", "w1_low", "w1_high", "scale")
    images = [images_of(result) for result in results.values()]
    moved = across(images)
    return [
        {
            "run": label,
            "folder": str(folder),
            "activation": result["settings"]["activation"],
            "lr": training["lr"],
            "frozen": training["activation_lr"] == 0,
            "seed": result["settings"]["seed"],
            "identity": result["identity"],
            "accuracy": dict(zip(("clean", "attacked"), images[number].accuracies, strict=True)),
            "moved": {
                which: {side: _four(values[number]) for side, values in of_sides.items()}
                for which, of_sides in moved.items()
            },
            "wrong": result["by_image"]["wrong"],
            "layers": [
                {"name": entry["name"], **{side: {key: entry[side][key] for key in kept} for side in SIDES}}
                for entry in result["layers"]
            ],
        }
        for number, (folder, (label, result)) in enumerate(zip(folders, results.items(), strict=True))
        for training in [completed(dict(result["settings"]))["training"]]
    ]


def _ranks(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return Spearman's correlation of robust accuracy with each distance, over runs."""
    robust = [run["accuracy"]["attacked"] for run in runs]
    found = []
    for side in SIDES:
        distances = {("relative L2", which): [run["moved"][which][side] for run in runs] for which in runs[0]["moved"]}
        w1 = [[layer[side]["w1"] for layer in run["layers"] if layer[side]["w1"] is not None] for run in runs]
        distances["W1 / std", ALL] = [sum(values) / len(values) if values else None for values in w1]
        for (distance, which), values in distances.items():
            correlation = rank([math.nan if v is None else v for v in values], robust)
            found.append({"distance": distance, "side": side, "images": which, **asdict(correlation)})
    return found


def _distances(results: dict[str, dict[str, Any]]) -> Table:
    table = Table("run", "distance", "of the", "first layer", "middle", "last", "mean")
    for label, result in results.items():
        for key, name in (("l2", "relative L2"), ("w1", "W1 / std")):
            for side in SIDES:
                values = [layer[side][key] for layer in result["layers"]]
                seen = [value for value in values if value is not None]
                mean = sum(seen) / len(seen) if seen else None
                cells = (values[0], values[len(values) // 2], values[-1], mean)
                table.add(label, name, side, *map(share, cells))
    return table


def _correlations(ranks: list[dict[str, Any]]) -> Table:
    heads = ("distance", "of the", "images", "rank correlation with robust accuracy", "95 % interval", "runs")
    table = Table(*heads)
    for row in ranks:
        interval = NONE if row["low"] is None else f"[{row['low']:+.2f}, {row['high']:+.2f}]"
        rho = number(row["rho"], form="+.2f")
        table.add(row["distance"], row["side"], row["images"], rho, interval, str(row["count"]))
    return table
