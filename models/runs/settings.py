"""The settings of one training run: what run.json of its folder holds and what a recipe file gives."""

import dataclasses
import typing
from dataclasses import asdict, dataclass
from typing import Any

from models import activations, data, networks
from models.registry import near
from models.training.recipe import Recipe


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a training, besides the machine.

    Args:
        data, network, activation: names with options, see `models.data`, `models.networks`, `models.activations`.
        seed: of weights, order, augmentation and noise.
        training: how.

    Raises:
        ValueError: a name or an option is unknown.
    """

    data: str
    network: str
    activation: str
    training: Recipe
    seed: int = 0

    def __post_init__(self) -> None:
        data.DATA.parse(self.data)
        networks.NETWORKS.parse(self.network)
        activations.ACTIVATIONS.parse(self.activation)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """Undo `as_dict`.

        Raises:
            ValueError: a setting is unknown, missing or out of its range.
        """
        return _from(cls, {**values, "training": _from(Recipe, values.get("training", {}))})


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """Return a run's settings with the defaults of those that are newer than the run; what is no settings, as it is."""
    known = {field.name for field in dataclasses.fields(Settings)}
    try:
        return {**values, **Settings.from_dict({n: v for n, v in values.items() if n in known}).as_dict()}
    except ValueError:
        return values


def _from(kind: Any, values: dict[str, Any]) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise ValueError(f"unknown setting {name!r}, there are {', '.join(fields)}{near(name, fields)}")
    lacking = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
    if lacking:
        raise ValueError(f"settings lack {', '.join(lacking)}")
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"setting {name!r} must be {getattr(hints[name], '__name__', hints[name])}, got {value!r}")
    return kind(**values)


def _fits(value: Any, hint: Any) -> bool:
    """Say whether a JSON value is of a type, or of one of several; a whole number will do for a float."""
    kinds = typing.get_args(hint) or (hint,)
    return type(value) in kinds or (type(value) is int and float in kinds)
