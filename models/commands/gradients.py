"""`python -m models gradients`."""

import argparse
import itertools
from pathlib import Path

import torch
from rich.progress import track

from models import data, networks
from models.activations import ACTIVATIONS
from models.commands import study as studies
from models.figures import gradients as figures
from models.networks import NETWORKS
from models.study import depth
from models.study.depth import page
from models.support import arguments, files, terminal
from models.support.arguments import Commands

_ABOUT = """
Measures norms of signals and gradients layer by layer: of networks as they start (default), and with --train along the
training of a study of them, which also tells whether they learn.

As they start: writes initial.md, initial.png (gradients), signals.png and initial.json to OUT: for each network and
activation the gradient norm of the first convolution over that of the last one, what the theory of
docs/exploding-gradients.md says of it, and the factor by which activations grow a gradient, sqrt(E[f'^2] / Var f), for
their own inputs and for standard normal ones.

With --train: each run is trained, its norms are measured after every epoch, and OUT gets README.md, figures and a
result for each run. Ctrl-C stops at any time; the same command goes on with what is left.
"""

_FORMS = ("post,branch=1", "post", "post_norm", "pre")
_NETWORKS = [f"resnet{depth}:form={form},width=8,patch=2" for form in _FORMS for depth in (20, 56, 110)]
_ACTIVATIONS = ["relu", "silu", "elu", "kaf:std=0.05", "kaf", "kaf_relu", "kaf_elu", "kaf_isometric"]


def add(commands: Commands) -> None:
    """Add the command."""
    purpose = "measure exploding gradients, at the start and along training"
    parser = arguments.command(commands, "gradients", purpose, _ABOUT, _run)
    option = parser.add_argument
    option("--networks", nargs="+", metavar="NAME", help="default: ResNets of 20, 56 and 110 layers in 4 forms")
    option("--activations", nargs="+", metavar="NAME", help=f"default: {' '.join(_ACTIVATIONS)}")
    option("--data", metavar="NAME", help="images to measure with (default: mnist5k)")
    option("--seeds", type=arguments.integer(1), metavar="N", help="networks of each kind (default: 3)")
    option(
        "--train", nargs="?", const=str(depth.DEPTH), metavar="FILE",
        help="train a study, a file as `python -m models study` takes, and measure along it (default: depth.json)",
    )  # fmt: skip
    studies.add_options(parser)


def _run(options: argparse.Namespace, command: str) -> int:
    _refuse_options_of_the_other_kind(options)
    torch.set_num_threads(options.threads)
    try:
        if options.train is not None:
            return studies.carry_out(
                studies.load(options.train, options.out), options, command, page.report, depth.train
            )
        options.networks, options.activations = options.networks or _NETWORKS, options.activations or _ACTIVATIONS
        options.data, options.seeds = options.data or "mnist5k", options.seeds or 3
        for network, activation in itertools.product(options.networks, options.activations):
            NETWORKS.parse(network)
            ACTIVATIONS.parse(activation)
        sets = data.load(options.data, 0)
        for network in options.networks:
            networks.build(network, "relu", sets.images, 0)
    except ValueError as error:
        options.refuse(str(error))
    out = options.out or Path("runs/gradients")
    images, labels = depth.batch(sets)
    grid = list(itertools.product(options.networks, options.activations, range(options.seeds)))
    console, starts = terminal.console(), []
    for network, activation, seed in track(grid, "measuring", console=console):
        starts.append(depth.start(network, activation, seed, sets.images, images, labels))
        if seed:
            del starts[-1]["weights"], starts[-1]["signals"]  # figures show those of the first seed
    text = page.starts(starts, command, options.data)
    files.write_result(out / "initial.json", {"command": command, "data": options.data, "starts": starts})
    files.write_bytes(out / "initial.png", figures.starts(starts))
    files.write_bytes(out / "signals.png", figures.signals(starts))
    files.write_text(out / "initial.md", text)
    console.print(text, soft_wrap=True)
    console.print(f"Written: {out / 'initial.md'}")
    return 0


def _refuse_options_of_the_other_kind(options: argparse.Namespace) -> None:
    start, training = ("networks", "activations", "data", "seeds"), ("plan", "jobs", "runs")
    others = training if options.train is None else start
    if given := [f"--{name}" for name in others if getattr(options, name)]:
        what = "go with --train" if options.train is None else "are in the file that --train names"
        options.refuse(f"{', '.join(given)}: such options {what}")
