"""`python -m models`."""

import difflib
import sys

COMMANDS = (
    "bounds", "compare", "curves", "demo", "distributions", "evaluate", "find-lr", "gradients", "recipe", "recipes",
    "report", "study", "train", "tune",
)  # fmt: skip
_EXTRAS = ("matplotlib", "numpy", "rich", "safetensors", "torchvision")
_given = sys.argv[1] if len(sys.argv) > 1 else "-"
if __name__ == "__main__" and not _given.startswith("-") and _given not in COMMANDS:  # before torch is loaded
    near = " or ".join(difflib.get_close_matches(_given, COMMANDS)) or f"one of {', '.join(COMMANDS)}"
    print(f"python -m models: error: there is no command {_given!r}; did you mean {near}?", file=sys.stderr)
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
