"""JSON as it is written: the same values, a record a line."""

import json

import pytest

from models.support.files import as_json

RECORDS = [{"epoch": n, "loss": 0.1 * n, "inner": {"a": [1, 2], "b": None}} for n in range(4)]


def test_a_record_is_a_line_and_so_is_what_fits_on_one() -> None:
    text = as_json({"settings": {"lr": 0.1, "ε": "8/255"}, "runs": RECORDS, "flat": list(range(100))})
    lines = text.split("\n")
    assert lines[:3] == ["{", ' "settings": {"lr": 0.1, "ε": "8/255"},', ' "runs": [']
    assert [json.loads(line.rstrip(",")) for line in lines[3:7]] == RECORDS
    assert lines[7:] == [" ],", f' "flat": {list(range(100))}', "}"]


@pytest.mark.parametrize(
    "value",
    [
        0,
        "a\nb",
        [],
        {},
        [[]] * 60,
        {"a": {"b": RECORDS * 30}},
        [{"long": RECORDS * 30}, *RECORDS],
        {"x" * 200: [0.1, True]},
    ],
)
def test_values_come_back(value: object) -> None:
    text = as_json(value)
    assert json.loads(text) == value
    assert all(len(line) <= 2002 or line.startswith(" [") for line in text.split("\n"))


def test_what_json_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        as_json({"a": [float("nan")]})
