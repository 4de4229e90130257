"""Command-line options that make the settings of a training."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models import recipes
from models.activations import ACTIVATIONS
from models.data import DATA
from models.networks import NETWORKS
from models.registry import Registry
from models.runs.settings import Settings
from models.support import arguments
from models.training.methods import METHODS
from models.training.recipe import DECAYS, PRECISIONS, Recipe
from models.training.schedules import SCHEDULES

DEFAULT_RECIPE = "mnist5k"

_TRAINING: tuple[tuple[str, Callable[[str], Any], str], ...] = (
    ("method", str, "how a batch becomes a loss: " + ", ".join(METHODS.names)),
    ("eps", arguments.radius, "radius of the attacks, such as 8/255; images are in [0, 1]"),
    ("epochs", arguments.integer(1), "passes over the training images"),
    ("batch_size", arguments.integer(1), "images in a batch, over all processes"),
    ("lr", arguments.positive, "peak learning rate"),
    ("schedule", str, "of the learning rate: " + ", ".join(SCHEDULES.names)),
    ("momentum", arguments.share, "of SGD"),
    ("nesterov", arguments.yes_or_no, "Nesterov's momentum"),
    ("weight_decay", arguments.not_negative, "of SGD"),
    ("decay", str, f"what decays: {' or '.join(DECAYS)}"),
    (
        "activation_lr",
        arguments.not_negative,
        "learning rate of activation parameters, as a multiple of lr; 0 keeps them as they start",
    ),
    ("clip", arguments.or_none(arguments.positive), "largest norm of the gradient, or none"),
    ("label_smoothing", arguments.share, "of the cross-entropy"),
    (
        "slope_penalty",
        arguments.not_negative,
        "weight of a penalty on learned curves steeper for their size than ReLU, or 0",
    ),
    ("slope_limit", arguments.or_none(arguments.positive), "largest slope of learned curves, or none"),
    ("precision", str, f"{', '.join(PRECISIONS)}; the latter two are automatic mixed precision"),
    ("ema", arguments.share, "decay of a moving average of the weights, 0 for none"),
    ("watch_steps", arguments.integer(0), "PGD steps of the watch after each epoch, 0 for no watch"),
    ("watch_images", arguments.integer(0), "held-out images that the watch attacks"),
    ("watch_drop", arguments.radius, "fall of robust accuracy at which training is stopped, 0 for never"),
)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options. What is not given is absent from the parsed options, and comes from a recipe."""

    def option(*names: str, **keywords: Any) -> None:
        parser.add_argument(*names, default=argparse.SUPPRESS, **keywords)

    for name, registry in (("data", DATA), ("network", NETWORKS), ("activation", ACTIVATIONS)):
        option(f"--{name}", metavar="NAME", help=_names(registry))
    option("--seed", type=arguments.integer(0), help="of weights, order, augmentation and noise (default: 0)")
    for name, parse, purpose in _TRAINING:
        option("--" + name.replace("_", "-"), type=parse, metavar="X", help=purpose)
    fake = "made-up images in the place of the set's, to try things without it"
    parser.add_argument("--fake-data", action="store_true", help=fake)
    add_machine(parser)


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add where the data is, and how many threads compute."""
    option = parser.add_argument
    option("--data-root", type=Path, metavar="DIR", help="folder of the data set (default: $KAFOPS_DATA, then ./data)")
    option("--threads", type=arguments.integer(1, 4096), help="processor threads (default: PyTorch's choice)")


def collect(options: argparse.Namespace, recipe: str, refuse: Callable[[str], Any]) -> Settings:
    """Return a recipe's settings with those changes that the options make; call `refuse` where that makes no sense."""
    given = vars(options)
    try:
        start = recipes.load(recipe).settings_for(given.get("activation"))
        changes = {name: given[name] for name in ("data", "network", "seed") if name in given}
        if options.fake_data:
            changes["data"] = f"fake:like={DATA.parse(changes.get('data', start.data))[0]}"
        names = [field.name for field in dataclasses.fields(Recipe) if field.name in given]
        training = dataclasses.replace(start.training, **{name: given[name] for name in names})
        return dataclasses.replace(start, **changes, training=training)
    except ValueError as error:
        refuse(str(error))
        raise


def use_threads(options: argparse.Namespace) -> None:
    """Compute on so many threads as the options say."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)


def _names(registry: Registry[Any]) -> str:
    return f"one of {', '.join(registry.names)}, with options as in name:option=value,..."
