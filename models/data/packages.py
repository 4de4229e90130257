"""Packages that only some image sets need."""

import importlib
from typing import Any

from models.data.source import DataError


def need(module: str, package: str, what: str) -> Any:
    """Import a module of a package that `what` needs.

    Raises:
        DataError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{what} needs the package {package}, which cannot be imported ({error}). Run `pip install {package}`"
        ) from error
