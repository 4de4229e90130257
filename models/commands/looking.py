"""What commands that look at trained networks have in common: options, labels of runs, what is kept."""

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from models import data, runs
from models.attacks import ATTACKS, Attack, LinfAttack, check_classes, perturb
from models.commands import settings
from models.evaluation.outcomes import digest, images_digest
from models.runs import trained
from models.runs.trained import Trained
from models.support import environment, files, seeds
from models.support.arguments import integer, radius
from models.support.errors import UserError


def add(parser: argparse.ArgumentParser, images: int, source: str, attack: str | None) -> None:
    """Add the folders of the runs, and the options of commands that look at these.

    Args:
        parser: of the command.
        images: default of --images.
        source: which images these are: "test" or "validation".
        attack: default of --attack, None for none.
    """
    option = parser.add_argument
    option("folders", type=Path, nargs="+", metavar="RUN", help="folder of a trained network")
    option("--attack", type=_attack, default=attack, metavar="NAME", help=f"attack (default: {attack or 'none'})")
    add_options(parser, images, source)


def add_options(parser: argparse.ArgumentParser, images: int, source: str) -> None:
    """Add the options of all commands that read trained networks; arguments are those of `add`."""
    option = parser.add_argument
    option("--which", choices=tuple(trained.WHICH), default="best", help="state of the network (default: best)")
    option("--eps", type=_radius, metavar="X", help="radius, such as 8/255 (default: that of the training)")
    option("--images", type=integer(1), metavar="N", help=f"{source} images (default: {images}, or all)")
    option("--batch-size", type=integer(1), default=100, metavar="N", help="images at once (default: 100)")
    option("--seed", type=integer(0), default=0, help="of the attack (default: 0)")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    settings.add_machine(parser)
    parser.set_defaults(source=source, default_images=images)


class Look:
    """A run that a command looks at, as its options say; what it finds goes to PART/PART.json in the run's folder.

    Args:
        run: its folder.
        label: what it is called.
        options, command: as `add` has them, and their text.

    Raises:
        UserError: the options do not fit the run.
    """

    PART: ClassVar[str]
    FORMAT: ClassVar[int] = 1  # of the file

    def __init__(self, run: Path, label: str, options: argparse.Namespace, command: str) -> None:
        self.run, self.label, self.options, self.command = run, label, options, command
        self.folder = run / self.PART
        self.network = trained.load(run, options.which, options.data_root)
        self.device = device(options.device)
        self.attack, self.eps = None, None
        if options.attack is not None:
            self.attack, self.eps = attack_on(self.network, options.attack, options.eps)
        self.source = getattr(self.network.data, options.source)
        self.count = count(options, len(self.source), run)

    def identity(self, **more: Any) -> dict[str, Any]:
        """Return all that decides what is found, as JSON values."""
        asked = {
            "format": self.FORMAT,
            "checkpoint": digest(self.network.checkpoint),
            "data": self.network.settings["data"],
            "content": self._content,
            "eps": self.eps,
            "batch_size": self.options.batch_size,
            "seed": self.options.seed,
            "device": self.device.type,
        }
        return json.loads(json.dumps({**asked, **more}))

    @functools.cached_property
    def _content(self) -> dict[str, Any]:  # tells images of one name in two folders apart, whatever number is asked for
        return {"count": len(self.source), "first": images_digest(self.source.ordered(1, 1))}

    def content(self, identity: Mapping[str, Any], **found: Any) -> dict[str, Any]:
        """Return what goes into the file."""
        return {
            "format": self.FORMAT,
            "command": self.command,
            "identity": identity,
            "settings": self.network.settings,
            "which": self.options.which,
            **found,
            "environment": environment.describe(),
        }

    def batches(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Generator]]:
        """Yield the number of each batch, images, labels, and what the attack on them draws from."""
        for number, (x, y) in enumerate(self.source.ordered(self.options.batch_size, self.count)):
            generator = seeds.generator(self.device, self.options.seed, "attack", number)
            yield number, x.to(self.device), y.to(self.device), generator


def labels(folders: list[Path]) -> list[str]:
    """Return a name for each run: that of its folder, or its whole path where two folders have one name.

    A run on made-up images says so.

    Raises:
        UserError: a folder is given twice.
    """
    resolved = [folder.resolve() for folder in folders]
    for folder in folders:
        if resolved.count(folder.resolve()) > 1:
            raise UserError(f"{folder} is given twice; give each run once")
    names = [path.name for path in resolved]
    unique = [name if names.count(name) == 1 else str(path) for name, path in zip(names, resolved, strict=True)]
    return [name + marked(folder) for name, folder in zip(unique, folders, strict=True)]


def marked(run: Path) -> str:
    """Return what to put behind the name of a run that was trained on made-up images."""
    try:
        return data.marked(str(runs.read_settings(run).get("data")))
    except runs.RunError:  # said by whoever reads the run
        return ""


def device(name: str) -> torch.device:
    """Return a device.

    Raises:
        UserError: it cannot be used here.
    """
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA asserts
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return found


def attack_on(network: Trained, name: str, eps: float | None) -> tuple[Attack, float]:
    """Return the attack by this name on a network, and its radius: eps, or where that is None the training's.

    Raises:
        UserError: there is no radius, or the attack cannot be made.
    """
    eps = radius_of(network, eps)
    try:
        attack = ATTACKS.create(name, eps)
        check_classes(attack, network.data.images.classes)
        return attack, eps
    except ValueError as error:
        raise UserError(str(error)) from error


def radius_of(network: Trained, eps: float | None) -> float:
    """Return a radius: eps, or where that is None the training's.

    Raises:
        UserError: there is none.
    """
    eps = eps or network.settings.get("training", {}).get("eps")
    if not eps:
        raise UserError("the network was not trained for a radius; give --eps, such as --eps 8/255")
    return eps


def adversarial(
    model: torch.nn.Module, attack: Attack, x: torch.Tensor, y: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:  # [N, C, H, W] in [0, 1]
    """Return an adversarial image for each image.

    Attacks of the gradient-sign family with one start take all their steps on every image. Others stop where an image
    is misclassified, and leave those alone that are misclassified as they are.
    """
    if isinstance(attack, LinfAttack) and attack.restarts == 1:
        return perturb(model, x, y, attack, generator)
    return attack.search(model, x, y, generator)[0]


def kept(path: Path, identity: dict[str, Any], check: Callable[[dict[str, Any]], object]) -> dict[str, Any] | None:
    """Return what an earlier call with the same identity has written; None where there is nothing of the kind.

    Args:
        path: a JSON file.
        identity: all that decides its content, as JSON values; the file has it too, under this name.
        check: reads the content, and raises a KeyError, TypeError or ValueError where it is not what was written.

    Raises:
        UserError: the file is damaged.
    """
    try:
        content = files.read_json(path)
        if content is None or content["identity"] != identity:
            return None
        check(content)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and the same command makes it anew") from error
    return content


def count(options: argparse.Namespace, there: int, run: Path) -> int:
    """Return how many images to look at.

    Raises:
        UserError: there are not so many.
    """
    if (options.images or 0) > there:
        what = f"{options.source} images of {run}"
        raise UserError(f"--images {options.images} is more than the {there} images there are: {what}")
    return options.images or min(options.default_images, there)


def written(part: str, options: argparse.Namespace) -> str:
    """Return where a command wrote: to a folder of each run, and of several runs to --out."""
    folders = [folder / part for folder in options.folders]
    out = [options.out] if len(folders) > 1 and "out" in options else []
    return f"Written to {', '.join(map(str, folders + out))}"


def _attack(name: str) -> str:
    try:
        ATTACKS.parse(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def _radius(text: str) -> float:
    value = radius(text)
    if value == 0:
        raise argparse.ArgumentTypeError("wanted a radius above 0, got 0: nothing would be attacked")
    return value
