"""A study's page: what was done, tables, figures, and what the numbers allow to say."""

from collections.abc import Iterator, Sequence
from typing import Any

from models import data
from models.reports import tables
from models.reports.tables import Table, bullets, ends, points, signed, spread
from models.study.plan import COMMON, TUNED, Study
from models.study.summary import CLEAN, OVERFITTED, WORST


def markdown(study: Study, summary: dict[str, Any], results: dict[str, dict[str, Any]], command: str) -> str:
    """Return the page as Markdown.

    Args:
        study: what was to be done.
        summary: of `models.study.summary.summarise`.
        results: by run, as read from their files.
        command: that made the page.
    """
    measures = summary["images"]
    parts = head(f"Study: {study.name}", study.about, command, f", from {summary['runs']} of {summary['of']} runs")
    parts.append(bullets(_settings(study)))
    if summary["comparisons"]:
        parts += ["## The comparisons named beforehand", _comparisons(study, summary["comparisons"])]
        parts += ["![the comparisons](comparisons.png)", _HOLM]
    looked = (
        "Means over seeds ± standard deviation between seeds, in %, of test images that no training saw: "
        f"{', '.join(f'{n} of {m}' for m, n in measures.items())}. *worst* counts an image as robust where no attack "
        "breaks it, of the images that all attacks were made on."
    )
    if len(study.radii) > 1:
        parts += ["## Accuracy", "![accuracy over eps](radii.png)", "*Under the worst attack; dots are seeds.*", looked]
        parts += [_OVERFITTED, *_over_radii(study, summary)]
        if summary["overfitting"]:
            parts += [
                "## Which runs overfitted, in the pairs named beforehand",
                _overfitting(summary["overfitting"]),
                _PAIRS,
            ]
    else:
        parts += ["## Accuracy", "![accuracy of each activation](accuracies.png)", looked]
        parts += [_accuracies(label, found, summary["measures"]) for label, found, _ in _panels(study, summary)]
        if len(summary["activations"]) > 1:
            parts += ["![robust against clean](robust-clean.png)"]
            parts += ["Under the worst of all attacks; dots are seeds, each tied to the mean."]
        parts += [f"## Differences to {summary['baseline']}", "![differences](differences.png)", _DIFFERENCES]
        parts += [_differences(label, found, measures) for label, found, _ in _panels(study, summary)]
    parts += ["## What the numbers say", bullets(_findings(study, summary, results)), "## Machine", _machine(results)]
    return tables.markdown(parts)


def head(title: str, about: str, command: str, extent: str) -> list[str]:
    """Return how pages of studies begin."""
    return [f"# {title}", about, f"```sh\n{command}\n```", f"That command made this page{extent}."]


_HOLM = (
    "Points of accuracy, of pairs with the same seeds (same starting weights and batches) and the same test images. "
    "The interval is for the choice of both, by the variance of the bootstrap that draws both anew, which has a closed "
    "form (Owen 2007), and Student's t with Welch and Satterthwaite's degrees of freedom, with two or three seeds no "
    "more than theirs (which leaves wide intervals); its level is that at which Holm's procedure tests the row, of all "
    "that are planned, or that at which it ended: in 95 % of such tables no row claims a difference that is none. p is "
    "Holm's. *between seeds* is the standard deviation of one seed's difference, *of images* the standard error "
    "through the choice of images alone."
)
_DIFFERENCES = (
    "Points of accuracy under the worst of all attacks, seed by seed (same starting weights, batches and test images), "
    "with the 95 % interval for the choice of seeds and images; small dots are seeds, and an arrow says that an "
    "interval goes on. None of these is corrected, though those named beforehand are among them: one in twenty "
    "excludes 0 by chance."
)
_OVERFITTED = (
    "In a cell: clean, under the worst attack, and in how many runs training overfitted its own attack (in the last "
    f"epoch accuracy under PGD, on held-out images, is more than {points(OVERFITTED, '.0f')} points below that under "
    "it, on training images). A network that withstands neither has not overfitted by this."
)
_PAIRS = (
    "Runs of the same method, ε, rate and seed. p is of the exact sign test over the pairs of which one run overfitted "
    "(McNemar's), by Holm's procedure over the rows. Runs of one seed at several ε share weights and batches, so that "
    "pairs are not as independent as the test takes them to be, and p is rather too small."
)


def _panels(study: Study, summary: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield each panel's label, with its rate where there are several, its activations, and its rate."""
    for rate, panels in summary["rates"].items():
        for label, content in panels.items():
            of_rate = f", {rate} rate" if len(summary["rates"]) > 1 else ""
            yield label + data.marked(study.data) + of_rate, content["activations"], rate


def _comparisons(study: Study, rows: list[dict[str, Any]]) -> str:
    heads = ("", "comparison", "attack", "difference", "interval", "p", "n", "between seeds", "of images", "")
    table = Table(*heads)
    for row in rows:
        corrected, mean = row["corrected"], points(row["mean"], "+.1f")
        n = f"{row['seeds']} {'seed' if row['seeds'] == 1 else 'seeds'} × {row['images']} images"
        between = "" if row["between_seeds"] is None else points(row["between_seeds"])
        interval, p, verdict = "", "", "one seed: nothing can be said"
        if corrected is not None:
            interval = ends(corrected["low"], corrected["high"])
            p, verdict = f"{corrected['p']:.2g}", "a difference" if corrected["found"] else "none found"
        pair = f"{row['pair'][0]} − {row['pair'][1]}"
        numbers = (mean, interval, p, n, between, points(row["of_images"]))
        table.add(row["panel"] + data.marked(study.data), pair, row["attack"], *numbers, verdict)
    return table.markdown()


def _settings(study: Study) -> list[str]:
    return [
        f"images: `{study.data}`{data.marked(study.data)}; eps = {', '.join(f'{eps:.3g}' for eps in study.radii)}",
        *(f"{label}: `{network}`" for label, network in study.networks.items()),
        f"activations: {', '.join(f'`{a}`' for a in study.activations)}",
        *(f"{name}: {_variant(variant)}" for name, variant in study.variants.items()),
        f"seeds: {', '.join(map(str, study.seeds))}, of weights, order and noise",
        f"training: {_pairs(study.training)}",
        *(f"{label}: {_pairs(method)}" for label, method in study.methods.items()),
        _rates(study),
        *(f"{label}: `{attack}`" for label, attack in study.attacks.items()),
    ]


def _rates(study: Study) -> str:
    if TUNED not in study.rates:
        return "one learning rate for all"
    shown = [
        f"  - {network}, {name}: lr {rates['lr']:g}"
        + (f", × {rates['activation_lr']:g} for its own" if study.learns(name) else "")
        for network, by_activation in study.tuned.items()
        for name, rates in by_activation.items()
    ]
    where = f"../{study.tuned_by}/tuning/README.md" if study.tuned_by else "tuning/README.md"
    of = f" in the study {study.tuned_by}" if study.tuned_by else ""
    which = f"rates chosen for each activation [on held-out images]({where}){of}"
    return "\n".join([f"{which}{', and those above' if COMMON in study.rates else ''}:", *shown])


def _pairs(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in settings.items())


def _variant(variant: dict[str, Any]) -> str:
    changes = _pairs(variant.get("training", {}))
    return f"`{variant['activation']}`" + (f" with {changes}" if changes else "")


def _accuracies(panel: str, activations: dict[str, Any], measures: list[str]) -> str:
    table = Table(panel, *measures)
    for name, entry in activations.items():
        table.add(name, *(spread(entry[m]["mean"], entry[m]["std"]) for m in measures))
    return table.markdown()


def _over_radii(study: Study, summary: dict[str, Any]) -> Iterator[str]:
    """Yield a table for each rate, network and method, with a column for each eps."""
    for rate, panels in summary["rates"].items():
        tables_of: dict[str, dict[str, dict[float, str]]] = {}
        for panel in panels.values():
            title = ", ".join(filter(None, (panel["network"], panel["method"])))
            title += data.marked(study.data) + (f", {rate} rate" if len(summary["rates"]) > 1 else "")
            for name, e in panel["activations"].items():
                text = f"{points(e[CLEAN]['mean'])} / {spread(e[WORST]['mean'], e[WORST]['std'])}"
                text += f" ({e['overfitted']} of {e['watched']})" if e["overfitted"] else ""
                tables_of.setdefault(title, {}).setdefault(name, {})[panel["eps"]] = text
        for title, activations in tables_of.items():
            table = Table(title, *(f"ε = {eps:.3g}" for eps in study.radii))
            for name, cells in activations.items():
                table.add(name, *(cells.get(eps, "") for eps in study.radii))
            yield table.markdown()


def _overfitting(rows: list[dict[str, Any]]) -> str:
    table = Table("", "pairs", "both overfitted", "only the first", "only the second", "p")
    for row in rows:
        counts = [str(row[name]) for name in ("pairs", "both", "first", "second")]
        counts[0] += f" ({row['unknown']} more failed or had no watch)" if row["unknown"] else ""
        table.add(" against ".join(row["pair"]), *counts, f"{row['holm']:.2g}")
    return table.markdown()


def _differences(panel: str, activations: dict[str, Any], images: dict[str, int]) -> str:
    table = Table(panel, "seeds", f"clean, {images[CLEAN]} images", f"worst attack, {min(images.values())} images")
    for name, entry in activations.items():
        if "difference" in entry[WORST]:
            seeds = str(entry[WORST]["difference"]["seeds"])
            table.add(name, seeds, *(signed(entry[m]["difference"]) for m in (CLEAN, WORST)))
    return table.markdown()


def _findings(study: Study, summary: dict[str, Any], results: dict[str, dict[str, Any]]) -> list[str]:
    found = []
    if list(summary["rates"]) == [COMMON]:
        found.append("All of this is said of one learning rate: at another the order may be another.")
    if few := [len(e["seeds"]) for _, entries, _ in _panels(study, summary) for e in entries.values()]:
        seeds = f"{min(few)} to {max(few)} seeds" if min(few) < max(few) else f"{min(few)} seeds"
        found.append(f"{seeds}: a true difference smaller than its interval is wide goes unseen.")
    first = summary["measures"][1]
    said: dict[str, list[str]] = {}
    for panel, entries, rate in _panels(study, summary) if len(study.radii) == 1 else ():
        named = study.comparisons if rate == study.rates[0] else ()  # at which they are compared
        said.setdefault(_clear_differences(named, entries, summary["baseline"]), []).append(panel)
    found += [f"{'; '.join(panels)}: {sentence}" for sentence, panels in said.items()]
    for panel, entries, _ in _panels(study, summary):
        gaps = {name: e["gaps"].get(first, 0.0) for name, e in entries.items()}
        widest = max(gaps, key=gaps.__getitem__)
        if (gap := gaps.pop(widest)) > 0:  # there are other attacks
            found.append(
                f"{panel}: the largest gap between {first} and the worst attack is {widest}'s, "
                f"{points(gap)} points on the images that all attacks were made on; the others' are at most "
                f"{points(max(gaps.values(), default=0.0))}."
            )
    if failed := summary["failed"]:
        names = "; ".join(f"{name} ({error})" for name, error in failed.items())
        found.append(f"Failed, and counted as wrong on every image: {names}.")
    collapsed = [name for name, result in results.items() if result.get("collapsed")]
    rolled = "Training collapsed, and was rolled back to its best epoch, in"
    return [*found, f"{rolled} {len(collapsed)} runs{': ' if collapsed else ''}{', '.join(collapsed)}."]


def _clear_differences(comparisons: Sequence[Sequence[str]], entries: dict[str, Any], baseline: str) -> str:
    """Say which of the differences that are not among the comparisons exclude 0."""
    named = {name for pair in comparisons if baseline in pair for name in pair}
    others = {name: e for name, e in entries.items() if name not in named}
    if not others:
        return f"all differences to {baseline} were named beforehand."
    differences = {name: e[WORST]["difference"] for name, e in others.items() if "difference" in e[WORST]}
    known = {name: d for name, d in differences.items() if d["low"] is not None}
    if not known:
        return f"one seed so far, so nothing can be said about differences to {baseline}."
    clear = [f"{name} ({signed(d)})" for name, d in known.items() if not d["low"] <= 0 <= d["high"]]
    if not clear:
        return f"under the worst attack, uncorrected, none of the others' intervals excludes 0 ({', '.join(known)})."
    return f"under the worst attack, uncorrected, the intervals of these exclude 0: {', '.join(clear)}."


def _machine(results: dict[str, dict[str, Any]]) -> str:
    environments = [result["environment"] for result in results.values()]
    machines = sorted({f"{e['processor']}, torch {e['torch']}, kafops {e['kafops']}" for e in environments})
    commits = sorted({str(e["commit"]) for e in environments})
    return bullets([*machines, f"commits: {', '.join(commits)}"])
