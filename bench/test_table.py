"""Times every row of the table. `make bench` runs this under pytest-benchmark and reports from its JSON."""

from typing import Any

import pytest
import torch

from bench import problems, table
from bench.paired import repeated, take_turns
from bench.table import Row

QUICK_ROUNDS = 3


@pytest.mark.parametrize("row", [*table.TARGETS, *table.CONTEXT], ids=lambda row: row.key.replace(" ", "_"))
def test_time(row: Row, benchmark: Any, request: pytest.FixtureRequest) -> None:
    pair = row.make()
    rounds = min(row.rounds, QUICK_ROUNDS) if request.config.getoption("--quick") else row.rounds
    source = torch.randn(problems.SHAPE)
    target = torch.empty_like(source)
    seconds = take_turns(
        benchmark,
        repeated(pair.candidate, pair.calls),
        repeated(pair.baseline, pair.calls),
        lambda: target.copy_(source),
        rounds,
    )
    describe(benchmark, row.key, row.what, row.baseline, row.limit)
    benchmark.extra_info |= {
        "unit": "s",
        "calls": pair.calls,
        "candidate": list(benchmark.stats.stats.data),
        "baseline": seconds["baseline"],
        "copy": seconds["copy"],
        "copy_bytes": 2 * source.nbytes,
        "bytes_moved": pair.bytes_moved,
    }
    if pair.exact is not None:
        exact = pair.exact()
        benchmark.extra_info["error"] = problems.error(pair.candidate(), exact)
        if pair.same_function:
            benchmark.extra_info["baseline_error"] = problems.error(pair.baseline(), exact)


@pytest.mark.parametrize("row", table.BYTES, ids=lambda row: row[0].replace(" ", "_"))
def test_bytes(row: tuple[str, str, str, float], benchmark: Any) -> None:
    measured, allowed = benchmark.pedantic(table.BYTES[row], rounds=1)
    describe(benchmark, *row)
    benchmark.extra_info |= {"unit": "B", "calls": 1, "candidate": [measured], "baseline": [allowed]}


def describe(benchmark: Any, key: str, what: str, baseline: str, limit: float | None) -> None:
    benchmark.extra_info |= {"key": key, "what": what, "baseline_name": baseline, "limit": limit}
