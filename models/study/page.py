"""A study's page: what was done, tables, figures, and what the numbers allow to say."""

from typing import Any

from models.study.plan import Study
from models.study.summary import CLEAN, WORST


def markdown(study: Study, summary: dict[str, Any], results: dict[str, dict[str, Any]], command: str) -> str:
    """Return the page as Markdown.

    Args:
        study: what was to be done.
        summary: of `models.study.summary.summarise`.
        results: by run, as read from their files.
        command: that made the page.
    """
    parts = [
        f"# Study: {study.name}",
        study.about,
        f"```sh\n{command}\n```",
        f"That command made this page, from {summary['runs']} of {summary['of']} runs.",
        _settings(study),
        "## Accuracy",
        "![accuracy of each activation](accuracies.png)",
        f"Means over seeds ± standard deviation between seeds, in %, of {study.images} test images that no training "
        "saw. *worst* counts an image as robust where no attack breaks it.",
    ]
    parts += [_table(network, content, summary) for network, content in summary["networks"].items()]
    parts += [
        f"## Differences to {summary['baseline']}",
        "![differences](differences.png)",
        "Points of accuracy under the worst of all attacks, seed by seed (same starting weights, batches and test "
        "images), with the 95 % interval of Student's t over seeds. The grey band is what two *single* runs differ by "
        "with 95 % probability when only their seeds differ. The intervals are for the choice of seeds; test images "
        "are the same in all. One in twenty excludes 0 by chance.",
    ]
    parts += [_differences(network, content) for network, content in summary["networks"].items()]
    parts += ["## What the numbers say", *_findings(summary, results)]
    parts += ["## Machine", _machine(results)]
    return "\n\n".join(parts) + "\n"


def _settings(study: Study) -> str:
    lines = [
        f"- images: `{study.data}`; {study.images} test images attacked, eps = {study.eps:g}",
        *(f"- {label}: `{network}`" for label, network in study.networks.items()),
        f"- activations: {', '.join(f'`{a}`' for a in study.activations)}",
        *(f"- {name}: {_variant(variant)}" for name, variant in study.variants.items()),
        f"- seeds: {', '.join(map(str, study.seeds))}, of weights, order and noise",
        f"- training: {', '.join(f'{k} = {v}' for k, v in study.training.items())}; one learning rate for all",
        *(f"- {label}: `{attack}`" for label, attack in study.attacks.items()),
    ]
    return "\n".join(lines)


def _variant(variant: dict[str, Any]) -> str:
    changes = ", ".join(f"{name} = {value}" for name, value in variant.get("training", {}).items())
    return f"`{variant['activation']}`" + (f" with {changes}" if changes else "")


def _table(network: str, content: dict[str, Any], summary: dict[str, Any]) -> str:
    measures = summary["measures"]
    lines = [f"| {network} | {' | '.join(measures)} |", "|---" * (len(measures) + 1) + "|"]
    for name, entry in content["activations"].items():
        lines.append(f"| {name} | {' | '.join(_spread(entry[m]) for m in measures)} |")
    noise = [_points(content["noise"][m]["difference"]) if content["noise"][m] else "" for m in measures]
    lines.append(f"| *two seeds differ by up to* | {' | '.join(noise)} |")
    return "\n".join(lines)


def _differences(network: str, content: dict[str, Any]) -> str:
    lines = [f"| {network} | clean | worst attack |", "|---|---|---|"]
    for name, entry in content["activations"].items():
        if "difference" in entry[WORST]:
            lines.append(f"| {name} | {_signed(entry[CLEAN]['difference'])} | {_signed(entry[WORST]['difference'])} |")
    return "\n".join(lines)


def _findings(summary: dict[str, Any], results: dict[str, dict[str, Any]]) -> list[str]:
    found = ["- All of this is said of one learning rate: at another the order may be another."]
    for network, content in summary["networks"].items():
        entries = content["activations"]
        found.append(f"- {network}: {_clear_differences(entries, summary['baseline'])}")
        first = summary["measures"][1]
        gaps = {name: e[first]["mean"] - e[WORST]["mean"] for name, e in entries.items()}
        widest = max(gaps, key=gaps.__getitem__)
        if gaps[widest] > 0:  # there are other attacks
            found.append(
                f"- {network}: the largest gap between {first} and the worst attack is {widest}'s, "
                f"{_points(gaps[widest])} points; the others' are at most "
                f"{_points(max((g for n, g in gaps.items() if n != widest), default=0.0))}."
            )
        if (noise := content["noise"][WORST]) is not None:
            found.append(
                f"- {network}: single runs that differ in their seed alone are up to {_points(noise['difference'])} "
                "points apart under the worst attack (95 %). A smaller difference of two single runs says nothing."
            )
    failed = summary["failed"]
    if failed:
        found.append(f"- Failed, and left out: {'; '.join(f'{name} ({error})' for name, error in failed.items())}.")
    collapsed = [name for name, result in results.items() if result.get("collapsed")]
    found.append(
        f"- Training collapsed, and was rolled back to its best epoch, in {len(collapsed)} runs"
        + (f": {', '.join(collapsed)}." if collapsed else ".")
    )
    return ["\n".join(found)]


def _clear_differences(entries: dict[str, Any], baseline: str) -> str:
    differences = {name: e[WORST]["difference"] for name, e in entries.items() if "difference" in e[WORST]}
    known = {name: d for name, d in differences.items() if d["low"] is not None}
    if not known:
        return f"one seed so far, so nothing can be said about differences to {baseline}."
    clear = [f"{name} ({_signed(d)})" for name, d in known.items() if not d["low"] <= 0 <= d["high"]]
    if not clear:
        return f"under the worst attack no activation differs from {baseline} beyond its interval."
    return f"under the worst attack these differ from {baseline} beyond their intervals: {', '.join(clear)}."


def _machine(results: dict[str, dict[str, Any]]) -> str:
    environments = [result["environment"] for result in results.values()]
    machines = {f"- {e['processor']}, torch {e['torch']}, kafops {e['kafops']}" for e in environments}
    commits = sorted({str(e["commit"]) for e in environments})
    return "\n".join([*sorted(machines), f"- commits: {', '.join(commits)}"])


def _spread(entry: dict[str, Any]) -> str:
    mean = f"{100 * entry['mean']:.1f}"
    return mean if entry["std"] is None else f"{mean} ± {100 * entry['std']:.1f}"


def _signed(difference: dict[str, Any]) -> str:
    mean = f"{100 * difference['mean']:+.1f}"
    if difference["low"] is None:
        return mean
    return f"{mean} [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"


def _points(share: float) -> str:
    return f"{100 * share:.1f}"
