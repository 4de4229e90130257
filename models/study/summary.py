"""From the results of a study's runs to the numbers that its page and figures show."""

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
                        "overfitted": sum(_overfitted(runs, results, panel, a).values()),
                    }
                    for a, seeds in present.items()
                },
            }
    return panels


def _done(runs: list[Run], results: dict[str, Any], panel: Panel, activation: str) -> list[Run]:
    return [r for r in runs if (r.panel, r.activation) == (panel, activation) and r.name in results]


def _by_seed(runs: list[Run], results: dict[str, Any], panel: Panel, activation: str) -> Seeds:
    return {run.seed: masks(results[run.name]) for run in _done(runs, results, panel, activation)}


def _overfitted(runs: list[Run], results: dict[str, Any], panel: Panel, activation: str) -> dict[int, bool]:
    """Return by seed whether a run overfitted its own attack: see OVERFITTED."""
    found = {}
    for run in _done(runs, results, panel, activation):
        last = (results[run.name].get("history") or [{}])[-1]
        robust = last.get("robust")
        found[run.seed] = robust is not None and last["accuracy"] - robust > OVERFITTED
    return found


def _overfitting(study: Study, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare, of the pairs that the study names, which runs overfitted: same rate, network, method, eps and seed.

    Only pairs count of which one did: the exact sign test (McNemar's), Holm's correction over the study's pairs.
    """
    rows: list[dict[str, Any]] = []
    for pair in study.comparisons:
        counts = {(False, False): 0, (True, False): 0, (False, True): 0, (True, True): 0}
        for rate in study.rates:
            for panel in study.panels():
                one, other = (_overfitted(study.at(rate), results, panel, a) for a in pair)
                for seed in one.keys() & other.keys():
                    counts[one[seed], other[seed]] += 1
        first, second = counts[True, False], counts[False, True]
        p = float(binomtest(first, first + second).pvalue) if first + second else 1.0
        numbers = {"pairs": sum(counts.values()), "both": counts[True, True], "first": first, "second": second}
        rows.append({"pair": list(pair), **numbers, "p": p})
    return [{**row, "holm": p} for row, p in zip(rows, holm_p([row["p"] for row in rows]), strict=True)]


def _activation(seeds: Seeds, baseline: Seeds) -> dict[str, Any]:
    entry: dict[str, Any] = {"seeds": list(seeds)}
    for measure in next(iter(seeds.values())):
        values = [mask[measure].count("0") / len(mask[measure]) for mask in seeds.values()]
        entry[measure] = {"values": values, **asdict(estimate(values))}
        if (apart := _difference(seeds, baseline, measure)) is not None and seeds is not baseline:
            entry[measure]["difference"] = _numbers(apart)
    return entry


def _difference(seeds: Seeds, baseline: Seeds, measure: str) -> Difference | None:
    both = [seed for seed in seeds if seed in baseline]
    if not both:
        return None
    return difference(_right([seeds[s][measure] for s in both]), _right([baseline[s][measure] for s in both]))


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
                if (apart := _difference(one, other, attack)) is not None:
                    found.append(({"panel": panel.label, "pair": [first, second], "attack": attack}, apart))
    corrected = holm([apart for _, apart in found])
    return [
        {**names, **_numbers(apart), "corrected": None if c is None else asdict(c)}
        for (names, apart), c in zip(found, corrected, strict=True)
    ]
