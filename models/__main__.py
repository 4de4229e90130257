"""`python -m models`."""

import sys

_EXTRAS = ("matplotlib", "numpy", "rich", "safetensors", "torchvision")

try:
    from models.cli import main
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        raise
    sys.exit(f"error: python -m models needs the package {package}; run `pip install 'kafops[models]'`")

if __name__ == "__main__":
    sys.exit(main())
