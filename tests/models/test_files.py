"""JSON as it is written: the same values, a record a line."""

import json
from pathlib import Path

import pytest

from models.support.files import as_json, file_name, write_result

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
    with pytest.raises(TypeError, match="names in JSON must be strings, got 0"):
        as_json({0: "x" * 200, "y": 1})


def test_names_of_files_are_those_that_every_shell_takes() -> None:
    assert file_name("my net, w=4-fast ε=1/255-relu-0") == "my_net_w_4-fast_eps_1_255-relu-0"


def test_what_is_committed_has_a_line_for_each_record_and_seven_digits(tmp_path: Path) -> None:
    measure = {"values": [0.1234567890123] * 30, "mean": 1 / 3, "tuple": (2e-7 / 3, 5)}
    write_result(tmp_path / "a.json", {"networks": {"a": measure, "b": measure, "c": measure}, "n": 123456789})
    text = (tmp_path / "a.json").read_text()
    assert [line.strip()[:4] for line in text.splitlines()] == ["{", '"net', '"a":', '"b":', '"c":', "},", '"n":', "}"]
    rounded = {"values": [0.1234568] * 30, "mean": 0.3333333, "tuple": [6.666667e-8, 5]}
    assert json.loads(text) == {"networks": dict.fromkeys("abc", rounded), "n": 123456789}
