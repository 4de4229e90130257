"""Tables: the same rows in the terminal, as Markdown and in HTML pages, and numbers as they are written in them."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table as RichTable

NONE = "–"
_NUMERIC = (*"0123456789+-−±×∞[*", NONE)
# Of looks in the terminal.
_STYLES = {"inconclusive": "dim", "warning": "yellow", "fail": "red", "bold": "bold", "dim": "dim"}


class Table:
    """Rows of plain text under heads; columns of numbers are aligned on the right.

    A row may have a look: "bold", "dim", or of a verdict "pass", "inconclusive", "warning" or "fail".
    """

    def __init__(self, *heads: str) -> None:
        self.heads = heads
        self.rows: list[tuple[tuple[str, ...], str]] = []

    def add(self, *cells: str, look: str = "") -> None:
        """Add a row."""
        self.rows.append((cells, look))

    @property
    def numeric(self) -> list[bool]:
        """Of each column but the first, whether there are numbers in it."""
        columns = [[row[place] for row, _ in self.rows] for place in range(1, len(self.heads))]
        return [False, *(all(not cell or cell.startswith(_NUMERIC) for cell in column) for column in columns)]

    def terminal(self) -> RichTable:
        """Return the table for a console."""
        table = RichTable(box=None, header_style="bold")
        for place, (head, numeric) in enumerate(zip(self.heads, self.numeric, strict=True)):
            # The end of a name is what tells seeds apart.
            table.add_column(head, justify="right" if numeric else "left", overflow="ellipsis" if place else "fold")
        for cells, look in self.rows:
            table.add_row(*cells, style=_STYLES.get(look))
        return table

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [f"| {' | '.join(cells)} |" for cells in (self.heads, *(cells for cells, _ in self.rows))]
        return "\n".join([lines[0], "|---" * len(self.heads) + "|", *lines[1:]])


def share(value: float | None) -> str:
    """Return a share as in 93.5%."""
    return NONE if value is None else f"{value:.1%}"


def interval(record: Mapping[str, Any]) -> tuple[str, str]:
    """Return an accuracy and its interval, of a record that has these."""
    low, high = record["interval"]
    return share(record["accuracy"]), f"{low:.1%} to {high:.1%}"


def within(record: Mapping[str, Any]) -> str:
    """Return the same in one cell."""
    return "{} ({})".format(*interval(record))


def number(value: float | None, otherwise: str = NONE, form: str = ".3g") -> str:
    """Return a number, by default with three digits, or what stands for None."""
    return otherwise if value is None else format(value, form)


def points(value: float | None, form: str = ".1f") -> str:
    """Return a share in %, without the sign."""
    return NONE if value is None else format(100 * value, form)


def ends(low: float, high: float) -> str:
    """Return an interval of differences of shares in points: [-0.4, +2.8]."""
    return f"[{points(low, '+.1f')}, {points(high, '+.1f')}]"


def signed(difference: Mapping[str, Any]) -> str:
    """Return a difference of shares in points, with its interval where it has one: +1.2 [-0.4, +2.8]."""
    mean, low, high = points(difference["mean"], "+.1f"), difference["low"], difference["high"]
    return mean if low is None else f"{mean} {ends(low, high)}"


def spread(mean: float, std: float | None) -> str:
    """Return a mean share in %, with the standard deviation where there is one: 93.5 ± 1.2."""
    return points(mean) if std is None else f"{points(mean)} ± {points(std)}"


def markdown(parts: Sequence[str]) -> str:
    """Return a page of paragraphs, those left out that are empty."""
    return "\n\n".join(part for part in parts if part) + "\n"


def bullets(sentences: Sequence[str]) -> str:
    """Return a list in Markdown."""
    return "\n".join(f"- {sentence}" for sentence in sentences)
