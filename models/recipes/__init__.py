"""Recipes: settings in files, with where they come from and the numbers published for them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.registry import near
from models.settings import Settings

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """A recipe file.

    Args:
        name: of the file, without .json.
        about: one sentence.
        source: where the settings are from.
        notes: what differs from the source, or is not said there.
        settings: of the training.
        evaluation: attacks and eps of the source's evaluation, as `python -m models evaluate` takes them.
    """

    name: str
    about: str
    source: str
    notes: tuple[str, ...]
    settings: Settings
    evaluation: dict[str, Any]


def names() -> tuple[str, ...]:
    """Return the names of all recipes."""
    return tuple(sorted(p.stem for p in FOLDER.glob("*.json") if p.stem != "published"))


def load(name: str) -> Recipe:
    """Read a recipe by name, or from a file whose path ends in .json.

    Raises:
        ValueError: there is no such recipe, or the file is none.
    """
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if name not in names() and not (name.endswith(".json") and path.is_file()):
        raise ValueError(f"unknown recipe {name!r}, there are {', '.join(names())}{near(name, names())}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Recipe(
            path.stem,
            content["about"],
            content["source"],
            tuple(content.get("notes", ())),
            Settings.from_dict(content["settings"]),
            content["evaluation"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no recipe: {error!r}") from error
