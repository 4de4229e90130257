"""What a page and the terminal show of the content of an evaluation.json."""

from collections.abc import Mapping
from typing import Any

from models.reports.tables import Table, interval, share

Results = Mapping[str, Any]
"""The content of an evaluation.json."""


def attacks(results: Results) -> Table:
    """Return the accuracies, clean, under each attack and in the worst case."""
    table = Table("attack", "radius", "accuracy", "95 % interval", "time")
    table.add("clean", "", *interval(results["clean"]), "")
    for name, record in results["robust"].items():
        radius = f"{record['radius']:.4g} in {record['norm']}"
        table.add(name, radius, *interval(record), f"{record['seconds']:.1f} s")
    table.add("worst case", f"{results['eps']:.4g} in Linf", *interval(results["worst_case"]), "", look="bold")
    return table


def classes(results: Results) -> Table:
    """Return the accuracies of each class."""
    table = Table("class", "images", "clean", "worst case")
    for record in results["classes"]:
        clean, worst = record["clean"], record["worst_case"]
        table.add(str(record["class"]), str(clean["total"]), share(clean["accuracy"]), share(worst["accuracy"]))
    return table


def checks(results: Results) -> Table:
    """Return the verdicts on the attacks."""
    table = Table("check", "verdict", "evidence")
    for verdict in results["checks"]:
        table.add(verdict["check"], verdict["result"], verdict["evidence"], look=verdict["result"])
    return table
