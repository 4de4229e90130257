"""`python -m models`."""

import sys

_EXTRAS = ("matplotlib", "mlxtend", "numpy", "rich", "safetensors", "torchvision")

try:
    from models.cli import main
except ModuleNotFoundError as error:
    if error.name not in _EXTRAS:
        raise
    sys.exit(f"error: python -m models needs the package {error.name}; run `pip install 'kafops[models]'`")

if __name__ == "__main__":
    sys.exit(main())
