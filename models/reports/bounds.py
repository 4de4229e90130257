"""What a page, the terminal and figures show of the contents of bounds.json."""

from collections.abc import Sequence

from models.figures.bounds import Result, at_eps, certified
from models.reports.tables import Table, number, share
from models.runs import flat
from models.runs.settings import completed

AT = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""Radii in L-infinity at which certified accuracies are written down."""
_PLAIN = ("data", "network", "activation", "method", "schedule", "precision", "decay")


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
    at = telling(results)
    table = Table("run", "found", "local", "bound", "clean", "attacked", f"proved at {at:g}", "radius")
    for label, result in zip(labels, results, strict=True):
        numbers = (number(result["lower"], ""), number(result["local"]["p50"], ""), number(result["upper"], "∞"))
        shares = map(share, (result["attacked"][0]["accuracy"], at_eps(result), certified(result, at)))
        table.add(label, *numbers, *shares, number(result["radii"]["linf"]["p50"], ""))
    return table


def groups(labels: Sequence[str], results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the runs that differ in their seed alone, by what they are."""
    settings = [flat(completed(dict(result["settings"]))) for result in results]
    different = [n for n in settings[0] if any(s.get(n) != settings[0][n] for s in settings)]
    names = ["activation", *(n for n in different if n not in ("activation", "seed"))]
    found: dict[str, list[Result]] = {}
    for label, one, result in zip(labels, settings, results, strict=True):
        told = {name: one[name] for name in names if one.get(name)}
        words = (str(v) if n in _PLAIN else f"{n.replace('_', ' ')} {v:g}" for n, v in told.items())
        found.setdefault(", ".join(words) if len(results) > 1 else label, []).append(result)
    return found


def telling(results: Sequence[Result]) -> float:
    """Return the largest of the radii at which some network is certified for a tenth of the images, or the least."""
    telling = [at for at in AT if any(certified(result, at) >= 0.1 for result in results)]
    return max(telling, default=AT[0])
