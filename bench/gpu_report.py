"""Turns what was measured on a GPU into a JSON file, a Markdown page, and the GPU tables of the README.

A record is one result of `bench.gpu`: its `kind` is "test", "kernel", "host", "step" or "failure", and `seconds` has
[median, 20th, 80th percentile] for each of those who took turns, or [median] alone. A share is a copy's time for as
many bytes, over the kernel's, from one record.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import gpu_table, report
from bench.gpu_table import COPY, KAF, LARGE, PASSES, RELU, SILU
from models.support import files
from models.support.errors import UserError

Record = dict[str, Any]
Summary = dict[str, Any]  # {"format", "machine": facts, "results": records}

FORMAT = "kafops: times on a GPU, 2"  # tells these files from others in bench/results
RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
FAILURE = "error"  # of a part that failed
MARKERS = ("<!-- gpu-table -->", "<!-- /gpu-table -->")
BACKENDS = {"cuda": "CUDA C++", "triton": "Triton"}
_LAYERS = tuple(gpu_table.ACTIVATIONS)
_METHOD = (
    "*Of copy* is the time of a device-to-device copy of as many bytes as must be moved (forward two passes over x, "
    "backward three, double backward five), over the kernel's. A call stands between two CUDA events, launched by "
    "PyTorch; all take turns, with the L2 cache flushed and the host let ahead before each, so that its part is not in "
    "it. A training step is forward under autocast, backward and SGD. Medians, with the 20th and 80th percentile."
)


def share(record: Record, name: str) -> float | None:
    """Return the copy's time for as many bytes over the time of a backend or baseline, None where one has no time."""
    seconds = record["seconds"]
    if COPY not in seconds or name not in seconds:
        return None
    return float(PASSES[record["what"]] / 2 * seconds[COPY][0] / seconds[name][0])


def failures(summary: Summary) -> list[str]:
    """Name what kafops failed at, but for lack of memory."""
    ours = {*BACKENDS, KAF, FAILURE, "inputs"}
    return [
        f"{record.get('title', record['what'])}, {name}: {why}"
        for record in summary["results"]
        for name, why in record.get("failed", {}).items()
        if name in ours and why != "out of memory"
    ]


def say(record: Record) -> str:
    """Describe a result in a line."""
    if record["kind"] == "test":
        return f"  {record['outcome']} ({record['took']:g} s)"
    parts = [f"{name} {why}" for name, why in record.get("failed", {}).items()]
    if record["kind"] == "failure":
        return f"{record['what']}: {', '.join(parts)}"
    for name, seconds in record["seconds"].items():
        of = share(record, name) if record["kind"] == "kernel" and name != COPY else None
        more = f" {of:.2f}" if of else f" {_times(record, name):.3f}x" if record["kind"] != "kernel" else ""
        parts.append(f"{name} {_quantity(seconds[0])}{more}")
    return f"{_where(record)}: {', '.join(parts)}"


def _where(record: Record) -> str:
    if record["kind"] == "kernel":
        return f"{tuple(record['shape'])} {record['dtype']} {record['layout']}, {record['title']}"
    if record["kind"] == "host":
        return f"host, {record['what']}"
    return f"{record['network']}, batch {record['batch']}, {record['dtype']}, {record['layout']}, {record['what']}"


def _times(record: Record, name: str) -> float:
    """Return a layer's time as a multiple of ReLU's, or of the first that there is."""
    seconds = record["seconds"]
    return float(seconds[name][0] / seconds.get(RELU, next(iter(seconds.values())))[0])


def _quantity(seconds: float) -> str:
    return report.quantity(seconds, "s")


def write_json(path: Path, summary: Summary) -> None:
    """Write a summary, a result a line, numbers to four digits."""
    head = json.dumps({name: v for name, v in summary.items() if name != "results"}, indent=1, ensure_ascii=False)
    lines = ",\n".join(json.dumps(files.rounded(r, 4), ensure_ascii=False, allow_nan=False) for r in summary["results"])
    files.write_text(path, f'{head[:-2]},\n "results": [\n{lines}\n]}}\n')


# ----------------------------------------------------------------------------------------------------------------- page


def markdown(summary: Summary) -> str:
    """Render the page: the machine, how it was measured, and a table for each kind of result."""
    m, results = summary["machine"], summary["results"]
    facts = ("driver", "cuda", "torch", "triton", "kafops", "python", "processor")
    lines = [
        f"# Speed of kafops on {m['gpu']}",
        "",
        f"Measured on {m['date']}, commit {m['commit']}: {', '.join(f'{n} {m[n]}' for n in facts if n in m)}.",
        "",
        *_wrapped(summary.get("how", _METHOD)),
    ]
    if clocks := _clocks(results):
        lines += ["", clocks]
    of = {kind: [r for r in results if r["kind"] == kind] for kind in ("test", "kernel", "host", "step", "failure")}
    if of["test"]:
        lines += ["", "## Tests", "", *(f"- `{r['what']}`: {r['outcome']} ({r['took']:g} s)" for r in of["test"])]
    if of["kernel"]:
        head = ("x", "dtype", "layout", "what", "copy", "kafops", "time (p20 to p80)", "of copy", f"{SILU}, of copy")
        lines += ["", "## Kernels", "", *_table([head, *(row for r in of["kernel"] for row in _kernel_rows(r))])]
    if of["host"]:
        lines += ["", "## The host's part of a call", "", *_layers(of["host"])]
    if of["step"]:
        lines += ["", "## Training steps", "", *_layers(of["step"])]
    if of["failure"]:
        lines += ["", "## Failed", "", *(f"- {r['what']}: {r['failed'][FAILURE]}" for r in of["failure"])]
    return "\n".join(lines) + "\n"


def _layers(records: Sequence[Record]) -> list[str]:
    return _table([("", *_LAYERS), *((_where(r), *(_layer_cell(r, name) for name in _LAYERS)) for r in records)])


def _clocks(results: Iterable[Record]) -> str:
    units = {"sm_mhz": ("SM clock", "MHz"), "memory_mhz": ("memory clock", "MHz"), "power_w": ("power", "W"),
             "temperature_c": ("temperature", "°C")}  # fmt: skip
    texts = []
    for name, (title, unit) in units.items():
        seen = [v for r in results if (v := (r.get("clocks") or {}).get(name)) is not None]
        if seen:
            texts.append(f"{title} {min(seen):g} to {max(seen):g} {unit}")
    return f"After the results: {', '.join(texts)}." if texts else ""


def _kernel_rows(r: Record) -> Iterable[tuple[str, ...]]:
    copy = _quantity(r["seconds"][COPY][0]) if COPY in r["seconds"] else r["failed"].get(COPY, "")
    for name, title in BACKENDS.items():
        if name in r["seconds"] or name in r.get("failed", {}):
            cell = _spread(r["seconds"][name]) if name in r["seconds"] else r["failed"][name]
            ours, silu = (f"{s:.2f}" if (s := share(r, n)) else "" for n in (name, SILU))
            shape = ", ".join(map(str, r["shape"]))
            yield f"({shape})", r["dtype"], r["layout"], r["title"], copy, title, cell, ours, silu


def _spread(seconds: Sequence[float]) -> str:
    median, *rest = map(_quantity, seconds)
    return f"{median} ({rest[0]} to {rest[1]})" if rest else median


def _layer_cell(r: Record, name: str) -> str:
    if name not in r["seconds"]:
        return str(r.get("failed", {}).get(name, ""))
    memory = r.get("peak_bytes", {}).get(name)
    more = f", {report.quantity(memory, 'B')}" if memory else ""
    return f"{_spread(r['seconds'][name])}, {_times(r, name):.3f}×{more}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (rows[0], ("---",) * len(rows[0]), *rows[1:])]


# --------------------------------------------------------------------------------------------------------------- README


def readme_section(summaries: Iterable[Summary]) -> str:
    """Return what the README says of GPUs: a table for each."""
    return "\n\n".join(map(_readme_table, summaries)) or "No GPU has been measured yet: `make gpu` does it."


def _readme_table(s: Summary) -> str:
    m = s["machine"]
    large = {
        (r["dtype"], r["layout"], r["title"], name): share(r, name)
        for r in s["results"]
        if r["kind"] == "kernel" and tuple(r["shape"]) == LARGE
        for name in (*BACKENDS, SILU)
        if name in r["seconds"]
    }
    forms = dict.fromkeys((dtype, layout) for dtype, layout, *_ in large)
    subjects = [n for n in (*BACKENDS, SILU) if any(key[-1] == n for key in large)]

    def cell(form: tuple[str, str], name: str) -> str:
        found = [large.get((*form, what, name)) for what in ("forward", "backward of x, alpha")]
        return " / ".join("–" if value is None else f"{value:.2f}" for value in found)

    titles = [BACKENDS.get(name, f"`{name}`") for name in subjects]
    rows = [(f"{dtype}, {layout}", *(cell((dtype, layout), n) for n in subjects)) for dtype, layout in forms]
    text = (
        f"Shares of a copy's speed on an {m['gpu']}, forward / backward of x and α, x {LARGE}, D = 20; measured on "
        f"{m['date']}, commit {m['commit']}, torch {m['torch']}. {_steps(s)}The "
        f"[full table](bench/results/{file_stem(m)}.md) has more."
    )
    return "\n".join([*_table([("x", *titles), *rows]), "", *_wrapped(text)])


def _steps(s: Summary) -> str:
    """Say in words what training steps cost."""
    texts = []
    for r in s["results"]:
        if r["kind"] == "step" and RELU in r["seconds"] and len(r["seconds"]) > 1:
            others = ", ".join(f"{_times(r, n):.2f} with {n}" for n in _LAYERS if n != RELU and n in r["seconds"])
            texts.append(f"A training step ({_where(r)}) takes {others} times that with {RELU}. ")
    return texts[0] if texts else ""


def _wrapped(text: str, width: int = 120) -> list[str]:
    lines = [""]
    for word in re.findall(r"`[^`]*`\S*|\S+", text):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def with_section(readme: str, section: str) -> str:
    """Return a README's text with the section between its markers.

    Raises:
        UserError: the pair of markers is not there.
    """
    start, end = MARKERS
    before, found_start, rest = readme.partition(start)
    _, found_end, after = rest.partition(end)
    if not found_start or not found_end:
        raise UserError(f"README.md has no pair of markers {start} and {end}, between which the GPU table goes")
    return f"{before}{start}\n\n{section}\n\n{end}{after}"


def committed() -> list[Summary]:
    """Return the summaries in bench/results that are of GPUs."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    return [s for s in found if s.get("format") == FORMAT]


def write_readme() -> None:
    """Write the README's GPU section anew from all committed results of GPUs."""
    files.write_text(README, with_section(README.read_text(encoding="utf-8"), readme_section(committed())))


def write(summary: Summary) -> list[Path]:
    """Write a run's JSON, its page and the README's table; return the files' paths."""
    data, page = (RESULTS / f"{file_stem(summary['machine'])}.{kind}" for kind in ("json", "md"))
    write_json(data, summary)
    files.write_text(page, markdown(json.loads(data.read_text(encoding="utf-8"))))
    write_readme()
    return [data, page, README]


def file_stem(facts: dict[str, Any]) -> str:
    """Return a file name for a GPU: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-")
