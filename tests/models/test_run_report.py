"""The page about runs: whole, self-contained, and true to the files it is made of."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from models.cli import main
from models.reports import run_report
from models.runs import RunError

TRAINING = [
    *("--network", "light:width=2,dense=4,patch=4", "--data", "mnist5k:train=60,validation=20,test=20"),
    *("--epochs", "2", "--batch-size", "20", "--method", "fgsm", "--eps", "0.1", "--watch-steps", "1"),
    *("--no-tensorboard", "--threads", "1"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with everything done to it, and one that was only trained."""
    folder = tmp_path_factory.mktemp("runs")
    full, bare = folder / "full & <done>", folder / "bare"
    assert main(["train", str(full), "--activation", "kaf_isometric", *TRAINING]) == 0
    assert main(["train", str(bare), "--activation", "relu", *TRAINING, "--seed", "1"]) == 0
    attacks = ["--attacks", "fgsm,pgd-2", "--check-images", "10", "--curves", "--threads", "1"]
    assert main(["evaluate", str(full), *attacks]) == 0
    assert main(["curves", str(full), "--threads", "1"]) == 0
    assert main(["distributions", str(full), "--attack", "pgd-2", "--threads", "1"]) == 0
    assert main(["bounds", str(full), "--images", "5", "--threads", "1"]) == 0
    return full, bare


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects text and what is loaded from elsewhere."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "src":
                self.pictures.append(value or "")
            if name == "href":
                self.links.append(value or "")
        assert tag not in ("script", "link")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_one_run_with_everything(runs: tuple[Path, Path], tmp_path: Path) -> None:
    full, _ = runs
    out = tmp_path / "page.html"
    assert main(["report", str(full), "--out", str(out)]) == 0
    page = Page(out)
    kinds = [picture.partition(";")[0] for picture in page.pictures]
    # Training; attacks and curves; bounds; three of distributions; the strip, the animation and the dictionary.
    assert sorted(kinds) == ["data:image/gif"] + ["data:image/png"] * 9
    assert page.links == []
    evaluation = json.loads((full / "evaluation/evaluation.json").read_text())
    low, high = evaluation["worst_case"]["interval"]
    assert f"{evaluation['worst_case']['accuracy']:.1%} {low:.1%} to {high:.1%}" in page.text
    for check in evaluation["checks"]:
        assert " ".join(check["evidence"].split()) in page.text
    assert evaluation["masking"] in page.text
    bounds = json.loads((full / "bounds/bounds.json").read_text())
    assert f"bound for all images {bounds['upper']:.3g}" in page.text
    lines = [json.loads(line) for line in (full / "metrics.jsonl").read_text().splitlines()]
    assert all(f"{line['loss']:.4f}" in page.text for line in lines)
    assert "full & <done>" in page.text
    assert page.text.count("State “best” of the network.") == 4
    assert "torch" in page.text
    assert "Not there yet" not in page.text


def test_what_is_about_an_earlier_state_says_so(runs: tuple[Path, Path], tmp_path: Path) -> None:
    full, _ = runs
    out = tmp_path / "page.html"
    best = (full / "best.safetensors").read_bytes()
    (full / "best.safetensors").write_bytes((full / "latest.safetensors").read_bytes() + b" ")
    try:
        assert main(["report", str(full), "--out", str(out)]) == 0
    finally:
        (full / "best.safetensors").write_bytes(best)
    text = Page(out).text
    assert "State “best”" not in text
    for part in ("evaluate", "bounds", "distributions", "curves"):
        assert f"trained since: python -m models {part} {full} does it anew" in text


def test_what_is_not_there_yet_is_named_with_its_command(runs: tuple[Path, Path]) -> None:
    _, bare = runs
    assert main(["report", str(bare)]) == 0
    text = Page(bare / "report.html").text
    for command in ("evaluate", "bounds", "distributions"):
        assert f"python -m models {command} {bare}" in text
    assert "relu has no learned curves" in text
    (bare / "report.html").unlink()


def test_several_runs_are_compared(runs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    page = Page(out)
    assert page.links == ["#run0", "#run1"]
    assert 'id="run1"' in out.read_text()
    assert "The runs differ in: activation, seed." in page.text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", "{", "metrics.jsonl is damaged"),
        ("evaluation/evaluation.json", "{", "evaluation.json is not valid JSON"),
        ("evaluation/evaluation.json", '{"clean": 1}', "evaluation.json is of another version; remove it"),
        ("run.json", '{"format": 1, "settings": {"eps": 1}}', "is no training run"),
    ],
)
def test_damaged_files_are_named(
    file: str, content: str, message: str, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    for path in (runs[1] / "run.json", runs[1] / "metrics.jsonl"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(RunError, match=message):
        run_report.read(tmp_path, "broken")


def test_wrong_arguments_write_nothing(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, bare = runs
    assert main(["report", str(tmp_path)]) == 1
    assert "holds no run" in capsys.readouterr().err
    assert main(["report", str(bare), str(bare)]) == 1
    assert "is given twice" in capsys.readouterr().err
    assert main(["report", str(bare), "--out", str(tmp_path)]) == 1
    assert "is a folder; give a file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
