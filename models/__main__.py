"""`python -m models`."""

import difflib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from models.registry import split

COMMANDS = (
    "bounds", "compare", "curves", "demo", "distributions", "evaluate", "find-lr", "gradients", "recipe", "recipes",
    "report", "study", "train", "tune",
)  # fmt: skip
OPTIONS = (
    "activation", "activation-lr", "activations", "attack", "attacks", "batch-size", "check-images", "clip", "curves",
    "data", "data-root", "decay", "device", "ema", "epochs", "eps", "fake-data", "from", "fsdp", "help", "images",
    "jobs", "label-smoothing", "lr", "method", "momentum", "nesterov", "network", "networks", "no-compile",
    "no-tensorboard", "out", "pgd-steps", "plan", "precision", "recipe", "restart", "runs", "schedule", "seed", "seeds",
    "slope-limit", "slope-penalty", "steps", "test", "threads", "to", "train", "transfer-from", "watch-drop",
    "watch-images", "watch-steps", "weight-decay", "which", "width",
)  # fmt: skip
NAMES = {"study": "study", "tune": "study", "recipe": "recipes", "recipes": "recipes"}  # of files in these folders
THINGS = {  # that options name, other names of theirs included
    "activation": (
        "relu", "leaky_relu", "prelu", "elu", "silu", "swish", "gelu", "softplus", "smoothrelu", "pssilu", "tanh",
        "sigmoid", "kwta", "kaf", "kaf_relu", "kaf_elu", "kaf_silu", "kaf_swish", "kaf_tanh", "kaf_isometric", "kaf_rq",
        "kaf_matern", "kaf_bspline", "kaf_free",
    ),
    "attack": (
        "fgsm", "fast", "pgd", "targeted", "nes", "spsa", "adaptive", "autoattack", "apgd-ce", "apgd-dlr", "apgd-t",
        "fab-t", "square", "deepfool", "fmn", "hopskipjump", "cw", "boundary",
    ),
    "data": (
        "mnist5k", "digits", "mnist", "fashion", "cifar10", "cifar100", "svhn", "imagenet", "imagefolder", "webdataset",
        "fake",
    ),
    "method": (
        "standard", "clean", "fgsm", "fast", "rs-fgsm", "nfgsm", "n-fgsm", "pgd", "madry", "free", "trades",
        "gradalign",
    ),
    "network": (
        "vgg", "light", "resnet", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "preactresnet18",
        "wideresnet", "wideresnet28_10", "resnet50",
    ),
    "schedule": ("triangular", "cyclic", "piecewise", "cosine", "constant"),
}  # fmt: skip
_EXTRAS = ("adjustText", "jinja2", "matplotlib", "numpy", "rich", "safetensors", "scipy", "statsmodels", "torchvision")


def _typo(command: str, *arguments: str) -> str | None:
    """Say which command, option or name there is not, and what was meant: the parser could, but loads torch first."""
    if command.startswith("-"):
        return None
    if command not in COMMANDS:
        near = " or ".join(difflib.get_close_matches(command, COMMANDS)) or f"one of {', '.join(COMMANDS)}"
        return f"python -m models: error: there is no command {command!r}; did you mean {near}?"
    for option in (argument.partition("=")[0] for argument in arguments):
        if option.startswith("--") and option[2:] not in ("", *OPTIONS):
            meant = difflib.get_close_matches(option[2:], OPTIONS, n=1)
            hint = f"did you mean --{meant[0]}?" if meant else f"see python -m models {command} --help"
            return f"python -m models {command}: error: there is no option {option}; {hint}"
    for thing, name in _named(arguments):
        if name not in THINGS[thing]:
            close = " or ".join(difflib.get_close_matches(name, THINGS[thing])) or f"one of {', '.join(THINGS[thing])}"
            return f"python -m models {command}: error: unknown {thing} {name!r}; did you mean {close}?"
    if command in NAMES and arguments and not arguments[0].startswith("-") and not arguments[0].endswith(".json"):
        folder = NAMES[command]
        names = sorted({path.stem for path in Path(__file__).with_name(folder).glob("*.json")} - {"published"})
        if arguments[0] not in names:
            close = " or ".join(difflib.get_close_matches(arguments[0], names)) or f"one of {', '.join(names)}"
            what = folder.removesuffix("s")
            return f"python -m models {command}: error: unknown {what} {arguments[0]!r}; did you mean {close}?"
    return None


def _named(arguments: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield what the values of options name, without the options of these: a kind of thing, and the name of one."""
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        thing = option[2:] if option[2:] in THINGS else option[2:].removesuffix("s")
        text = value if equals else "".join(arguments[i + 1 : i + 2])
        if option.startswith("--") and thing in THINGS and text and not text.startswith("-"):
            for part in split(text) if option == "--attacks" else (text,):
                yield thing, re.sub(r"^pgd-\d+(-\d+)?$", "pgd", part.partition(":")[0])


if __name__ == "__main__" and len(sys.argv) > 1 and (_found := _typo(*sys.argv[1:])) is not None:
    print(_found, file=sys.stderr)
    sys.exit(2)

try:
    from models.cli import main
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        raise
    sys.exit(f"error: python -m models needs the package {package}; run `pip install 'kafops[models]'`")

if __name__ == "__main__":
    sys.exit(main())
