"""A study's page: what was done, tables, figures, and what the numbers allow to say."""

from collections.abc import Iterator
from typing import Any

from models import data
from models.study.plan import COMMON, TUNED, Study
from models.study.summary import CLEAN, WORST


def markdown(study: Study, summary: dict[str, Any], results: dict[str, dict[str, Any]], command: str) -> str:
    """Return the page as Markdown.

    Args:
        study: what was to be done.
        summary: of `models.study.summary.summarise`.
        results: by run, as read from their files.
        command: that made the page.
    """
    measures = summary["images"]
    parts = [
        f"# Study: {study.name}",
        study.about,
        f"```sh\n{command}\n```",
        f"That command made this page, from {summary['runs']} of {summary['of']} runs.",
        _settings(study),
    ]
    if summary["comparisons"]:
        parts += ["## The comparisons named beforehand", _comparisons(study, summary["comparisons"]), _HOLM]
    parts += [
        "## Accuracy",
        "![accuracy of each activation](accuracies.png)",
        "Means over seeds ± standard deviation between seeds, in %, of test images that no training saw: "
        f"{', '.join(f'{n} of {m}' for m, n in measures.items())}. *worst* counts an image as robust where no attack "
        "breaks it, of the images that all attacks were made on.",
    ]
    parts += [_table(network, rate, content, summary) for rate, network, content in _panels(study, summary)]
    parts += [f"## Differences to {summary['baseline']}", "![differences](differences.png)", _DIFFERENCES]
    parts += [_differences(network, rate, content) for rate, network, content in _panels(study, summary)]
    parts += ["## What the numbers say", *_findings(study, summary, results)]
    parts += ["## Machine", _machine(results)]
    return "\n\n".join(parts) + "\n"


_HOLM = (
    "Points of accuracy, of pairs with the same seeds (same starting weights and batches) and the same test images. "
    "The interval is for the choice of both, by the bootstrap that draws both anew (Owen 2007) and Student's t with "
    "Welch and Satterthwaite's degrees of freedom; its level is that at which Holm's procedure tests the row: in "
    "95 % of such tables no row claims a difference that is none. p is Holm's. *between seeds* is the standard "
    "deviation of one seed's difference, *of images* the standard error through the choice of images alone."
)
_DIFFERENCES = (
    "Points of accuracy under the worst of all attacks, seed by seed (same starting weights, batches and test images), "
    "with the 95 % interval for the choice of seeds and images. These were not named beforehand and are not corrected: "
    "one in twenty excludes 0 by chance."
)


def _panels(study: Study, summary: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for rate, networks in summary["rates"].items():
        for network, content in networks.items():
            yield (f", {rate} rate" if len(summary["rates"]) > 1 else ""), network + data.marked(study.data), content


def _comparisons(study: Study, rows: list[dict[str, Any]]) -> str:
    lines = ["| network | comparison | attack | difference | interval | p | n | between seeds | of images | |"]
    lines.append("|---" * 10 + "|")
    for row in rows:
        name = f"{row['pair'][0]} − {row['pair'][1]}"
        n = f"{row['seeds']} seeds × {row['images']} images"
        mean, corrected = f"{100 * row['mean']:+.1f}", row["corrected"]
        spread = [_points(row["between_seeds"]) if row["between_seeds"] is not None else "", _points(row["of_images"])]
        if corrected is None:
            cells = [mean, "", "", n, *spread, "one seed: nothing can be said"]
        else:
            interval = f"[{100 * corrected['low']:+.1f}, {100 * corrected['high']:+.1f}]"
            verdict = "a difference" if corrected["found"] else "none found"
            cells = [mean, interval, f"{corrected['p']:.2g}", n, *spread, verdict]
        lines.append(f"| {row['network']}{data.marked(study.data)} | {name} | {row['attack']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _settings(study: Study) -> str:
    lines = [
        f"- images: `{study.data}`{data.marked(study.data)}; eps = {study.eps:g}",
        *(f"- {label}: `{network}`" for label, network in study.networks.items()),
        f"- activations: {', '.join(f'`{a}`' for a in study.activations)}",
        *(f"- {name}: {_variant(variant)}" for name, variant in study.variants.items()),
        f"- seeds: {', '.join(map(str, study.seeds))}, of weights, order and noise",
        f"- training: {', '.join(f'{k} = {v}' for k, v in study.training.items())}",
        _rates(study),
        *(f"- {label}: `{attack}`" for label, attack in study.attacks.items()),
    ]
    return "\n".join(lines)


def _rates(study: Study) -> str:
    if TUNED not in study.rates:
        return "- one learning rate for all"
    shown = [
        f"  - {network}, {name}: lr {rates['lr']:g}"
        + (f", × {rates['activation_lr']:g} for its own" if study.learns(name) else "")
        for network, by_activation in study.tuned.items()
        for name, rates in by_activation.items()
    ]
    which = "rates chosen for each activation [on held-out images](tuning/README.md)"
    return "\n".join([f"- {which}{', and those above' if COMMON in study.rates else ''}:", *shown])


def _variant(variant: dict[str, Any]) -> str:
    changes = ", ".join(f"{name} = {value}" for name, value in variant.get("training", {}).items())
    return f"`{variant['activation']}`" + (f" with {changes}" if changes else "")


def _table(network: str, rate: str, content: dict[str, Any], summary: dict[str, Any]) -> str:
    measures = summary["measures"]
    lines = [f"| {network}{rate} | {' | '.join(measures)} |", "|---" * (len(measures) + 1) + "|"]
    for name, entry in content["activations"].items():
        lines.append(f"| {name} | {' | '.join(_spread(entry[m]) for m in measures)} |")
    return "\n".join(lines)


def _differences(network: str, rate: str, content: dict[str, Any]) -> str:
    lines = [f"| {network}{rate} | clean | worst attack |", "|---|---|---|"]
    for name, entry in content["activations"].items():
        if "difference" in entry[WORST]:
            lines.append(f"| {name} | {_signed(entry[CLEAN]['difference'])} | {_signed(entry[WORST]['difference'])} |")
    return "\n".join(lines)


def _findings(study: Study, summary: dict[str, Any], results: dict[str, dict[str, Any]]) -> list[str]:
    found = []
    if list(summary["rates"]) == [COMMON]:
        found.append("- All of this is said of one learning rate: at another the order may be another.")
    if few := [len(e["seeds"]) for _, _, c in _panels(study, summary) for e in c["activations"].values()]:
        found.append(
            f"- {min(few)} to {max(few)} seeds: a true difference smaller than its interval is wide goes unseen."
        )
    for rate, network, content in _panels(study, summary):
        entries = content["activations"]
        found.append(f"- {network}{rate}: {_clear_differences(entries, summary['baseline'])}")
        first = summary["measures"][1]
        gaps = {name: e[first]["mean"] - e[WORST]["mean"] for name, e in entries.items()}
        widest = max(gaps, key=gaps.__getitem__)
        if gaps[widest] > 0:  # there are other attacks
            found.append(
                f"- {network}{rate}: the largest gap between {first} and the worst attack is {widest}'s, "
                f"{_points(gaps[widest])} points; the others' are at most "
                f"{_points(max((g for n, g in gaps.items() if n != widest), default=0.0))}."
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
