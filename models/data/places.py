"""Where image sets that are files are looked for."""

import os
from collections.abc import Sequence
from pathlib import Path

from models.data.source import DataError

VARIABLE = "KAFOPS_DATA"


def folders(root: Path | None) -> dict[Path, str]:
    """Return the folders to look in, and why: `root` alone if given, else $KAFOPS_DATA if set, and ./data."""
    if root is not None:
        return {Path(root): "given as root"}
    named = os.environ.get(VARIABLE)
    return {**({Path(named): f"${VARIABLE}"} if named else {}), Path("data"): "./data"}


def find(what: str, root: Path | None, names: Sequence[str], how: str) -> Path:
    """Return the first of `names` that there is, in the first folder that has any.

    Args:
        what: the set, for the error.
        root: see `folders`.
        names: of files or folders, relative to the folders looked in.
        how: to get them, and the layout, in words.

    Raises:
        DataError: they are nowhere.
    """
    for folder in folders(root):
        for name in names:
            if (folder / name).exists():
                return folder / name
    looked = " and ".join(_described(folder, origin) for folder, origin in folders(root).items())
    raise DataError(
        f"{what} was not found: there is no {' or '.join(names)} in {looked}. {how}. Give the folder that holds it by "
        f"--data-root (root in Python), or name it in the environment variable {VARIABLE}, or have it in ./data. To "
        "try things out without it, --data fake makes up images of the same format"
    )


def _described(folder: Path, origin: str) -> str:
    missing = "" if folder.is_dir() else ", no such folder"
    return f"{folder.absolute()} ({origin}{missing})"
