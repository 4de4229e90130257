"""What a study is: a grid of runs, each with a name, and its settings."""

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from models.activations import ACTIVATIONS
from models.attacks import ATTACKS
from models.registry import near
from models.runs.settings import Settings
from models.support.arguments import radius
from models.support.files import file_name

FOLDER = Path(__file__).parent


COMMON, TUNED = "common", "tuned"
HELD_OUT = "held out"  # what the attack of a tuning is called
Rates = dict[str, float]
"""Learning rates as settings of a training: "lr", and "activation_lr" as a multiple of it."""


@dataclass(frozen=True)
class Panel:
    """What runs have in common that are compared with each other.

    Args:
        network, method: their labels in the study; no method where the study has one for all.
        eps: radius of training and attacks.
        label, name: for readers and for files.
    """

    network: str
    method: str | None
    eps: float
    label: str
    name: str


@dataclass(frozen=True)
class Run:
    """One network of the grid."""

    panel: Panel
    activation: str
    seed: int
    settings: Settings
    rate: str = COMMON  # the study's rate, the activation's own or one that is tried

    @property
    def name(self) -> str:
        """Of its files."""
        rate = () if self.rate == COMMON else (self.rate,)
        return file_name("-".join((self.panel.name, self.activation, *rate, str(self.seed))))


@dataclass(frozen=True)
class Tuning:
    """How the rates of each activation are chosen: by robust accuracy on images held out of training.

    Args:
        lr: learning rates to try.
        activation_lr: rates of activation parameters to try, as multiples of lr, where an activation has some that
            are learned and its variant does not say their rate.
        seeds: of these runs; none of the study's own.
        attack: under which accuracy counts.
        images: held-out images attacked.
    """

    lr: tuple[float, ...]
    activation_lr: tuple[float, ...]
    seeds: tuple[int, ...]
    attack: str
    images: int


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
        eps: radius of training and attacks; or several, each of which is run.
        images: test images attacked; or by attack, the largest number being that of clean accuracy.
        variants: by name, an activation and the settings of its training that differ from the common ones, as
            {"activation": "kaf", "training": {"slope_limit": 1.0}}.
        comparisons: pairs of activations that are the study's questions, named before its runs.
        tuning: how each activation's rates are chosen, for a study with "tuned" among its rates.
        rates: "tuned" for runs at each activation's own rates, "common" for runs at the rates of `training`.
        tuned_by: the study whose tuned rates these are, for a study with "tuned" among its rates and no tuning.
        tuned: by network and activation, the rates that `python -m models tune` has chosen.
        methods: by label, the settings of each training method, such as {"method": "free:m=4", "epochs": 3}; or none,
            and `training` says the method.
        part: of the image set on which accuracy is measured, "test" or "validation".
    """

    name: str
    about: str
    data: str
    networks: dict[str, str]
    activations: tuple[str, ...]
    seeds: tuple[int, ...]
    training: dict[str, Any]
    attacks: dict[str, str]
    eps: float | tuple[float, ...]
    images: int | dict[str, int]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    comparisons: tuple[tuple[str, str], ...] = ()
    tuning: Tuning | None = None
    rates: tuple[str, ...] = (COMMON,)
    tuned_by: str = ""
    tuned: dict[str, dict[str, Rates]] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    part: str = "test"

    @property
    def radii(self) -> tuple[float, ...]:
        """Every eps."""
        return self.eps if isinstance(self.eps, tuple) else (self.eps,)

    def panels(self) -> list[Panel]:
        """Return each network with each method and radius."""
        panels = []
        for network, method, eps in itertools.product(self.networks, self.methods or (None,), self.radii):
            parts = [network, *([method] if method is not None else [])]
            several = len(self.radii) > 1
            label, name = ([*parts, text] if several else parts for text in (f"ε = {eps:.3g}", f"eps{eps:.3g}"))
            panels.append(Panel(network, method, eps, ", ".join(label), "-".join(name)))
        return panels

    def runs(self) -> list[Run]:
        """Return all runs, at the first of the rates first, at which comparisons are made, and one seed after another.

        So a study that is stopped early has compared everything once.
        """
        return list({run.name: run for rate in self.rates for run in self.at(rate)}.values())

    def at(self, rate: str, *seeds: int) -> list[Run]:
        """Return the runs at one of the study's rates, of all seeds unless some are given.

        Where an activation's own rates are the common ones, its run at these is among both.
        """
        return [
            Run(panel, activation, seed, self._settings(panel, activation, seed, rates), name)
            for seed in seeds or self.seeds
            for activation in self.activations
            for panel in self.panels()
            for name, rates in self._rates(panel.network, activation, rate)
        ]

    def with_tuned(self, tuned: dict[str, dict[str, Rates]]) -> "Study":
        """Return the study with the rates that were chosen.

        Raises:
            ValueError: there are none for a network and an activation.
        """
        for network in self.networks:
            if lacking := [a for a in self.activations if a not in tuned.get(network, {})]:
                raise ValueError(f"no rates were chosen for {network} with {', '.join(lacking)}")
        return replace(self, tuned=tuned)

    def tuning_runs(self) -> "Study":
        """Return the study that tries the rates."""
        if self.tuning is None:
            by = f"; its rates are those of {self.tuned_by}" if self.tuned_by else ""
            raise ValueError(f"study {self.name} says nothing of tuning{by}")
        how = self.tuning
        attacks = {HELD_OUT: how.attack}
        return replace(
            self, seeds=how.seeds, attacks=attacks, images=how.images, rates=("tried",), tuned={}, part="validation"
        )

    def tuning_settings(self) -> dict[str, Any]:
        """Return all that decides which rates `python -m models tune` chooses, as JSON values, to be kept with them."""
        tries = self.tuning_runs()
        assert self.tuning is not None  # or there were none
        names = ("data", "networks", "activations", "variants", "training", "eps")
        values = {name: getattr(tries, name) for name in names} | asdict(self.tuning)
        settings: dict[str, Any] = json.loads(json.dumps(values))
        return settings

    def check_tuning(self, settings: dict[str, Any]) -> None:
        """Check that rates which were chosen under these settings are for this study.

        Raises:
            ValueError: they were chosen on other images, networks or activations, or with seeds of this study; or,
                for rates of its own, otherwise than its file says now.
        """
        if not self.tuned_by:
            now = self.tuning_settings()
            if names := [name for name in now if settings.get(name) != now[name]]:
                raise ValueError(f"rates were chosen when {', '.join(names)} was not what the study says now")
            return
        if (data := settings.get("data")) != self.data:
            raise ValueError(f"rates were chosen on {data}, on whose held-out images a study of {self.data} may test")
        for label, network in self.networks.items():
            if (theirs := settings.get("networks", {}).get(label, network)) != network:
                raise ValueError(f"rates of {label} were chosen for {theirs}, and not {network}")
        variants = settings.get("variants", {})
        for activation in self.activations:
            ours = self._variant(activation)
            if (theirs := variants.get(activation, {"activation": activation})) != ours:
                raise ValueError(f"rates of {activation} were chosen for {theirs}, and not {ours}")
        if both := set(settings.get("seeds", ())) & set(self.seeds):
            raise ValueError(f"rates were chosen on seeds of the study: {', '.join(map(str, sorted(both)))}")

    def count(self, attack: str | None = None) -> int:
        """Return how many images an attack gets, or without one how many are looked at."""
        if isinstance(self.images, int):
            return self.images
        return max(self.images.values()) if attack is None else self.images[attack]

    def common(self, activation: str) -> Rates:
        """Return the rates of an activation's runs as the study file says them."""
        training = {"activation_lr": 1.0, **self.training, **self._variant(activation).get("training", {})}
        return {name: training[name] for name in ("lr", "activation_lr") if name in training}  # else told later

    def frozen(self, activation: str) -> bool:
        """Say whether the activation has parameters that are not trained."""
        return _learns(self._variant(activation)["activation"]) and self.common(activation)["activation_lr"] == 0

    def learns(self, activation: str) -> bool:
        """Say whether there is a rate of activation parameters to choose."""
        variant = self._variant(activation)
        return _learns(variant["activation"]) and "activation_lr" not in variant.get("training", {})

    def _variant(self, activation: str) -> dict[str, Any]:
        return self.variants.get(activation, {"activation": activation})

    def _rates(self, network: str, activation: str, rate: str) -> Iterator[tuple[str, Rates]]:
        """Yield the rates for which one entry of `rates` stands, and what their runs are called."""
        common = self.common(activation)
        if rate == COMMON:
            yield COMMON, common
        elif rate == TUNED:
            own = self.tuned[network][activation]
            yield (COMMON if own == common and COMMON in self.rates else TUNED), own
        elif self.tuning is not None:
            learns = self.learns(activation)
            for factor in self.tuning.activation_lr if learns else (common["activation_lr"],):
                for lr in self.tuning.lr:
                    yield f"lr{lr:g}" + (f"x{factor:g}" if learns else ""), {"lr": lr, "activation_lr": factor}

    def _settings(self, panel: Panel, activation: str, seed: int, rates: Rates) -> Settings:
        variant = self._variant(activation)
        method = self.methods[panel.method] if panel.method is not None else {}
        training = {**self.training, **method, **variant.get("training", {}), **rates, "eps": panel.eps}
        common = {"data": self.data, "network": self.networks[panel.network], "seed": seed}
        return Settings.from_dict({**common, "activation": variant["activation"], "training": training})


def _learns(activation: str) -> bool:
    return any(True for _ in ACTIVATIONS.create(activation)(1).parameters())


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
        eps = content["eps"]
        content["eps"] = [radius(str(e)) for e in eps] if isinstance(eps, list) else radius(str(eps))
        if "tuning" in content:
            content["tuning"] = Tuning(**_tuples(content["tuning"]))
        study = Study(path.stem, **_tuples(content))
        for what in ("networks", "activations", "seeds", "images", "eps"):
            if getattr(study, what) in ((), {}):
                raise ValueError(f"{what} must not be empty")
        counts = study.images.values() if isinstance(study.images, dict) else [study.images]
        if not all(isinstance(n, int) and n >= 1 for n in counts):
            raise ValueError(f"images must be at least 1, got {', '.join(map(str, counts))}")
        _check_rates(study)
        at_common = [run.name for run in study.at(COMMON)]
        if len(set(at_common)) < len(at_common):
            raise ValueError("networks, activations and seeds must not repeat")
        if lost := [name for name in study.variants if name not in study.activations]:
            raise ValueError(f"variants must be among the activations, and these are not: {', '.join(lost)}")
        for name, variant in study.variants.items():
            if unknown := sorted(set(variant) - {"activation", "training"}):
                raise ValueError(f"variant {name} may have activation and training, and has {', '.join(unknown)} too")
        for method, settings in study.methods.items():
            if rates := sorted({"lr", "activation_lr", "eps"} & set(settings)):
                raise ValueError(f"method {method} may not set {', '.join(rates)}, which a study sets by itself")
        for attack, eps in itertools.product(study.attacks.values(), study.radii):
            ATTACKS.create(attack, eps)
        if isinstance(study.images, dict) and set(study.images) != set(study.attacks):
            raise ValueError(f"images must be a number, or one for each of {', '.join(study.attacks)}")
        for pair in study.comparisons:
            if len(pair) != 2 or not set(pair) <= set(study.activations):
                raise ValueError(f"comparisons must be pairs of activations, got {', '.join(pair)}")
    except (KeyError, TypeError, ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{path} is no study: {error}") from error
    return study


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    def whole(value: Any) -> Any:
        return tuple(whole(v) for v in value) if isinstance(value, list) else value

    return {name: whole(value) for name, value in values.items()}


def _check_rates(study: Study) -> None:
    if not study.rates or not set(study.rates) <= {COMMON, TUNED}:
        raise ValueError(f"rates must be {COMMON}, {TUNED} or both, got {', '.join(map(str, study.rates)) or 'none'}")
    if TUNED in study.rates and (study.tuning is None) == (not study.tuned_by):
        raise ValueError(f"a study at {TUNED} rates must say how they are chosen, by tuning or tuned_by")
    if study.tuning is None:
        return
    if both := set(study.tuning.seeds) & set(study.seeds):
        raise ValueError(f"rates are chosen on seeds of their own, and {', '.join(map(str, both))} are the study's too")
    if study.methods or len(study.radii) > 1:
        raise ValueError("rates are tuned for one method and one eps; name another study's with tuned_by")
    ATTACKS.create(study.tuning.attack, *study.radii)
    study.tuning_runs().runs()
