"""From the results of a study's runs to the numbers that its page and figures show."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from models.study.plan import Study
from models.study.statistics import estimate, noise, paired

CLEAN, WORST = "clean", "worst"


def summarise(study: Study, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return accuracies by network, activation and attack, their differences to the first activation, and the noise.

    "worst" counts an image as robust where no attack breaks it. Runs not done yet are left out, and networks without
    any, and runs that failed; a difference takes the seeds that both activations have.

    Args:
        study: which runs there are to be.
        results: by run name, as `models.study.workers` writes them.
    """
    measures = (CLEAN, *study.attacks, WORST)
    failed = {name: result["error"] for name, result in results.items() if "error" in result}
    results = {name: result for name, result in results.items() if name not in failed}
    networks: dict[str, Any] = {}
    for network in study.networks:
        by_activation = {a: _by_seed(study, results, network, a) for a in study.activations}
        present = {a: seeds for a, seeds in by_activation.items() if seeds}
        if not present:
            continue
        baseline = present.get(study.activations[0], {})
        networks[network] = {
            "activations": {a: _activation(seeds, baseline, measures) for a, seeds in present.items()},
            "noise": {m: _noise([[s[m] for s in seeds.values()] for seeds in present.values()]) for m in measures},
        }
    return {
        "runs": len(results),
        "failed": failed,
        "of": len(study.runs()),
        "activations": [a for a in study.activations if any(a in n["activations"] for n in networks.values())],
        "images": study.images,
        "baseline": study.activations[0],
        "measures": list(measures),
        "networks": networks,
    }


def accuracies(result: dict[str, Any]) -> dict[str, float]:
    """Return a run's accuracies: clean, under each attack, and under the worst of all for each image."""
    masks = {CLEAN: result["wrong"], **result["found"]}
    masks[WORST] = "".join("1" if "1" in column else "0" for column in zip(*masks.values(), strict=True))
    return {name: mask.count("0") / len(mask) for name, mask in masks.items()}


def _by_seed(study: Study, results: dict[str, Any], network: str, activation: str) -> dict[int, dict[str, float]]:
    runs = [r for r in study.runs() if (r.network, r.activation) == (network, activation)]
    return {run.seed: accuracies(results[run.name]) for run in runs if run.name in results}


def _activation(
    seeds: dict[int, dict[str, float]], baseline: dict[int, dict[str, float]], measures: Sequence[str]
) -> dict[str, Any]:
    both = [s for s in seeds if s in baseline]
    entry: dict[str, Any] = {"seeds": list(seeds)}
    for m in measures:
        entry[m] = {"values": [a[m] for a in seeds.values()], **asdict(estimate([a[m] for a in seeds.values()]))}
        if both and seeds is not baseline:
            entry[m]["difference"] = asdict(paired([seeds[s][m] for s in both], [baseline[s][m] for s in both]))
    return entry


def _noise(groups: list[list[float]]) -> dict[str, float] | None:
    found = noise(groups)
    return None if found is None else {"std": found.std, "difference": found.difference}
