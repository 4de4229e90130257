"""What one benchmark found: ratio, times or bytes, error."""

from dataclasses import dataclass
from typing import Any

from bench.paired import Spread, ratios, spread


@dataclass(frozen=True)
class Result:
    """One row: medians with spread, in seconds per call or in bytes; ratio is candidate / baseline."""

    key: str
    what: str
    baseline_name: str
    limit: float | None  # the ratio that the target allows
    unit: str  # "s" or "B"
    ratio: Spread
    candidate: Spread
    baseline: Spread
    bytes_moved: int | None = None
    share_of_copy: Spread | None = None  # bandwidth of the candidate / that of the copy in the same round
    error: float | None = None
    baseline_error: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target, None where there is none."""
        return None if self.limit is None else self.ratio.median <= self.limit

    @property
    def inverse(self) -> bool:
        """Whether the ratio is better said the other way round: so many times faster."""
        return (self.limit or self.ratio.median) < 1


def analyse(entry: dict[str, Any]) -> Result:
    """Make a row of what one benchmark recorded (the `extra_info` of pytest-benchmark's JSON)."""
    calls = entry["calls"]
    candidate, baseline = ([value / calls for value in entry[name]] for name in ("candidate", "baseline"))
    share = None
    if entry.get("bytes_moved"):
        copy = [seconds / entry["copy_bytes"] for seconds in entry["copy"]]
        share = ratios(copy, [seconds / entry["bytes_moved"] for seconds in candidate])
    return Result(
        **{name: entry[name] for name in ("key", "what", "baseline_name", "limit", "unit")},
        ratio=ratios(candidate, baseline),
        candidate=spread(candidate),
        baseline=spread(baseline),
        bytes_moved=entry.get("bytes_moved"),
        share_of_copy=share,
        error=entry.get("error"),
        baseline_error=entry.get("baseline_error"),
    )
