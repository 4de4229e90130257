"""Results lined up with the numbers published for a recipe."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from models.activations import ACTIVATIONS
from models.attacks import ATTACKS, pgd
from models.data import DATA
from models.evaluation import Accuracy
from models.networks import NETWORKS
from models.recipes import Published, Recipe
from models.registry import Registry
from models.runs import flat
from models.runs.settings import Settings
from models.support.errors import UserError
from models.training.methods import METHODS
from models.training.schedules import SCHEDULES

CLEAN = "clean"

_REGISTRIES: dict[str, Registry[Any]] = {
    "data": DATA,
    "network": NETWORKS,
    "activation": ACTIVATIONS,
    "method": METHODS,
    "schedule": SCHEDULES,
}
# What decides nothing of the result, or what every run is to have its own of.
_IRRELEVANT = ("seed", "watch_steps", "watch_images")


@dataclass(frozen=True)
class Measured:
    """What an evaluation found.

    Args:
        run: what to call it.
        settings: of the training.
        eps: radius of the attacks.
        clean: accuracy without attack.
        robust: accuracy under each attack, by the attack's name with options.
        which: state of the network, "best" or "latest".
    """

    run: str
    settings: Settings
    eps: float
    clean: Accuracy
    robust: Mapping[str, Accuracy]
    which: str = "best"


@dataclass(frozen=True)
class Difference:
    """A setting that is not the recipe's."""

    name: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        return f"{self.name} is {self.ours} here and {self.theirs} there"


@dataclass(frozen=True)
class Line:
    """An accuracy and one published for the same measure, "clean" or the name of an attack; row None: there is none."""

    measure: str
    ours: Accuracy
    row: Published | None

    @property
    def published(self) -> float | None:
        """The published accuracy, in [0, 1]."""
        if self.row is None:
            return None
        return self.row.clean if self.measure == CLEAN else self.row.robust

    @property
    def difference(self) -> float | None:
        """Ours less the published."""
        return None if self.published is None else self.ours.value - self.published

    @property
    def within(self) -> bool | None:
        """Whether the published accuracy is in the 95 % Wilson interval of ours."""
        low, high = self.ours.interval
        return None if self.published is None else low <= self.published <= high


@dataclass(frozen=True)
class Comparison:
    """A run beside what is published for its recipe.

    Args:
        recipe, measured: what is compared.
        lines: every measure of the run, with each number published for it.
        differences: settings of training and evaluation that are not the recipe's.
        missing: attacks for which there are numbers, but which the run was not evaluated under.
    """

    recipe: Recipe
    measured: Measured
    lines: tuple[Line, ...]
    differences: tuple[Difference, ...]
    missing: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """One sentence."""
        inside = [line.within for line in self.lines if line.within is not None]
        activation = self.measured.settings.activation
        if not inside:
            return f"Nothing is published for recipe {self.recipe.name} with {activation} that this run measured."
        words = "is" if sum(inside) == 1 else "are"
        numbers = f"{sum(inside)} of {len(inside)} published numbers {words} within the 95 % intervals of this run's."
        if not self.differences:
            return f"{numbers} Its settings are the recipe's."
        count = len(self.differences)
        return f"{numbers} But its settings are not the recipe's: {count} {'differs' if count == 1 else 'differ'}."


def compare(measured: Measured, recipe: Recipe, rows: Iterable[Published]) -> Comparison:
    """Line a run up with the rows of a recipe that are of the same network and activation, options aside.

    Robust accuracies are lined up with those under an attack of the same name and eps; how else the attacks differ is
    among the differences.
    """
    ours = measured.settings
    alike = [
        row
        for row in rows
        if _same_name(NETWORKS, row.network, ours.network) and _same_name(ACTIVATIONS, row.activation, ours.activation)
    ]
    lines = _lines(CLEAN, measured.clean, _distinct(row for row in alike if row.clean is not None))
    attacked = {attack_name(text) for text in measured.robust}
    for text, accuracy in measured.robust.items():
        found = [r for r in alike if r.robust is not None and (r.attack, r.eps) == (attack_name(text), measured.eps)]
        lines += _lines(attack_name(text), accuracy, found)
    differences = training_differences(ours, recipe.settings_for(ours.activation)) + _evaluation(measured, recipe)
    missing = dict.fromkeys(row.attack for row in alike if row.attack not in attacked)
    return Comparison(recipe, measured, tuple(lines), tuple(differences), tuple(missing))


def training_differences(ours: Settings, theirs: Settings) -> list[Difference]:
    """Return the settings that differ, but for the seed and how the watch looks.

    Names with options are compared with their defaults filled in, so other ways to say the same are no difference.
    """
    left, right = flat(ours.as_dict()), flat(theirs.as_dict())
    return [
        Difference(name, _text(left[name]), _text(right[name]))
        for name in left
        if name not in _IRRELEVANT and not _same(name, left[name], right[name])
    ]


def closest(settings: Settings, recipes: Iterable[Recipe]) -> Recipe:
    """Return the recipe of the same kind of network with the fewest differences.

    Raises:
        UserError: no recipe has such a network, or several are as close.
    """
    alike = [r for r in recipes if _same_name(NETWORKS, r.settings.network, settings.network)]
    if not alike:
        raise UserError(f"no recipe trains network {settings.network!r}; name one to compare with by --recipe")
    counts = {r.name: len(training_differences(settings, r.settings_for(settings.activation))) for r in alike}
    nearest = [r for r in alike if counts[r.name] == min(counts.values())]
    if len(nearest) > 1:
        names = " and ".join(r.name for r in nearest)
        raise UserError(f"recipes {names} are equally close to this run; choose one by --recipe")
    return nearest[0]


def attack_name(text: str) -> str:
    """Return what an attack is called in publications: pgd-50-10 for pgd:steps=50,restarts=10,step=2/255.

    A name that is none of an attack's, such as that of images transferred from another run, stays as it is.
    """
    try:
        name, options = canonical(ATTACKS, text)
    except ValueError:
        return text
    return pgd(1.0, options["steps"], restarts=options["restarts"]).name if name == "pgd" else name


def canonical(registry: Registry[Any], text: str) -> tuple[str, dict[str, Any]]:
    """Return a name and all its options, those not given at their defaults."""
    name, given = registry.parse(text)
    return name, {n: given.get(n, option.default) for n, option in registry.options(name).items()}


def _lines(measure: str, ours: Accuracy, rows: list[Published]) -> list[Line]:
    return [Line(measure, ours, row) for row in rows] or [Line(measure, ours, None)]


def _distinct(rows: Iterable[Published]) -> list[Published]:
    """Leave out rows that repeat a clean accuracy for another attack."""
    kept: dict[tuple[str, float | None], Published] = {}
    for row in rows:
        kept.setdefault((row.label, row.clean), row)
    return list(kept.values())


def _evaluation(measured: Measured, recipe: Recipe) -> list[Difference]:
    eps = recipe.evaluation_eps
    found = []
    if not math.isclose(measured.eps, eps, rel_tol=1e-9):
        found.append(Difference("eps of the evaluation", f"{measured.eps:.4g}", recipe.evaluation["eps"]))
    if measured.which != recipe.evaluation["which"]:
        found.append(Difference("state evaluated", measured.which, recipe.evaluation["which"]))
    theirs = {attack_name(text): text for text in recipe.attacks}
    for text in measured.robust:
        other = theirs.get(attack_name(text), text)
        if text != other and not _same_choice(ATTACKS, text, other):
            found.append(Difference(f"attack {attack_name(text)}", text, other))
    return found


def _same(name: str, ours: Any, theirs: Any) -> bool:
    return _same_choice(_REGISTRIES[name], ours, theirs) if name in _REGISTRIES else _same_value(ours, theirs)


def _same_choice(registry: Registry[Any], ours: str, theirs: str) -> bool:
    (name, options), (other, others) = canonical(registry, ours), canonical(registry, theirs)
    return name == other and all(_same_value(value, others[option]) for option, value in options.items())


def _same_value(ours: Any, theirs: Any) -> bool:
    """Compare settings; of two ways to write a fraction the last bit may differ."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-9)
    return bool(ours == theirs)


def _same_name(registry: Registry[Any], one: str, other: str) -> bool:
    return registry.parse(one)[0] == registry.parse(other)[0]


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
