"""What a page, the terminal and figures show of the contents of bounds.json."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from models.figures import bounds as figures
from models.figures.accuracy import Mark
from models.reports.tables import Table, number, share
from models.runs.settings import completed

AT = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""Radii in L-infinity at which certified accuracies are written down."""
_PLAIN = ("data", "network", "activation", "method", "schedule", "precision", "decay")

Result = Mapping[str, Any]
"""The content of a bounds.json."""


def layers(result: Result) -> Table:
    """Return the bound layer by layer; from k-WTA on it is infinite."""
    table = Table("layer", "kind", "norm", "largest slope", "bound so far")
    endless = ""
    for layer in result["layers"]:
        jumps = layer["kind"] == "winners"
        endless = "∞" if jumps else endless
        slope = "∞" if jumps else number(layer["slope"], "")
        bound = number(layer["bound"], endless)
        table.add(layer["name"], layer["kind"], number(layer["norm"], ""), slope, bound)
    return table


def constants(result: Result) -> Table:
    """Return what is known of the Lipschitz constant of one network."""
    table = Table("Lipschitz constant, images to logits in L2", "")
    table.add("bound for all images", number(result["upper"], "∞"))
    table.add("bound around an image, median", number(result["local"]["p50"], "∞"))
    table.add("largest stretch found", number(result["lower"]))
    return table


def networks(labels: Sequence[str], results: Sequence[Result]) -> Table:
    """Return bounds and accuracies, a row for each network."""
    at = _telling(results)
    table = Table("run", "found", "local", "bound", "clean", "attacked", f"proved at {at:g}", "radius")
    for label, result in zip(labels, results, strict=True):
        table.add(
            label,
            number(result["lower"], ""),
            number(result["local"]["p50"], ""),
            number(result["upper"], "∞"),
            share(result["attacked"][0]["accuracy"]),
            share(_at_eps(result)["accuracy"]),
            share(_certified(result, at)),
            number(result["radii"]["linf"]["p50"], ""),
        )
    return table


def growth(
    result: Result, images: Sequence[Mapping[str, float]]
) -> tuple[list[tuple[str, float | None]], figures.Bounds, figures.Certified]:
    """Return what the figure of a run shows, from the contents of its bounds.json and images.json."""
    places, jumped = [], False
    for layer in result["layers"]:
        jumped = jumped or layer["kind"] == "winners"
        if jumped or layer["bound"] is not None:
            places.append((layer["name"], layer["bound"]))
    wide = math.sqrt(result["pixels"])
    radii = {
        "interval propagation": [image["intervals"] for image in images],
        "global Lipschitz": [image["lipschitz"] / wide for image in images],
        "local Lipschitz": [image["local"] / wide for image in images],
    }
    return places, _bounds(result), figures.Certified(radii, result["attack"]["name"], _attacked(result))


def rows(labels: Sequence[str], results: Sequence[Result]) -> list[figures.Row]:
    """Return what the figure of several runs shows: runs that differ in their seed alone make one row."""
    at = _telling(results)
    return [
        figures.Row(
            label,
            [_bounds(result) for result in them],
            [result["attacked"][0]["accuracy"] for result in them],
            [_at_eps(result)["accuracy"] for result in them],
            [_certified(result, at) for result in them],
            at,
        )
        for label, them in _groups(labels, results).items()
    ]


def attacked(labels: Sequence[str], results: Sequence[Result]) -> dict[str, list[list[tuple[float, Mark]]]]:
    """Return accuracies over radii of the same groups."""
    return {label: [_attacked(result) for result in them] for label, them in _groups(labels, results).items()}


def _attacked(result: Result) -> list[tuple[float, Mark]]:
    return [(point["eps"], Mark(point["accuracy"], *point["interval"])) for point in result["attacked"]]


def _groups(labels: Sequence[str], results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the runs that differ in their seed alone, by what they are."""
    settings = [_flat(result["settings"]) for result in results]
    different = [n for n in settings[0] if any(s.get(n) != settings[0][n] for s in settings)]
    names = ["activation", *(n for n in different if n not in ("activation", "seed"))]
    groups: dict[str, list[Result]] = {}
    for label, one, result in zip(labels, settings, results, strict=True):
        told = {name: one[name] for name in names if one.get(name)}
        words = (str(v) if n in _PLAIN else f"{n.replace('_', ' ')} {v:g}" for n, v in told.items())
        groups.setdefault(", ".join(words) if len(results) > 1 else label, []).append(result)
    return groups


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    whole = completed(dict(settings))
    return {**{n: v for n, v in whole.items() if n != "training"}, **whole.get("training", {})}


def _telling(results: Sequence[Result]) -> float:
    """Return the largest of the radii at which some network is certified for a tenth of the images, or the least."""
    telling = [at for at in AT if any(_certified(result, at) >= 0.1 for result in results)]
    return max(telling, default=AT[0])


def _certified(result: Result, at: float) -> float:
    return next(point["linf"] for point in result["certified"] if point["eps"] == at)


def _at_eps(result: Result) -> Mapping[str, Any]:
    return next(point for point in result["attacked"] if point["eps"] == result["identity"]["eps"])


def _bounds(result: Result) -> figures.Bounds:
    return figures.Bounds(result["lower"], result["upper"], result["local"]["p50"])
