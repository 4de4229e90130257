"""Recipes: settings in files, with where they come from and the numbers published for them.

A recipe is a JSON file: `about`, `source`, `notes`, `settings` as in run.json (an eps may be text, such as "8/255"),
`variants`, and `evaluation` with the attacks, eps and state ("which") of the source, as `python -m models evaluate`
takes them. A variant is an activation and the settings that the source changes for it. published.json holds the
numbers, one row for each attack; accuracies are fractions.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from models.activations import ACTIVATIONS
from models.registry import near, split
from models.runs.settings import Settings
from models.support.arguments import fraction

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
        evaluation: "attacks", "eps" and "which" of the source's evaluation, as `python -m models evaluate` takes them.
        variants: settings for other activations.
    """

    name: str
    about: str
    source: str
    notes: tuple[str, ...]
    settings: Settings
    evaluation: dict[str, str]
    variants: tuple[Settings, ...] = ()

    @property
    def attacks(self) -> tuple[str, ...]:
        """The attacks of the source's evaluation, names with options."""
        return split(self.evaluation["attacks"])

    @property
    def evaluation_eps(self) -> float:
        """The radius of these attacks."""
        return fraction(self.evaluation["eps"])

    @property
    def activations(self) -> tuple[str, ...]:
        """The activations that the source has settings for."""
        return tuple(settings.activation for settings in (self.settings, *self.variants))

    def own_settings(self, activation: str) -> Settings | None:
        """Return the source's settings for an activation, whatever its options, or None where it has none.

        Raises:
            ValueError: there is no such activation, or it has no such option.
        """
        name = ACTIVATIONS.parse(activation)[0]
        every = (self.settings, *self.variants)
        return next((s for s in every if ACTIVATIONS.parse(s.activation)[0] == name), None)

    def settings_for(self, activation: str | None) -> Settings:
        """Return the settings for an activation, by default the recipe's first.

        An activation without options of its own has the source's. One that the source does not have gets the settings
        of the first.

        Raises:
            ValueError: there is no such activation, or it has no such option.
        """
        if activation is None:
            return self.settings
        own = self.own_settings(activation)
        if own is None or ":" in activation:
            return replace(own or self.settings, activation=activation)
        return own


@dataclass(frozen=True)
class Published:
    """Accuracies that someone published for a recipe; fractions, None where they did not.

    Args:
        recipe: name.
        label: who or what, in a word or two.
        network, activation, data: as in settings.
        eps: radius of the attack.
        attack: its name, such as pgd-50-10.
        clean, robust: accuracy without attack, and under it.
        source: address, or paper and table.
        verified: "read in source", "quoted by ..." or "from memory".
        note: what else to know.
    """

    recipe: str
    label: str
    network: str
    activation: str
    data: str
    eps: float
    attack: str
    clean: float | None
    robust: float | None
    source: str
    verified: str
    note: str

    @property
    def remembered(self) -> bool:
        """Whether nobody has checked the number."""
        return self.verified == "from memory"


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
        given = content["settings"]
        return Recipe(
            path.stem,
            content["about"],
            content["source"],
            tuple(content.get("notes", ())),
            _settings(given),
            _evaluation(**content["evaluation"]),
            tuple(_settings(_laid_over(given, variant)) for variant in content.get("variants", ())),
        )
    except (argparse.ArgumentTypeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no recipe: {error!r}") from error


@cache
def published() -> tuple[Published, ...]:
    """Return all published numbers, in the order of the file."""
    rows = json.loads((FOLDER / "published.json").read_text(encoding="utf-8"))
    return tuple(Published(**{**row, "eps": fraction(row["eps"])}) for row in rows)


def published_for(recipe: str) -> tuple[Published, ...]:
    """Return the numbers published for a recipe."""
    return tuple(row for row in published() if row.recipe == recipe)


def _evaluation(attacks: str, eps: str, which: str = "best") -> dict[str, str]:
    return {"attacks": attacks, "eps": eps, "which": which}


def _laid_over(settings: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings, **variant, "training": {**settings["training"], **variant.get("training", {})}}


def _settings(values: Mapping[str, Any]) -> Settings:
    training = dict(values["training"])
    if isinstance(training.get("eps"), str):
        training["eps"] = fraction(training["eps"])
    return Settings.from_dict({**values, "training": training})
