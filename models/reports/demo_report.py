"""The demo's report: one HTML page that needs no other file, readable on a desktop and on a phone."""

from html import escape
from typing import Any

from models.evaluation import Accuracy
from models.reports import html

_RESUMED = '<p class="note">Then the run was resumed with:</p>'

_CURVES_CAPTION = (
    "Curves of the KAF network before and after training, evenly chosen layers and channels, over the density of the "
    "inputs that reach them. The dictionary spans the outer ticks; beyond them a curve returns to 0."
)


def page(metrics: dict[str, Any], labels: dict[str, str], figures: dict[str, bytes]) -> str:
    """Return the page for the content of metrics.json.

    Args:
        metrics: as written to metrics.json.
        labels: a name for each network to show.
        figures: PNG bytes of "accuracy", "curves" and "cost".
    """
    settings = metrics["settings"]
    networks = ", ".join(labels[name] for name in metrics["results"])
    body = f"""
<h1>kafops demo</h1>
<p class="lead">The same small ResNet20 with {escape(networks)}, trained adversarially on
{settings["train"] - metrics["held_out"]:,} MNIST images, watched on {metrics["held_out"]:,} and tested on
{settings["test"]:,} others.</p>
<pre>{escape(metrics["command"])}</pre>
<h2>Accuracy, clean and under attack</h2>
{html.figure(figures["accuracy"], "Clean and robust accuracy of each network, with 95 % Wilson intervals.")}
{_accuracy_table(metrics, labels)}
<p class="note">The attack is PGD with {settings["pgd_steps"]} steps and ε = {settings["eps"]:.4g}, one random start. An
image counts as robust when the network classifies it correctly and no point on the attack's path is misclassified. One
seed, one training each: the intervals cover the choice of test images, not the luck of training.</p>
<h2>Learned curves</h2>
{html.figure(figures["curves"], _CURVES_CAPTION)}
<h2>What a training step costs</h2>
{html.figure(figures["cost"], "Forward, backward and optimizer on one clean batch; in brackets, relative to ReLU.")}
{_cost_table(metrics["step_cost"])}
<h2>Training</h2>
<p class="note">Fast adversarial training (Wong et al. 2020): each batch is moved by noise from U(−ε, ε) and one signed
gradient step of 1.25 ε, then kept within ε and [0, 1]. SGD with Nesterov momentum and a one-cycle triangular learning
rate; weights of convolutions and linear layers decay, norms and curves do not. All networks start from the same
weights and see the same batches. The residual blocks are in pre-activation form; the KAFs start from random curves that
keep gradients in scale (<code>init="isometric"</code>).</p>
{_history_table(metrics, labels)}
<h2>Settings</h2>
{html.pairs(settings)}
<h2>Machine and versions</h2>
{_RESUMED.join(html.pairs(html.flat(environment)) for environment in metrics["environments"])}
"""
    return html.page("kafops demo", body)


def _accuracy_table(metrics: dict[str, Any], labels: dict[str, str]) -> str:
    steps = metrics["settings"]["pgd_steps"]
    head = ("network", "parameters", "clean", f"PGD-{steps}", "training")
    rows = [
        (
            escape(labels[name]),
            f"{result['parameters']:,}",
            _percent(result["clean"]),
            _percent(result["robust"]),
            f"{sum(metrics['timings'][name]['epoch_seconds']):.0f} s",
        )
        for name, result in metrics["results"].items()
    ]
    return html.table(head, rows)


def _cost_table(cost: dict[str, Any]) -> str:
    names = {
        "relu": "ReLU",
        "fused": "KAF, fused (kafops.kaf)",
        "compiled": "KAF, torch.compile of plain PyTorch",
        "reference": "KAF, plain PyTorch",
    }
    done = cost["implementations"]
    rows, failures = [], []
    for name in (n for n in names if n in done):
        result = done[name]
        if "error" in result:
            failures.append(f'<p class="note">{names[name]} could not be measured: {escape(result["error"])}</p>')
            continue
        low, high = result["spread_seconds"]
        rows.append(
            (
                names[name],
                f"{1e3 * result['median_seconds']:.1f} ms <small>{1e3 * low:.1f} to {1e3 * high:.1f}</small>",
                _ratio(result, "time_ratio"),
                f"{result['kept_bytes'] / 1e6:.1f} MB",
                _ratio(result, "memory_ratio"),
            )
        )
    note = (
        f'<p class="note">Batch of {cost["batch_size"]} images, base width {cost["width"]}, {cost["threads"]} threads, '
        "median and range, implementations taking turns. Memory is the bytes of the distinct tensors that autograd "
        "keeps from the forward to the backward pass, parameters left out.</p>"
    )
    table = html.table(("activation", "time", "to ReLU", "memory", "to ReLU"), rows)
    return table + "".join(failures) + note + _busy_note(done)


def _busy_note(done: dict[str, Any]) -> str:
    """Warn where the times of one and the same step are far apart: something else was running."""
    spreads = [result["spread_seconds"] for result in done.values() if "error" not in result]
    widest = max(high / low for low, high in spreads)
    if widest < 3:
        return ""
    return (
        f'<p class="note"><strong>The machine was busy:</strong> times of one step differ up to {widest:.0f}-fold, '
        "so the ratios of times mean little. Run the command again on an idle machine, with another --out.</p>"
    )


def _history_table(metrics: dict[str, Any], labels: dict[str, str]) -> str:
    rows = [
        (
            escape(labels[name]),
            str(epoch["epoch"]),
            f"{epoch['loss']:.4f}",
            f"{100 * epoch['accuracy']:.1f} %",
            f"{epoch['lr']:.3g}",
            f"{seconds:.1f} s",
        )
        for name, result in metrics["results"].items()
        for epoch, seconds in zip(result["history"], metrics["timings"][name]["epoch_seconds"], strict=True)
    ]
    head = ("network", "epoch", "loss", "accuracy on perturbed batches", "last learning rate", "time")
    return f"<details><summary>Epoch by epoch</summary>{html.table(head, rows)}</details>"


def _percent(accuracy: dict[str, Any]) -> str:
    low, high = Accuracy(accuracy["correct"], accuracy["total"]).interval
    return f"{100 * accuracy['accuracy']:.1f} % <small>{100 * low:.1f} to {100 * high:.1f}</small>"


def _ratio(result: dict[str, Any], key: str) -> str:
    return f"{result[key]:.3g}×" if key in result else "–"
