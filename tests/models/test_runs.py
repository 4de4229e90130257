from pathlib import Path

import pytest

from models.runs import RunError, RunFolder

OUTPUTS = ("metrics.json", "*.png", "relu/latest.safetensors")


def start(path: Path, restart: bool = False, **settings: float) -> RunFolder:
    return RunFolder.open(path, settings, restart, OUTPUTS)


def fill(path: Path) -> None:
    (path / "relu").mkdir()
    for name in ("metrics.json", "a.png", "relu/latest.safetensors", "relu/notes.txt", "mine.txt"):
        (path / name).write_text("x")


def test_same_settings_continue(tmp_path: Path) -> None:
    start(tmp_path / "a" / "b", seed=1)
    fill(tmp_path / "a" / "b")
    start(tmp_path / "a" / "b", seed=1)
    assert (tmp_path / "a" / "b" / "metrics.json").exists()


def test_other_settings_are_refused_by_name_and_nothing_is_lost(tmp_path: Path) -> None:
    start(tmp_path, seed=1, epochs=5, lr=0.2)
    fill(tmp_path)
    with pytest.raises(RunError, match=r"epochs is 5 there and 6 here, lr is 0\.2 there and 0\.1 here\. .*--restart"):
        start(tmp_path, seed=1, epochs=6, lr=0.1)
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 6


def test_restart_discards_the_outputs_and_nothing_else(tmp_path: Path) -> None:
    start(tmp_path, seed=1)
    fill(tmp_path)
    start(tmp_path, restart=True, seed=2)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"run.json", "mine.txt", "relu/notes.txt"}
    start(tmp_path, seed=2)


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, restart: bool) -> None:
    fill(tmp_path)
    with pytest.raises(RunError, match="holds files of something else"):
        start(tmp_path, restart, seed=1)
    assert (tmp_path / "metrics.json").exists()


def test_a_file_or_a_broken_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is a file, not a folder"):
        start(tmp_path / "file", seed=1)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match="not valid JSON"):
        start(tmp_path, seed=1)
    (tmp_path / "run.json").write_text('{"format": 1}')
    with pytest.raises(RunError, match="another version"):
        start(tmp_path, seed=1)
    (tmp_path / "run.json").write_text('{"format": 99}')
    with pytest.raises(RunError, match="another version"):
        start(tmp_path, seed=1)


def test_environments_are_kept_once_each(tmp_path: Path) -> None:
    folder = start(tmp_path, seed=1)
    for version in ("1", "1", "2"):
        folder.note_environment({"torch": version})
    assert start(tmp_path, seed=1).environments == [{"torch": "1"}, {"torch": "2"}]
