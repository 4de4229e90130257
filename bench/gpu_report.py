"""Turns what was measured on a GPU into a small JSON summary, a Markdown page, and the GPU table of the README.

A record is what `bench.gpu` measured of one row: for every subject and round the Spread of its times. The ratio of two
subjects is formed round by round, of medians of neighbours; its spread is that of the rounds.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import gpu_table, report
from bench.gpu_table import Case
from bench.paired import Spread, ratios, spread
from models import files
from models.errors import UserError

Record = dict[str, Any]  # a line of JSON, see `bench.gpu.measure`
Summary = dict[str, Any]  # {"machine": facts, "rows": one for each case}

FORMAT = "kafops: times on a GPU, 1"  # tells these summaries from others in bench/results
RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
MARKERS = ("<!-- gpu-table -->", "<!-- /gpu-table -->")
NO_CLAIM = (
    "There is no table of GPU times yet: `make gpu`, on a machine with a CUDA device, measures and puts one here."
)
OUT_OF_MEMORY = "out of memory"
COPY = "copy"
BACKENDS = {"cuda": "CUDA C++", "triton": "Triton"}
_README_DTYPES = ("float32", "bfloat16")
_SAME_FUNCTION = {b.name for b in gpu_table.BASELINES if b.same_function}
_PLAIN_NAMES = {  # as the README's table of the CPU names them
    gpu_table.REFERENCE.name: "plain PyTorch",
    gpu_table.COMPILED.name: "plain PyTorch under torch.compile",
    gpu_table.TWO_EXPONENTIALS.name: "a faster formula (two exponentials) under torch.compile",
    **{b.name: f"`{b.name}`" for b in (gpu_table.SILU, gpu_table.RELU, gpu_table.PRELU)},
}


def analyse(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Return what each case's records say, in the order of the table: times, ratios, shares of the copy, memory."""
    latest = {record["key"]: record for record in records}
    found = [latest[row.key] for row in gpu_table.ROWS if row.key in latest]
    cases: dict[Case, dict[str, Any]] = {}
    for record in found:
        case = Case(**{name: _hashable(record[name]) for name in Case.__dataclass_fields__})
        entry = cases.setdefault(
            case,
            {name: record[name] for name in Case.__dataclass_fields__}
            | {"bytes_moved": record["bytes_moved"], "copy": None, "backends": {}, "baselines": {}},
        )
        _add(entry, record)
    return list(cases.values())


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _add(entry: dict[str, Any], record: Record) -> None:
    """Add a record to its case's entry. Times of copy and kafops are those of the first record that has them."""
    times = {name: [Spread(*s) for s in rounds] for name, rounds in record["times"].items()}
    medians = {name: [s.median for s in rounds] for name, rounds in times.items()}

    def about(name: str) -> dict[str, Any]:
        if name in record["failed"]:
            return {"failed": record["failed"][name]}
        return {"seconds": _over_rounds(times[name]), "peak_bytes": record["peak_bytes"][name]}

    if entry["copy"] is None and COPY in times:
        copy = [record["copy_bytes"] / seconds for seconds in medians[COPY]]
        entry["copy"] = {"seconds": _over_rounds(times[COPY]), "bytes_per_second": spread(copy)}
    for backend in record["backends"]:
        ours = entry["backends"].setdefault(backend, about(backend) | {"ratios": {}})
        if COPY in times and backend in times and "share_of_copy" not in ours:
            copy = [seconds / record["copy_bytes"] for seconds in medians[COPY]]
            own = [seconds / record["bytes_moved"] for seconds in medians[backend]]
            ours["share_of_copy"] = ratios(copy, own)
        for baseline in record["baselines"]:
            if backend in times and baseline in times:
                ours["ratios"][baseline] = ratios(medians[backend], medians[baseline])
    for baseline in record["baselines"]:
        entry["baselines"][baseline] = about(baseline)


def _over_rounds(rounds: Sequence[Spread]) -> Spread:
    """Return the median over rounds of each of median, p20 and p80."""
    return Spread(
        *(spread(numbers).median for numbers in zip(*((s.median, s.p20, s.p80) for s in rounds), strict=True))
    )


def clocks(records: Iterable[Record]) -> dict[str, list[float]]:
    """Return the least and the largest value seen after a row, of each clock that was told."""
    seen: dict[str, list[float]] = {}
    for record in records:
        for name, value in (record["clocks"] or {}).items():
            if value is not None:
                seen.setdefault(name, []).append(value)
    return {name: [min(values), max(values)] for name, values in seen.items()}


def summary(facts: dict[str, Any], records: Sequence[Record]) -> Summary:
    """Return what a run found, for programs and for the README."""
    rows = analyse(records)
    measured = {record["key"] for record in records}
    return {
        "format": FORMAT,
        "machine": facts,
        "clocks": clocks(records),
        "rounds": max((len(rounds) for record in records for rounds in record["times"].values()), default=0),
        "measured": len(measured),
        "of": len(gpu_table.ROWS),
        "rows": rows,
    }


def to_json(s: Summary) -> str:
    """Write a summary with one line for each case, numbers to four digits, spreads as [median, p20, p80]."""

    def plain(value: Any) -> Any:
        if isinstance(value, Spread):
            return [plain(v) for v in (value.median, value.p20, value.p80)]
        if isinstance(value, dict):
            return {name: plain(v) for name, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value

    head = {name: value for name, value in s.items() if name != "rows"}
    rows = ",\n".join(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) for row in s["rows"])
    text = json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False)
    return f'{text[: text.rindex("}")].rstrip()},\n "rows": [\n{rows}\n]\n}}\n'


def from_json(text: str) -> Summary:
    """Read what `to_json` has written."""

    def spreads(entry: dict[str, Any], *names: str) -> dict[str, Any]:
        return entry | {name: Spread(*entry[name]) for name in names if name in entry}

    s = json.loads(text)
    for row in s["rows"]:
        row["copy"] = row["copy"] and spreads(row["copy"], "seconds", "bytes_per_second")
        row["baselines"] = {name: spreads(b, "seconds") for name, b in row["baselines"].items()}
        row["backends"] = {
            name: spreads(b, "seconds", "share_of_copy") | {"ratios": spreads(b["ratios"], *b["ratios"])}
            for name, b in row["backends"].items()
        }
    return s


# ------------------------------------------------------------------------------------------------------------- page


def markdown(s: Summary) -> str:
    """Render the page: the machine, how it was measured, and a table for each mode with a line per case and backend."""
    m = s["machine"]
    lines = [
        f"# Speed of kafops on {m['gpu']}",
        "",
        f"`make gpu` on {m['date']}, commit {m['commit']}: {s['measured']} of {s['of']} rows measured.",
        "",
        f"- {m['gpu']}, compute capability {m['capability']}, {m['multiprocessors']} multiprocessors, "
        f"{report.quantity(m['memory_bytes'], 'B')} of memory, {report.quantity(m['l2_bytes'], 'B')} of L2 cache",
        f"- driver {m['driver']}, CUDA {m['cuda']}, torch {m['torch']}, triton {m['triton']}, kafops {m['kafops']}, "
        f"Python {m['python']}, {m['system']}, {m['processor']}",
        f"- kafops' own choice here is {m['backend']}; measured: {', '.join(m['backends'])}",
        f"- {_clocks_in_words(s['clocks'])}",
        "",
        _method(s["rounds"]),
    ]
    for mode in gpu_table.MODES:
        rows = [row for row in s["rows"] if row["mode"] == mode]
        if rows:
            lines += ["", f"## {mode[0].upper()}{mode[1:]}", "", *_page_table(rows)]
    return "\n".join(lines) + "\n"


def _clocks_in_words(seen: dict[str, list[float]]) -> str:
    units = {"sm_mhz": ("SM clock", "MHz"), "memory_mhz": ("memory clock", "MHz"), "power_w": ("power", "W"),
             "temperature_c": ("temperature", "°C")}  # fmt: skip
    texts = [f"{units[name][0]} {low:g} to {high:g} {units[name][1]}" for name, (low, high) in seen.items()]
    return f"after the rows: {', '.join(texts)}" if texts else "clocks unknown: nvidia-smi did not tell them"


def _method(rounds: int) -> str:
    return (
        f"x ~ N(0, 1), D = 20, gradients of x and alpha. In each of {rounds} rounds copy, baselines and kafops take "
        "turns, each timed by `triton.testing.do_bench`: CUDA events around every call, the L2 cache flushed before "
        "it. Where the flush, 256 MB written, is over before the host has launched a call (small maps, forward + "
        "backward), the time is the host's. A ratio is kafops / baseline of one round; shown are median, and 20th to "
        "80th percentile over rounds; times are medians over rounds of median, 20th and 80th percentile. *Of copy* is "
        "the bandwidth of kafops, counting the bytes that any implementation must move (forward 2 passes over x, "
        "backward 3 more), as a share of that of a device-to-device copy in the same rounds. *Peak* is the memory "
        "that one call needs beside its inputs. The compiled baselines have rounds of their own."
    )


def _page_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    names = [b.name for b in gpu_table.BASELINES]
    head = ("network", "shape", "dtype", "layout", "copy", "backend", "time (p20 to p80)", "of copy", "peak",
            *(f"/ {name}" for name in names))  # fmt: skip
    lines = [head, ("---",) * len(head)]
    for row in rows:
        shape = ", ".join(map(str, row["shape"]))
        copy = f"{report.quantity(row['copy']['bytes_per_second'].median, 'B')}/s" if row["copy"] else OUT_OF_MEMORY
        for backend, ours in row["backends"].items():
            lines.append(
                (row["network"], f"({shape})", row["dtype"], row["layout"], copy, backend,
                 *_own_cells(ours), *(ratio(row, backend, name) for name in names))
            )  # fmt: skip
    return [f"| {' | '.join(line)} |" for line in lines]


def _own_cells(ours: dict[str, Any]) -> tuple[str, str, str]:
    if "failed" in ours:
        return ours["failed"], "", ""
    t = ours["seconds"]
    time = f"{report.quantity(t.median, 's')} ({report.quantity(t.p20, 's')} to {report.quantity(t.p80, 's')})"
    return time, _share(ours), report.quantity(ours["peak_bytes"], "B")


def _share(ours: dict[str, Any]) -> str:
    return f"{ours['share_of_copy'].median:.0%}" if "share_of_copy" in ours else ""


def ratio(row: dict[str, Any], backend: str, baseline: str) -> str:
    """Say how kafops compares with a baseline on a case, why not if there is no time, or nothing if it is not known."""
    failures = [
        f"{who}{entry['failed']}"
        for who, entry in (("kafops: ", row["backends"].get(backend, {})), ("", row["baselines"].get(baseline, {})))
        if "failed" in entry
    ]
    if failures:
        return failures[0]
    r = row["backends"].get(backend, {"ratios": {}})["ratios"].get(baseline)
    return "" if r is None else report.ratio(r, "s", baseline in _SAME_FUNCTION and r.median < 1)


# ----------------------------------------------------------------------------------------------------------- README


def readme_section(summaries: Iterable[Summary]) -> str:
    """Return what the README says of GPUs: a table for each, or that there is none."""
    return "\n\n".join(map(_readme_table, summaries)) or NO_CLAIM


def _readme_table(s: Summary) -> str:
    m = s["machine"]
    network = next(iter(gpu_table.LARGEST))
    shape = gpu_table.LARGEST[network]
    rows = {
        (row["mode"], row["dtype"]): row
        for row in s["rows"]
        if tuple(row["shape"]) == shape and row["layout"] == "contiguous"
    }
    columns = [(backend, dtype) for backend in m["backends"] for dtype in _README_DTYPES]
    lines = [
        ("kafops", "against", *(f"{BACKENDS[backend]}, {dtype}" for backend, dtype in columns)),
        ("---",) * (2 + len(columns)),
    ]

    def line(mode: str, against: str, cell: Callable[[dict[str, Any], str], str]) -> None:
        cells = [cell(rows[mode, dtype], backend) if (mode, dtype) in rows else "" for backend, dtype in columns]
        lines.append((mode, against, *cells))

    def against(baseline: str) -> Callable[[dict[str, Any], str], str]:
        return lambda row, backend: ratio(row, backend, baseline)

    for mode in gpu_table.MODES:
        line(mode, "bandwidth of a copy", lambda row, backend: _share(row["backends"].get(backend, {})))
        for b in gpu_table.BASELINES:
            line(mode, _PLAIN_NAMES[b.name], against(b.name))
    text = (
        f"Ratios of times on an {m['gpu']} (driver {m['driver']}, torch {m['torch']}), medians of rounds in which all "
        f"take turns, with the 20th and 80th percentile; x is {shape}, the largest map of a {network}, D = 20. The "
        "command is `make gpu`; it writes the "
        f"[full table](bench/results/{file_stem(m)}.md) with the maps of three networks, times, memory and clocks."
    )
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", *_wrapped(text)])


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
    texts = [path.read_text(encoding="utf-8") for path in sorted(RESULTS.glob("*.json"))]
    return [from_json(text) for text in texts if json.loads(text).get("format") == FORMAT]


def write_readme() -> None:
    """Write the README's GPU section anew from all committed results of GPUs."""
    files.write_text(README, with_section(README.read_text(encoding="utf-8"), readme_section(committed())))


def write(facts: dict[str, Any], records: Sequence[Record], unfinished: Path) -> list[Path]:
    """Write page and summary of a run, and the README's table where the run is a result; return the files' paths.

    A run is a result when it has the table's first rows; else its files go to the folder `unfinished`.
    """
    s = summary(facts, records)
    is_result = {row.key for row in gpu_table.FIRST_ROWS} <= {record["key"] for record in records}
    stem = (RESULTS if is_result else unfinished) / file_stem(facts)
    pages = {stem.with_suffix(".json"): to_json(s), stem.with_suffix(".md"): markdown(s)}
    for path, text in pages.items():
        files.write_text(path, text)
    if is_result:
        write_readme()
    return [*pages, *([README] if is_result else [])]


def file_stem(facts: dict[str, Any]) -> str:
    """Return a file name for a GPU: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-")
