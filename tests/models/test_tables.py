"""Tables: the same cells in the terminal, as Markdown and in HTML."""

import io

import pytest
from rich.console import Console

from models.reports import html
from models.reports.tables import Table, interval, number, points, share, signed, spread

TABLE = Table("run", "verdict", "accuracy")
TABLE.add("7 & <b>", "pass", "93.5%", look="pass")
TABLE.add("8", "pass, but", "–")


def test_the_terminal_shows_numbers_on_the_right() -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(TABLE.terminal())
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines == [" run      verdict    accuracy", " 7 & <b>  pass          93.5%", " 8        pass, but         –"]


def test_markdown() -> None:
    lines = TABLE.markdown().splitlines()
    assert lines[:3] == ["| run | verdict | accuracy |", "|---|---|---|", "| 7 & <b> | pass | 93.5% |"]


def test_html_is_escaped_and_knows_numbers_and_looks() -> None:
    text = html._TEMPLATES.get_template("parts.html").module.table(TABLE)
    assert '<tr class="pass"><td>7 &amp; &lt;b&gt;</td><td>pass</td><td class="number">93.5%</td></tr>' in text
    assert '<tr><td>8</td><td>pass, but</td><td class="number">–</td></tr>' in text


def test_a_table_without_rows_has_its_heads() -> None:
    assert Table("a", "b").numeric == [False, True]
    assert Table("a", "b").markdown() == "| a | b |\n|---|---|"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (share(0.12345), "12.3%"),
        (share(None), "–"),
        (points(0.1234, ".2f"), "12.34"),
        (number(1234.5), "1.23e+03"),
        (number(None, "∞"), "∞"),
        (spread(0.5, None), "50.0"),
        (spread(0.5, 0.0123), "50.0 ± 1.2"),
        (signed({"mean": 0.01, "low": None, "high": None}), "+1.0"),
        (signed({"mean": 0.01, "low": -0.004, "high": 0.024}), "+1.0 [-0.4, +2.4]"),
        (" ".join(interval({"accuracy": 0.1, "interval": [0.028, 0.301]})), "10.0% 2.8% to 30.1%"),
    ],
)
def test_numbers_as_they_are_written(text: str, wanted: str) -> None:
    assert text == wanted
