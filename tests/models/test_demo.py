import io
import json
import os
import signal
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest
import torch

from models import demo, figures
from models.cli import main
from models.demo import LABELS, Demo, Settings
from models.evaluation import Accuracy
from models.figures import accuracy, cost
from models.reports import demo_report
from models.study import plan
from models.training import Trainer

ROOT = Path(__file__).parents[2]
TINY = "--epochs 2 --width 2 --train 40 --test 20 --batch-size 16 --pgd-steps 2 --no-compile".split()  # noqa: SIM905


def run(out: Path, *arguments: str) -> int:
    return main(["demo", "--out", str(out), *TINY, *arguments])


def metrics(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "demo"
    assert run(out) == 0
    return out


def test_writes_everything(finished: Path) -> None:
    for name in ("metrics.json", "report.html", "curves.png", "accuracy.png", "cost.png", "step_cost.json"):
        assert (finished / name).stat().st_size > 0
    content = metrics(finished)
    assert content["settings"] == {
        "seed": 0, "epochs": 2, "width": 2, "train": 40, "test": 20,
        "batch_size": 16, "lr": None, "eps": 0.2, "pgd_steps": 2,
    }  # fmt: skip
    assert content["environments"][0]["torch"] == torch.__version__
    assert content["command"].startswith("python -m models demo --out")
    assert set(content["results"]) == set(content["timings"]) == set(LABELS)
    for result in content["results"].values():
        assert 0 <= result["robust"]["correct"] <= result["clean"]["correct"] <= result["clean"]["total"] == 20
        assert result["clean"]["accuracy"] == result["clean"]["correct"] / 20
        assert result["clean"]["interval"] == list(Accuracy(result["clean"]["correct"], 20).interval)
        assert [epoch["epoch"] for epoch in result["history"]] == [1, 2]
        assert "seconds" not in json.dumps(result)


@pytest.mark.parametrize("name", ["curves", "accuracy", "cost"])
def test_figures_show_something(finished: Path, name: str) -> None:
    picture = matplotlib.image.imread(finished / f"{name}.png")
    assert picture.shape[1] > 1000
    assert picture[..., :3].std() > 0.05


def test_a_second_call_redoes_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = metrics(finished)
    stamps = {p: p.stat().st_mtime_ns for p in finished.glob("*/*")}
    for owner, name in ((Trainer, "run"), (demo, "evaluate_attack"), (demo.step_cost, "measure")):
        monkeypatch.setattr(owner, name, lambda *a, **k: pytest.fail("done again"))
    assert run(finished) == 0
    assert metrics(finished) == before
    assert {p: p.stat().st_mtime_ns for p in finished.glob("*/*")} == stamps


def test_interrupted_twice_gives_the_same_numbers(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    step, taken = Trainer._step, []

    def interrupted(self: Trainer, *batch: object) -> bool:
        stopping = step(self, *batch)
        taken.append(1)
        if len(taken) in (2, 7):
            os.kill(os.getpid(), signal.SIGINT)
        return stopping

    monkeypatch.setattr(Trainer, "_step", interrupted)
    for extra in ("--restart", "--no-compile"):  # the way to go on must not be a restart
        assert run(out, extra) == 130
        hint = capsys.readouterr().err
        assert f"to go on: python -m models demo --out {out}" in hint
        assert "--restart" not in hint
    assert run(out) == 0
    assert len(taken) == 3 * 2 * 2  # networks, epochs, batches: no step was taken twice
    assert metrics(out)["results"] == metrics(finished)["results"]


def test_interrupted_evaluation_does_not_train_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(epochs=1, width=1, train=10, test=10, batch_size=10, pgd_steps=1)
    run = Demo(tmp_path, settings, restart=False, compiled=False, command="")

    def ctrl_c(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "evaluate_attack", ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            run.run()
    steps: list[Trainer] = []
    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, *batch: (steps.append(self), step(self, *batch))[1])
    Demo(tmp_path, settings, restart=False, compiled=False, command="").run()
    assert len(steps) == 2  # SiLU and KAF, one batch each


def test_rates_are_those_that_were_chosen(finished: Path) -> None:
    chosen = json.loads((ROOT / "results/demo/tuned.json").read_text())["rates"]["resnet20"]
    assert chosen == demo.RATES
    assert metrics(finished)["rates"] == chosen
    for name, rates in chosen.items():
        saved = json.loads((finished / name / "run.json").read_text())["settings"]["training"]
        assert {n: saved[n] for n in rates} == rates


def test_rates_were_chosen_for_the_demo() -> None:
    """All but the number of images held out is the same."""
    study = plan.load("demo").with_tuned({"resnet20": demo.RATES})
    tuned = {run.activation: run.settings for run in study.at(plan.TUNED, Settings.seed)}
    assert tuned.keys() == LABELS.keys()
    for name, settings in tuned.items():
        wanted = Settings().of(name)
        assert replace(settings, data=wanted.data) == wanted
        images = settings.data.replace("validation=500", f"validation={Settings().held_out}")
        assert sorted(images.split(",")) == sorted(wanted.data.split(","))


def test_one_rate_for_all() -> None:
    for name in LABELS:
        training = Settings(lr=0.3).of(name).training
        assert (training.lr, training.activation_lr) == (0.3, 1.0)


def test_other_settings_are_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = metrics(finished)
    assert run(finished, "--seed", "1") == 1
    assert "seed is 0 there and 1 here" in capsys.readouterr().err
    assert metrics(finished) == before


class Balanced(HTMLParser):
    """Checks that tags are closed in order, and collects images and links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_one_whole_page(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    page = Balanced()
    page.feed(text)
    assert page.open == []
    assert len(page.sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    content = metrics(finished)
    for result in content["results"].values():
        assert f"{result['clean']['accuracy']:.1%}" in text
    assert content["environments"][0]["torch"] in text
    assert "32 MNIST images, watched on 8 and tested on 20 others" in " ".join(text.split())
    assert 'name="viewport"' in text


def test_report_and_figure_of_a_step_cost_without_compiler(finished: Path) -> None:
    content = metrics(finished)
    content["step_cost"]["implementations"]["compiled"] = {"error": "InvalidCxxCompiler: <none> found"}
    drawing = cost.draw(content["step_cost"])
    text = demo_report.page(content, LABELS, dict.fromkeys(("accuracy", "curves", "cost"), drawing))
    assert "torch.compile of plain PyTorch could not be measured: InvalidCxxCompiler: &lt;none&gt; found" in text


@pytest.mark.parametrize(("slowest", "warned"), [(2.0, False), (40.0, True)])
def test_report_says_when_the_machine_was_busy(finished: Path, slowest: float, warned: bool) -> None:
    content = metrics(finished)
    for result in content["step_cost"]["implementations"].values():
        result["spread_seconds"] = [1.0, slowest]
    text = demo_report.page(content, LABELS, dict.fromkeys(("accuracy", "curves", "cost"), b""))
    assert ("differ up to 40-fold" in text) is warned
    assert ("The machine was busy" in text) is warned


def test_figures_are_reproducible() -> None:
    marks = [{"accuracy": 0.99, "interval": (0.95, 1.0)}, {"accuracy": 0.0, "interval": (0.0, 0.04)}]
    panels = [accuracy.Panel("", "accuracy", [accuracy.Row("ReLU", figures.style.GREY, marks)])]
    first = accuracy.rows(panels)
    assert first == accuracy.rows(panels)
    assert matplotlib.image.imread(io.BytesIO(first)).shape[2] == 4
