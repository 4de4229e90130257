"""`python -m models`."""

import difflib
import sys
from pathlib import Path

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
_EXTRAS = ("jinja2", "matplotlib", "numpy", "rich", "safetensors", "scipy", "statsmodels", "torchvision")


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
    if command in NAMES and arguments and not arguments[0].startswith("-") and not arguments[0].endswith(".json"):
        folder = NAMES[command]
        names = sorted({path.stem for path in Path(__file__).with_name(folder).glob("*.json")} - {"published"})
        if arguments[0] not in names:
            close = " or ".join(difflib.get_close_matches(arguments[0], names)) or f"one of {', '.join(names)}"
            what = folder.removesuffix("s")
            return f"python -m models {command}: error: unknown {what} {arguments[0]!r}; did you mean {close}?"
    return None


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
