"""Turns the JSON of a benchmark run into a Markdown table, a small JSON summary and a figure.

`python -m bench.report bench/out/latest.json` writes bench/results/<processor>.{md,json,png}. A quick run, or one
without all rows, is not a result: its files are written beside it. Given a summary, as bench/results/<processor>.json,
it draws the figure anew.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.paired import Spread, spread
from bench.result import Result, analyse

RESULTS = Path(__file__).parent / "results"
_HEADINGS = (
    "what", "against", "target", "measured (p20 to p80)", "met", "kafops (p20 to p80)", "baseline",
    "bytes moved", "of copy", "error", "baseline's",
)  # fmt: skip
_METHOD = (
    "float32 (128, 32, 32, 32), D = 20, contiguous, where a row does not say otherwise. Copy, baseline and kafops take "
    "turns; each turn gives one ratio of neighbours, and *measured* is the median of these ratios. *Bytes moved* is "
    "the least that any implementation must read and write; *of copy* is the bandwidth that this makes, as a share of "
    "that of the copies in the same turns. *Error* is the largest max |value - exact| / max |exact| over outputs and "
    "gradients, exact by the reference in float64. Freed memory is kept by malloc, so no call pays for page faults."
)
_COMPARATIVES = {"s": ("slower", "faster"), "B": ("more", "less")}


def markdown(results: Iterable[Result], machine: dict[str, Any], copy_bandwidth: Spread) -> str:
    """Render the page: how it was measured, the rows with a target, the rows for context."""
    results = list(results)
    targets = [r for r in results if r.met is not None]
    missed = sum(not r.met for r in targets)
    lines = [
        f"# Speed of kafops on {machine['processor']}",
        "",
        f"`make bench` on {machine['date']}, commit {machine['commit']}: {len(targets) - missed} of {len(targets)} "
        "targets met.",
        "",
        f"- {machine['backend']}; {machine['threads']} threads; load average before the run {machine['load']:.1f}",
        f"- kafops {machine['kafops']}, torch {machine['torch']}, Python {machine['python']}, {machine['system']}",
        f"- copy of 16.8 MB: {_bandwidth(copy_bandwidth.median)} (p20 to p80: {_bandwidth(copy_bandwidth.p20)} to "
        f"{_bandwidth(copy_bandwidth.p80)}), bytes read plus bytes written",
        "",
        _METHOD,
        "",
        "## Targets",
        "",
        *_table(targets),
    ]
    if len(targets) < len(results):
        lines += ["", "## For context", "", *_table([r for r in results if r.met is None])]
    return "\n".join(lines) + "\n"


def _table(results: list[Result]) -> list[str]:
    rows = [_HEADINGS, ("---",) * len(_HEADINGS), *map(_cells, results)]
    return [f"| {' | '.join(row)} |" for row in rows]


def _cells(r: Result) -> tuple[str, ...]:
    return (
        r.what,
        r.baseline_name,
        target(r.limit, r.unit),
        ratio(r.ratio, r.unit, r.inverse),
        {True: "yes", False: "**no**", None: ""}[r.met],
        _quantities(r.candidate, r.unit),
        quantity(r.baseline.median, r.unit),
        quantity(r.bytes_moved, "B") if r.bytes_moved else "",
        f"{r.share_of_copy.median:.0%}" if r.share_of_copy else "",
        f"{r.error:.1e}" if r.error is not None else "",
        f"{r.baseline_error:.1e}" if r.baseline_error is not None else "",
    )


def target(limit: float | None, unit: str) -> str:
    """Say a limit of candidate / baseline in words."""
    if limit is None:
        return ""
    if limit == 1:
        return f"no {_COMPARATIVES[unit][0]}"
    return f"{1 / limit:.3g} times {_COMPARATIVES[unit][1]}" if limit < 1 else f"within {limit:g}×"


def ratio(r: Spread, unit: str, inverse: bool) -> str:
    """Say a ratio candidate / baseline, or with `inverse` how many times faster or less it is."""
    if inverse:
        return f"{1 / r.median:.3g} times {_COMPARATIVES[unit][1]} ({1 / r.p80:.3g} to {1 / r.p20:.3g})"
    return f"{r.median:.2f}× ({r.p20:.2f} to {r.p80:.2f})"


def quantity(value: float, unit: str) -> str:
    """Write seconds or bytes with three digits and a fitting prefix: 1.23 ms, 16.8 MB."""
    prefixes = ((1, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n")) if unit == "s" else ((1e9, "G"), (1e6, "M"), (1e3, "k"))
    scale, prefix = next(((s, p) for s, p in prefixes if abs(value) >= s), (1, "") if unit == "B" else prefixes[-1])
    return f"{_digits(value / scale)} {prefix}{unit}"


def _quantities(s: Spread, unit: str) -> str:
    if s.p20 == s.p80:
        return quantity(s.median, unit)
    return f"{quantity(s.median, unit)} ({quantity(s.p20, unit)} to {quantity(s.p80, unit)})"


def _digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def _bandwidth(bytes_per_second: float) -> str:
    return f"{quantity(bytes_per_second, 'B')}/s"


def summary(results: Iterable[Result], machine: dict[str, Any]) -> dict[str, Any]:
    """Return what the table shows, for programs."""
    return {"machine": machine, "rows": [asdict(r) | {"met": r.met} for r in results]}


def _row(values: dict[str, Any]) -> Result:
    """Return what `summary` made a row of."""
    fields: dict[str, Any] = {
        name: Spread(**value) if isinstance(value, dict) else value for name, value in values.items()
    }
    del fields["met"]
    return Result(**fields)


def copy_bandwidth(entries: Iterable[dict[str, Any]]) -> Spread:
    """Return the bytes per second of all copies of a run."""
    return spread([entry["copy_bytes"] / seconds for entry in entries for seconds in entry.get("copy", ())])


def file_stem(machine: dict[str, Any]) -> str:
    """Return a file name for a processor and instruction set: intel-xeon-avx512."""
    name = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*", " ", machine["processor"].lower())
    capability = machine["backend"].rsplit(" ", 1)[-1] if machine["backend"].startswith("cpu:") else "reference"
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {capability}").strip("-")


def main(arguments: list[str] | None = None) -> int:
    """Write the report of a run and print it; return 1 where the run holds no rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="JSON file of pytest-benchmark, or a summary of one")
    run = parser.parse_args(arguments).run
    data = json.loads(run.read_text())
    if "rows" in data:
        _write_figure([_row(values) for values in data["rows"]], data["machine"], run.with_suffix(".png"))
        print(f"wrote {run.with_suffix('.png')}")
        return 0
    entries = [b["extra_info"] for b in data["benchmarks"] if "key" in b["extra_info"]]
    if not entries:
        print(f"error: {run} holds no row of the table", file=sys.stderr)
        return 1
    machine = dict(data["machine_info"]["kafops"])
    missing = table_keys() - {entry["key"] for entry in entries}
    folder = run.parent if machine.pop("quick") or missing else RESULTS
    results = [analyse(entry) for entry in entries]
    stem = folder / file_stem(machine)
    page = markdown(results, machine, copy_bandwidth(entries))
    folder.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text(page)
    stem.with_suffix(".json").write_text(json.dumps(summary(results, machine), indent=1, ensure_ascii=False) + "\n")
    _write_figure(results, machine, stem.with_suffix(".png"))
    print(page)
    if missing:
        print(f"not a result, because rows are missing: {', '.join(sorted(missing))}")
    print(f"wrote {stem}.md, .json and .png")
    return 0


def table_keys() -> set[str]:
    """Return the keys of all rows of the table."""
    from bench import table

    return {row.key for row in (*table.TARGETS, *table.CONTEXT)} | {row[0] for row in table.BYTES}


def _write_figure(results: list[Result], machine: dict[str, Any], path: Path) -> None:
    from bench import figure

    path.write_bytes(figure.draw(results, machine))


if __name__ == "__main__":
    sys.exit(main())
