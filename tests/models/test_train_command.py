import json
import os
import re
import signal
from pathlib import Path

import matplotlib.image
import pytest

from models.cli import main
from models.support import checkpoints
from models.training import Trainer

TINY = [
    *("--data", "mnist5k:train=80,test=40,validation=20", "--network", "light:width=2,dense=4,patch=7"),
    *("--activation", "kaf", "--epochs", "2", "--batch-size", "20", "--watch-images", "10", "--watch-steps", "2"),
]


def settings(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())["settings"]


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    return " ".join(capsys.readouterr().err.split())


def test_trains_and_says_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = ["train", str(run), *TINY, "--eps", "51/255", "--clip", "none", "--nesterov", "yes"]
    assert main(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"epoch 2: loss [\d.]+, accuracy [\d.]+%, held out: clean [\d.]+%, robust [\d.]+%", printed)
    assert f"python -m models evaluate {run}" in printed
    assert settings(run)["training"]["eps"] == 0.2
    assert settings(run)["training"]["nesterov"] is True
    assert settings(run)["training"]["method"] == "nfgsm:k=1"  # from the recipe
    names = {p.name for p in run.iterdir()}
    assert names == {"run.json", "latest.safetensors", "best.safetensors", "metrics.jsonl", "tensorboard", "curves"}
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    # Once more there is nothing to do.
    before = (run / "latest.safetensors").read_bytes()
    assert main(command) == 0
    assert (run / "latest.safetensors").read_bytes() == before
    # Fewer settings are other settings: refused, and nothing is lost.
    assert main([*command, "--lr", "0.3"]) == 1
    assert "holds a run with other settings: lr is 0.1 there and 0.3 here." in capsys.readouterr().err
    assert (run / "latest.safetensors").read_bytes() == before
    assert main([*command, "--lr", "0.3", "--restart", "--no-tensorboard"]) == 0
    assert settings(run)["training"]["lr"] == 0.3


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["train", str(run), *TINY, "--no-tensorboard"]
    step = Trainer._step

    def interrupted(trainer: Trainer, *arguments: object) -> bool:
        if trainer.steps_done == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    assert main(command) == 130
    assert f"to go on: python -m models train {run}" in capsys.readouterr().err
    _, record = checkpoints.load(run / "latest.safetensors")
    assert (record["epoch"], record["batch"]) == (1, 0) or (record["epoch"], record["batch"]) == (0, 3)
    monkeypatch.undo()
    assert main(command) == 0
    _, record = checkpoints.load(run / "latest.safetensors")
    assert record["epoch"] == 2


def test_made_up_images_take_the_place_of_the_set(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", str(run), *TINY, "--data", "cifar10", "--network", "light:width=2,dense=4,patch=8",
                 "--fake-data", "--epochs", "1", "--batch-size", "2048", "--no-tensorboard"]) == 0  # fmt: skip
    assert settings(run)["data"] == "fake:like=cifar10"


def test_missing_images_say_where_they_were_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KAFOPS_DATA", raising=False)
    run = tmp_path / "run"
    assert main(["train", str(run), *TINY, "--data", "cifar10", "--data-root", str(tmp_path / "no")]) == 1
    message = capsys.readouterr().err
    assert str(tmp_path / "no") in message
    assert "cifar" in message
    assert not run.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--activation", "kwat"], "unknown activation 'kwat'.*did you mean kwta"),
        (["--activation", "kwta:ration=0.1"], "activation 'kwta' has no option 'ration'.*did you mean ratio"),
        (["--network", "resnet21"], "unknown network 'resnet21'.*did you mean .*resnet20"),
        (["--method", "ngfsm"], "unknown method 'ngfsm'.*did you mean nfgsm"),
        (["--data", "mnist5"], "unknown data set 'mnist5'.*did you mean mnist5k"),
        (["--recipe", "mnist"], "unknown recipe 'mnist'.*did you mean mnist5k"),
        (["--eps", "8/25/5"], "wanted a number such as 0.2 or a fraction such as 51/255, got '8/25/5'"),
        (["--eps", "-0.1"], r"wanted a value in \[0, 1\]"),
        (["--eps", "8"], r"wanted a value in \[0, 1\]"),
        (["--eps", "0"], "method nfgsm:k=1 attacks, so eps must be above 0"),
        (["--precision", "float8"], "precision must be one of"),
        (["--momentum", "1"], r"wanted a number in \[0, 1\)"),
        (["--momentum", "0", "--nesterov", "yes"], "momentum must be above 0 for Nesterov's"),
        (["--schedule", "piecewise:at=99"], r"not inside its \d+ epochs"),
    ],
)
def test_wrong_options_say_what_was_wanted(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message, error_of(["train", str(tmp_path / "run"), *arguments], capsys))
    assert not (tmp_path / "run").exists()


def test_find_lr_writes_a_figure_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["find-lr", str(tmp_path), *TINY, "--steps", "20", "--from", "1e-3", "--to", "1"]) == 0
    assert re.search(
        r"A peak between these, rather the lower, is a good start|The loss never fell in 20 steps",
        " ".join(capsys.readouterr().out.split()),
    )
    found = json.loads((tmp_path / "learning-rate.json").read_text())
    assert found["rates"][0] == pytest.approx(1e-3)
    assert len(found["rates"]) == len(found["losses"]) == len(found["smoothed"])
    assert matplotlib.image.imread(tmp_path / "learning-rate.png")[..., :3].std() > 0.02
    assert "--from must be below --to" in error_of(["find-lr", str(tmp_path), "--from", "2", "--to", "1"], capsys)
