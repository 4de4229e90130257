"""From the results of a study's runs to the numbers that its page and figures show."""

import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from models.study.plan import Panel, Run, Study
from models.study.statistics import Difference, difference, estimate, holm, holm_p

CLEAN, WORST = "clean", "worst"
OVERFITTED = 0.4
"""By which accuracy under PGD, on held-out images, is lower in the last epoch than that under the training's own
attack, on training images: the network has learned to withstand its own attack and little else (catastrophic
overfitting, Wong et al. 2020), whether it withstood PGD before or never did."""
Seeds = dict[int, dict[str, str]]
"""What is wrong under each measure, "0" and "1" for each image, by seed."""


def summarise(study: Study, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return accuracies by rate, panel, activation and attack, differences to the first activation, and comparisons.

    "worst" counts an image as robust where no attack breaks it. Runs not done yet are left out, and panels without
    any. A run that failed is wrong on every image: left out, an activation would be judged by the seeds that suit it.
    A difference takes the seeds that both activations have. With several eps the comparisons are of which runs
    overfitted, else of what is right under each attack.

    Args:
        study: which runs there are to be.
        results: by run name, as `models.study.workers` writes them.
    """
    failed = {name: result["error"] for name, result in results.items() if "error" in result}
    results = {name: _failed(study) | result if name in failed else result for name, result in results.items()}
    found = {rate: _panels(study, results, rate) for rate in study.rates}
    shown = {a for panels in found.values() for panel in panels.values() for a in panel["activations"]}
    return {
        "runs": len(results),
        "failed": failed,
        "of": len(study.runs()),
        "activations": [a for a in study.activations if a in shown],
        "images": {m: study.count(m if m in study.attacks else None) for m in (CLEAN, *study.attacks)},
        "baseline": study.activations[0],
        "measures": [CLEAN, *study.attacks, WORST],
        "rates": {rate: panels for rate, panels in found.items() if panels},
        "comparisons": _comparisons(study, results) if len(study.radii) == 1 else [],
        "overfitting": _overfitting(study, results) if len(study.radii) > 1 else [],
    }


def _failed(study: Study) -> dict[str, Any]:
    found = {attack: "1" * study.count(attack) for attack in study.attacks}
    return {"wrong": "1" * study.count(None), "found": found}


def masks(result: dict[str, Any]) -> dict[str, str]:
    """Return for each measure what is wrong of the images: clean, under each attack, and under any of them.

    Under any of them are only the images that every attack was made on.
    """
    found = {CLEAN: result["wrong"], **result["found"]}
    return {**found, WORST: "".join("1" if "1" in column else "0" for column in zip(*found.values(), strict=False))}


def accuracies(result: dict[str, Any]) -> dict[str, float]:
    """Return a run's accuracy under each measure."""
    return {name: mask.count("0") / len(mask) for name, mask in masks(result).items()}


def _panels(study: Study, results: dict[str, Any], rate: str) -> dict[str, Any]:
    panels, runs = {}, study.at(rate)
    for panel in study.panels():
        by_activation = {a: _by_seed(runs, results, panel, a) for a in study.activations}
        present = {a: seeds for a, seeds in by_activation.items() if seeds}
        if present:
            baseline = present.get(study.activations[0], {})
            panels[panel.label] = {
                "network": panel.network,
                "method": panel.method,
                "eps": panel.eps,
                "activations": {
                    a: {
                        **_activation(seeds, baseline),
                        "overfitted": sum(overfitted.values()),
                        "watched": len(overfitted),
                    }
                    for a, seeds in present.items()
                    for overfitted in [_overfitted(runs, results, panel, a)]
                },
            }
    return panels


def _done(runs: list[Run], results: dict[str, Any], panel: Panel, activation: str) -> list[Run]:
    return [r for r in runs if (r.panel, r.activation) == (panel, activation) and r.name in results]


def _by_seed(runs: list[Run], results: dict[str, Any], panel: Panel, activation: str) -> Seeds:
    return {run.seed: masks(results[run.name]) for run in _done(runs, results, panel, activation)}


def _overfitted(runs: list[Run], results: dict[str, Any], panel: Panel, activation: str) -> dict[str, bool]:
    """Return by run whether it overfitted its own attack, see OVERFITTED; not of runs that failed or had no watch."""
    found = {}
    for run in _done(runs, results, panel, activation):
        last = (results[run.name].get("history") or [{}])[-1]
        if (robust := last.get("robust")) is not None:
            found[run.name] = last["accuracy"] - robust > OVERFITTED
    return found


def _overfitting(study: Study, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare, of the pairs that the study names, which runs overfitted: same rate, network, method, eps and seed.

    Only pairs count of which one did: the exact sign test (McNemar's), Holm's correction over the study's pairs. A pair
    of runs counts once, whatever its rate is called, and not at all where it is not known of both.
    """
    rows: list[dict[str, Any]] = []
    for pair in study.comparisons:
        outcomes: dict[tuple[str, str], tuple[bool, bool]] = {}
        unknown: set[tuple[str, str]] = set()
        for rate, panel in itertools.product(study.rates, study.panels()):
            runs = study.at(rate)
            one, other = ({r.seed: r for r in _done(runs, results, panel, a)} for a in pair)
            known = _overfitted(runs, results, panel, pair[0]) | _overfitted(runs, results, panel, pair[1])
            for names in ((one[seed].name, other[seed].name) for seed in one.keys() & other.keys()):
                if known.keys() >= set(names):
                    outcomes[names] = (known[names[0]], known[names[1]])
                else:
                    unknown.add(names)
        counts = Counter(outcomes.values())
        first, second = counts[True, False], counts[False, True]
        p = float(binomtest(first, first + second).pvalue) if first + second else 1.0
        numbers = {"pairs": len(outcomes), "both": counts[True, True], "first": first, "second": second}
        rows.append({"pair": list(pair), **numbers, "unknown": len(unknown), "p": p})
    return [{**row, "holm": p} for row, p in zip(rows, holm_p([row["p"] for row in rows]), strict=True)]


def _activation(seeds: Seeds, baseline: Seeds) -> dict[str, Any]:
    entry: dict[str, Any] = {"seeds": list(seeds)}
    for measure in next(iter(seeds.values())):
        values = [mask[measure].count("0") / len(mask[measure]) for mask in seeds.values()]
        entry[measure] = {"values": values, **asdict(estimate(values))}
        apart = compared(_of(seeds, measure), _of(baseline, measure))
        if apart is not None and seeds is not baseline:
            entry[measure]["difference"] = _numbers(apart)
    attacks = [measure for measure in next(iter(seeds.values())) if measure not in (CLEAN, WORST)]
    entry["gaps"] = {attack: statistics.fmean(_gap(found, attack) for found in seeds.values()) for attack in attacks}
    return entry


def _gap(found: dict[str, str], attack: str) -> float:
    """Return by how much accuracy under the worst attack is lower, on the images that every attack was made on."""
    count = len(found[WORST])
    return (found[WORST].count("1") - found[attack][:count].count("1")) / count


def _of(seeds: Seeds, measure: str) -> dict[int, str]:
    return {seed: found[measure] for seed, found in seeds.items()}


def compared(wrong: dict[int, str], baseline: dict[int, str]) -> Difference | None:
    """Compare accuracies by what is wrong of the same images, "0" or "1" each, by seed; None if no seed is common."""
    both = [seed for seed in wrong if seed in baseline]
    return difference(_right([wrong[s] for s in both]), _right([baseline[s] for s in both])) if both else None


def _right(wrong: Sequence[str]) -> NDArray[np.bool_]:
    return np.array([[image == "0" for image in mask] for mask in wrong])


def _numbers(apart: Difference) -> dict[str, Any]:
    low, high = apart.interval() or (None, None)
    return {**asdict(apart), "low": low, "high": high, "p": apart.p}


def _comparisons(study: Study, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return those that the study names, for each panel and attack, at the first of its rates; Holm's correction."""
    found, runs = [], study.at(study.rates[0])
    for panel in study.panels():
        for first, second in study.comparisons:
            one, other = (_by_seed(runs, results, panel, a) for a in (first, second))
            for attack in study.attacks:
                if (apart := compared(_of(one, attack), _of(other, attack))) is not None:
                    found.append(({"panel": panel.label, "pair": [first, second], "attack": attack}, apart))
    planned = len(study.panels()) * len(study.comparisons) * len(study.attacks)
    corrected = holm([apart for _, apart in found], planned)
    return [
        {**names, **_numbers(apart), "corrected": None if c is None else asdict(c)}
        for (names, apart), c in zip(found, corrected, strict=True)
    ]
