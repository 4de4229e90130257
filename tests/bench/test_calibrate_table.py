"""The table of docs/calibrate.md."""

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
from bench import calibrate


def test_the_table_and_the_figure(tmp_path, capsys):
    figure = tmp_path / "figure.png"
    calibrate.main(["--epochs", "4", "--figure", str(figure)])
    printed = capsys.readouterr().out.splitlines()
    relu = printed[0].split()[1]
    assert float(relu.rstrip("%")) > 80  # of ten classes: it has learned
    rows = {cells[1].strip(): cells[2:5] for line in printed if len(cells := line.split("|")) == 6}
    rows = {name: [cell.strip() for cell in cells] for name, cells in rows.items() if name in calibrate.STARTS}
    assert rows.keys() == calibrate.STARTS.keys()
    assert rows['`base="same"`'][0] == relu  # the same function, beyond the dictionary too
    for converted, calibrated, outside in rows.values():
        before, after = (float(share.rstrip("%")) for share in outside.split(" → "))
        assert after < before
        assert float(calibrated.rstrip("%")) >= float(converted.rstrip("%")) - 1  # 5 of 497 images
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert printed[-1] == str(figure)
