"""What a study is: a grid of runs, each with a name, and its settings."""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.attacks import ATTACKS
from models.registry import near
from models.runs.settings import Settings
from models.support.arguments import radius

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """One network of the grid."""

    network: str  # its label in the study
    activation: str
    seed: int
    settings: Settings

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.network}-{self.activation}-{self.seed}".replace("/", "_")


@dataclass(frozen=True)
class Study:
    """A study file.

    Args:
        name: of the file, without .json.
        about: one sentence.
        data: image set with options; the same split for every run.
        networks: by label, names with options.
        activations: names, or those of variants; the first is what the others are compared with.
        seeds: of weights, order and noise.
        training: settings common to all runs, see `models.training.Recipe`.
        attacks: by label, names with options; robust accuracy is reported under each.
        eps: of the attacks.
        images: test images attacked.
        variants: by name, an activation and the settings of its training that differ from the common ones, as
            {"activation": "kaf", "training": {"slope_limit": 1.0}}.
    """

    name: str
    about: str
    data: str
    networks: dict[str, str]
    activations: tuple[str, ...]
    seeds: tuple[int, ...]
    training: dict[str, Any]
    attacks: dict[str, str]
    eps: float
    images: int
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    def runs(self) -> list[Run]:
        """Return all runs, seeds outermost: a study that is stopped early has compared everything once."""
        return [
            Run(label, activation, seed, self._settings(network, activation, seed))
            for seed in self.seeds
            for activation in self.activations
            for label, network in self.networks.items()
        ]

    def _settings(self, network: str, activation: str, seed: int) -> Settings:
        variant = self.variants.get(activation, {"activation": activation})
        training = {**self.training, **variant.get("training", {})}
        common = {"data": self.data, "network": network, "seed": seed}
        return Settings.from_dict({**common, "activation": variant["activation"], "training": training})


def names() -> tuple[str, ...]:
    """Return the names of all studies."""
    return tuple(sorted(p.stem for p in FOLDER.glob("*.json")))


def load(name: str) -> Study:
    """Read a study by name, or from a file whose path ends in .json.

    Raises:
        ValueError: there is no such study, or the file is none.
    """
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"unknown study {name!r}, there are {', '.join(names())}{near(name, names())}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["eps"] = radius(str(content["eps"]))
        content["training"] = {**content["training"], "eps": content["eps"]}
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in content.items()}
        study = Study(path.stem, **values)
        runs = [run.name for run in study.runs()]
        if len(set(runs)) < len(runs):
            raise ValueError("networks, activations and seeds must not repeat")
        if lost := [name for name in study.variants if name not in study.activations]:
            raise ValueError(f"variants must be among the activations, and these are not: {', '.join(lost)}")
        for name, variant in study.variants.items():
            if unknown := sorted(set(variant) - {"activation", "training"}):
                raise ValueError(f"variant {name} may have activation and training, and has {', '.join(unknown)} too")
        for attack in study.attacks.values():
            ATTACKS.create(attack, study.eps)
    except (KeyError, TypeError, ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{path} is no study: {error}") from error
    return study
