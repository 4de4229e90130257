"""The demo's report: one HTML page that needs no other file, readable on a desktop and on a phone."""

from typing import Any

from models.reports import html
from models.reports.tables import Table, interval, number, share

_COSTS = {
    "relu": "ReLU",
    "fused": "KAF, fused (kafops.kaf)",
    "compiled": "KAF, torch.compile of plain PyTorch",
    "reference": "KAF, plain PyTorch",
}


def page(metrics: dict[str, Any], labels: dict[str, str], figures: dict[str, bytes]) -> str:
    """Return the page for the content of metrics.json.

    Args:
        metrics: as written to metrics.json.
        labels: a name for each network to show.
        figures: PNG bytes of "accuracy", "curves" and "cost".
    """
    done = metrics["step_cost"]["implementations"]
    spreads = [result["spread_seconds"] for result in done.values() if "error" not in result]
    return html.page(
        "demo.html",
        title="kafops demo",
        metrics=metrics,
        networks=", ".join(labels[name] for name in metrics["results"]),
        figures=figures,
        accuracies=accuracies(metrics, labels),
        costs=_costs(done),
        failures=[(_COSTS[name], result["error"]) for name, result in done.items() if "error" in result],
        widest=max(high / low for low, high in spreads),  # of one and the same step: something else was running
        epochs=_epochs(metrics, labels),
    )


def accuracies(metrics: dict[str, Any], labels: dict[str, str]) -> Table:
    """Return the accuracies of the networks."""
    attack = f"PGD-{metrics['settings']['pgd_steps']}"
    table = Table(
        "network", "parameters", "learning rate", "clean", "95 % interval", attack, "95 % interval", "training"
    )
    for name, result in metrics["results"].items():
        found = (*interval(result["clean"]), *interval(result["robust"]))
        seconds = sum(metrics["timings"][name]["epoch_seconds"])
        rates = metrics["rates"][name]
        own = f", curves {rates['lr'] * rates['activation_lr']:.2g}" if rates["activation_lr"] != 1 else ""
        table.add(labels[name], f"{result['parameters']:,}", f"{rates['lr']:g}{own}", *found, f"{seconds:.0f} s")
    return table


def _costs(done: dict[str, Any]) -> Table:
    table = Table("activation", "time", "range", "× ReLU", "memory", "× ReLU")
    for name in (n for n in _COSTS if n in done and "error" not in done[n]):
        result = done[name]
        low, high = (1e3 * seconds for seconds in result["spread_seconds"])
        time, memory = f"{1e3 * result['median_seconds']:.1f} ms", f"{result['kept_bytes'] / 1e6:.1f} MB"
        slower, larger = (number(result.get(f"{kind}_ratio"), form=".3g") for kind in ("time", "memory"))
        table.add(_COSTS[name], time, f"{low:.1f} to {high:.1f}", slower, memory, larger)
    return table


def _epochs(metrics: dict[str, Any], labels: dict[str, str]) -> Table:
    table = Table("network", "epoch", "loss", "accuracy on perturbed batches", "last learning rate", "time")
    for name, result in metrics["results"].items():
        seconds = metrics["timings"][name]["epoch_seconds"]
        for epoch, took in zip(result["history"], seconds, strict=True):
            numbers = f"{epoch['loss']:.4f}", share(epoch["accuracy"]), f"{epoch['lr']:.3g}", f"{took:.1f} s"
            table.add(labels[name], str(epoch["epoch"]), *numbers)
    return table
