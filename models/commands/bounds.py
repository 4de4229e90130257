"""`python -m models bounds`."""

import argparse
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from models.attacks import Attack
from models.certified.certificates import accuracy_at, certify
from models.certified.expansion import jacobian_norm, largest_ratio
from models.certified.lipschitz import Bound, upper_bound
from models.certified.operations import Step
from models.certified.traced import steps
from models.commands import looking, settings
from models.evaluation import Outcome, evaluate_clean
from models.evaluation.outcomes import Job, Outcomes, described
from models.figures import bounds as figures
from models.reports import bounds as bounds_page
from models.support import arguments, files, seeds, terminal
from models.support.arguments import Commands
from models.support.errors import UserError
from models.support.interrupts import AFTER_THIS, Interrupted, StopRequest

_ABOUT = """
Bounds the Lipschitz constants of the networks of runs, from images in [0, 1] to logits in L2: from above, for all
images, by the norms of their linear maps and the slopes of their activations, and around each image; from below by the
largest stretch found. And proves, image by image, within what radius no image gets another answer, by these constants
and by interval propagation; all this is computed in float64. Beside it is what an attack on the network as it is, in
float32, finds. Constants around an image are the tighter, the fewer images share a batch (--batch-size).

Writes to RUN/bounds: bounds.json and bounds.png, and images.json, numbers of each image. Of several runs, bounds.json
and bounds.png in OUT show all; runs that differ in their seed alone are one row.

Ctrl-C stops at any time and loses at most the batch under way: the same command goes on where it stopped.
"""

DEFAULT_IMAGES = 100
DEFAULT_ATTACK = "pgd-50"
_ATTACKED = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5)  # of eps
_LEGEND = (
    "\nfound: largest stretch of a change of an image, in L2; local: median over images of what is proved around each; "
    "bound: proved for all images; attacked: accuracy under {attack} at {eps:.3g}; radius: median of the radii proved "
    "in L-infinity\n"
)
_METHODS = ("intervals", "lipschitz", "local", "linf")
_PERCENTILES = (5, 50, 95)


def add(commands: Commands) -> None:
    """Add the command."""
    parser = arguments.command(commands, "bounds", "bound Lipschitz constants, and certify accuracy", _ABOUT, _run)
    looking.add(parser, DEFAULT_IMAGES, "test", DEFAULT_ATTACK)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bounds"), metavar="OUT",
        help="folder for what compares several runs (default: runs/bounds)",
    )  # fmt: skip


def _run(options: argparse.Namespace, command: str) -> int:
    settings.use_threads(options)
    console = terminal.console()
    labels = looking.labels(options.folders)
    looks = [_Look(folder, label, options, command) for folder, label in zip(options.folders, labels, strict=True)]
    _one_eps(looks)
    with StopRequest(AFTER_THIS) as stop, terminal.progress(console) as progress:
        results = [look.result(progress, stop) for look in looks]
    if len(results) == 1:
        console.print(bounds_page.layers(results[0]).terminal())
        console.print()
    console.print(bounds_page.networks(labels, results).terminal())
    console.print(_LEGEND.format(attack=options.attack, eps=results[0]["identity"]["eps"]))
    if len(results) > 1:
        groups, at = bounds_page.groups(labels, results), bounds_page.telling(results)
        summary = {"format": _Look.FORMAT, "command": command, "runs": _summaries(labels, options.folders, results)}
        files.write_result(options.out / "bounds.json", summary)
        files.write_bytes(options.out / "bounds.png", figures.networks(groups, at))
        files.write_bytes(options.out / "over-eps.png", figures.over_radius(groups))
    console.print(looking.written(_Look.PART, options))
    return 0


def _one_eps(looks: Sequence["_Look"]) -> None:
    """Refuse to compare runs that would be attacked at different radii."""
    if len({look.eps for look in looks}) > 1:
        told = ", ".join(f"{look.label} {look.eps:.4g}" for look in looks)
        raise UserError(f"the runs were trained for different radii: {told}; give --eps, one radius for all")


class _Look(looking.Look):
    PART = "bounds"
    attack: Attack
    eps: float

    def __init__(self, run: Path, label: str, options: argparse.Namespace, command: str) -> None:
        super().__init__(run, label, options, command)
        radii = (share * self.eps for share in _ATTACKED if share * self.eps <= 1)
        self.attacks = {radius: looking.attack_on(self.network, options.attack, radius)[0] for radius in radii}
        if self.attack.norm != "Linf":
            raise UserError(f"--attack {options.attack} is an attack in {self.attack.norm}; give one in L-infinity")
        self.asked = self.identity()

    def result(self, progress: Progress, stop: StopRequest) -> dict[str, Any]:
        """Do what is left to do, write bounds.json and its figure, and return the content of the former.

        Raises:
            BoundError: the network holds something that cannot be bounded.
            Interrupted: a stop was requested; what is done is kept.
        """
        form = self.network.data.images
        task = progress.add_task(self.label, total=self.count, status="upper bound")
        network = steps(self.network.model, (form.channels, form.size, form.size))
        bound = upper_bound(network)
        images, labels = self.source.tensors(self.count)

        def show(done: int) -> None:
            progress.update(task, completed=done, status="radii and stretch, images")
            if stop.requested:
                raise Interrupted

        of_images = self._images(network, bound, images, labels, show)
        attacked = self._attacked(images, labels, progress, stop)
        found = self._results(bound, of_images, attacked)
        files.write_json(self.folder / "bounds.json", found)
        files.write_bytes(self.folder / "bounds.png", figures.network(found, of_images))
        return found

    def _images(
        self, network: Sequence[Step], bound: Bound, images: Tensor, labels: Tensor, show: Callable[[int], None]
    ) -> list[dict[str, Any]]:
        """Return the numbers of each image; they are kept after every batch, and when fewer images are asked for.

        Those around an image depend on the others of its batch, so a last batch that was cut, or is now, is done again.
        """
        path, size = self.folder / "images.json", self.options.batch_size
        found = (looking.kept(path, self.asked, _check_images) or {"images": []})["images"]
        enough = len(found) > self.count  # then what is kept stays
        if len(found) != self.count:
            whole = min(len(found), self.count) // size * size
            found = found[:whole]
        exact = copy.deepcopy(self.network.model).to(self.device, torch.float64).eval()
        show(len(found))
        for first in range(len(found), self.count, size):
            x, y = images[first : first + size], labels[first : first + size]
            proved = certify(network, bound, x, y)
            radii = {name: getattr(proved, name) for name in (*_METHODS, "l2", "local_bound")}
            fields = radii | self._stretch(exact, x.to(self.device), first // size)
            lists = {name: values.tolist() for name, values in fields.items()}
            found += [
                {name: value if math.isfinite(value) else None for name, value in zip(lists, row, strict=True)}
                for row in zip(*lists.values(), strict=True)
            ]
            if not enough:
                files.write_json(path, {"identity": self.asked, "images": found})
            show(len(found))
        return found

    def _stretch(self, model: nn.Module, images: Tensor, batch: int) -> dict[str, Tensor]:
        x = images.double()
        singular = jacobian_norm(model, x, seeds.generator(self.device, self.options.seed, "stretch", batch))
        ratios = {
            f"ratio_{norm.lower()}": largest_ratio(model, x, self.eps, singular.direction, norm).ratio
            for norm in ("L2", "Linf")
        }
        return {"singular": singular.ratio, **ratios}

    def _attacked(self, images: Tensor, labels: Tensor, progress: Progress, stop: StopRequest) -> list[dict[str, Any]]:
        """Return the accuracy under the attack over radii, the first one 0."""
        model, size = self.network.model.to(self.device), self.options.batch_size
        images, labels = images.to(self.device), labels.to(self.device)
        about = {name: self.asked[name] for name in ("checkpoint", "data")}
        outcomes = Outcomes(self.folder, about, model, images, labels, size)
        found = [_point(0.0, evaluate_clean(model, images, labels, size))]
        for radius, attack in self.attacks.items():
            task = progress.add_task(f"{attack.name} at ε = {radius:.3g}", total=self.count, status="")

            def on_batch(so_far: Outcome, task: Any = task) -> None:
                progress.update(task, completed=len(so_far.found), status=so_far.status)
                if stop.requested:
                    raise Interrupted

            job = Job(f"{attack.name} at {radius:.3g}", attack, self.count, self.options.seed)
            found.append(_point(radius, outcomes.get(job, on_batch)))
        return found

    def _results(self, bound: Bound, images: list[dict[str, Any]], attacked: list[dict[str, Any]]) -> dict[str, Any]:
        def of_each(name: str) -> Tensor:
            values = [image[name] for image in images]
            return torch.tensor([math.inf if v is None else v for v in values], dtype=torch.float64)

        lower = {name: max(image[name] for image in images) for name in ("singular", "ratio_l2", "ratio_linf")}
        return self.content(
            self.asked,
            images=self.count,
            attack={"name": self.attack.name, "settings": described(self.attack)},
            pixels=self._pixels,
            upper=_finite(bound.upper.item()),
            lower=max(lower.values()),
            lower_by=lower,
            local=_percentiles(of_each("local_bound")),
            layers=[{n: _finite(v) for n, v in asdict(layer).items()} for layer in bound.layers],
            radii={name: _percentiles(of_each(name)) for name in (*_METHODS, "l2")},
            certified=[
                {"eps": eps, **{name: self._accuracy(name, of_each(name), eps) for name in _METHODS}}
                for eps in bounds_page.AT
            ],
            attacked=attacked,
        )

    def _accuracy(self, method: str, radii: Tensor, eps: float) -> float:
        """Return the accuracy certified in L-infinity; `lipschitz` and `local` are radii in L2."""
        wide = self._pixels**0.5 if method in ("lipschitz", "local") else 1.0
        return accuracy_at(radii, [wide * eps])[0]

    @property
    def _pixels(self) -> int:
        form = self.network.data.images
        return form.channels * form.size**2


def _check_images(content: Mapping[str, Any]) -> None:
    for image in content["images"]:
        float(image["linf"])


def _point(eps: float, outcome: Outcome) -> dict[str, Any]:
    accuracy = outcome.accuracy
    return {"eps": eps, "accuracy": accuracy.value, "interval": list(accuracy.interval)}


def _finite(value: Any) -> Any:
    """Return a value as JSON has it: None for an infinite one."""
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _percentiles(values: Tensor) -> dict[str, float | None]:
    return {f"p{p}": _finite(values.quantile(p / 100).item()) for p in _PERCENTILES}


def _summaries(
    labels: Sequence[str], folders: Sequence[Path], results: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    left_out = ("format", "command", "layers", "environment")
    return [
        {"run": label, "folder": str(folder), **{n: v for n, v in result.items() if n not in left_out}}
        for label, folder, result in zip(labels, folders, results, strict=True)
    ]
