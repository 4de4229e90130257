"""From the runs that try rates to the rates of each activation."""

import statistics
from typing import Any

from models.study.plan import HELD_OUT, Rates, Study


def tried(study: Study, results: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return by network and activation the rates that were tried, each with the robust accuracies that came of it.

    A run that fails, its loss no number, has an accuracy of 0: a rate at which training may fail is not chosen.

    Args:
        study: of the runs that try rates, `Study.tuning_runs`.
        results: by run name, as `models.study.workers` writes them.
    """
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for run in study.runs():
        if run.name not in results:
            continue
        training = run.settings.training
        rates = {"lr": training.lr, "activation_lr": training.activation_lr}
        of_activation = found.setdefault(run.panel.network, {}).setdefault(run.activation, {})
        entry = of_activation.setdefault(run.rate, {**rates, "values": [], "failed": 0, "collapsed": 0})
        result = results[run.name]
        mask = result["found"][HELD_OUT] if "error" not in result else "1"
        entry["values"].append(mask.count("0") / len(mask))
        entry["failed"] += "error" in result
        entry["collapsed"] += bool(result.get("collapsed"))
    return {network: {a: list(r.values()) for a, r in entries.items()} for network, entries in found.items()}


def best(study: Study, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return what has the highest mean accuracy over all seeds of the tuning, of equals the lowest rates, or None."""
    whole = [entry for entry in entries if len(entry["values"]) == len(study.seeds)]
    return max(whole, key=lambda e: (mean(e), -e["lr"], -e["activation_lr"]), default=None)


def mean(entry: dict[str, Any]) -> float:
    """Return the mean accuracy at rates that were tried."""
    return statistics.fmean(entry["values"])


def chosen(study: Study, results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Rates]]:
    """Return by network and activation the best rates, of those whose runs are all done."""
    left = {(run.panel.network, run.activation) for run in study.runs() if run.name not in results}
    rates: dict[str, dict[str, Rates]] = {}
    for network, activations in tried(study, results).items():
        for activation, entries in activations.items():
            found = best(study, entries)
            if found is not None and (network, activation) not in left:
                rates.setdefault(network, {})[activation] = {n: found[n] for n in ("lr", "activation_lr")}
    return rates


def at_the_end(study: Study, activation: str, rates: Rates) -> list[str]:
    """Say which of an activation's best rates are the smallest or largest that were tried, as "lr 0.8 (largest)".

    Beyond them may be better ones.
    """
    assert study.tuning is not None  # its runs were made
    tuning = {"lr": study.tuning.lr, "activation_lr": study.tuning.activation_lr}
    ends = []
    for name, value in rates.items():
        there = sorted(tuning[name])
        if len(there) > 1 and value in (there[0], there[-1]) and (name == "lr" or study.learns(activation)):
            ends.append(f"{name} {value:g} ({'smallest' if value == there[0] else 'largest'})")
    return ends
