"""The commands of `python -m models` but the demo, each a module with `add`."""

from models.commands import (
    bounds,
    compare,
    curves,
    distributions,
    evaluate,
    gradients,
    recipe,
    report,
    study,
    train,
    tune,
)

ALL = (train, evaluate, recipe, compare, gradients, bounds, curves, distributions, tune, study, report)
