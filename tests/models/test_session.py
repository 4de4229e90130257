import dataclasses
import json
from pathlib import Path

import pytest
import torch

from models.runs import RunError, lr_range, session, trained
from models.runs.settings import Settings
from models.support.errors import UserError
from models.training import Recipe
from models.training.trainer import TrainingError

SETTINGS = Settings(
    "mnist5k:train=120,test=40,validation=40",
    "light:width=4,dense=8,patch=4",
    "kaf_silu",
    Recipe(2, 16, 0.05, method="fast", eps=0.1, watch_steps=2),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    session.prepare(SETTINGS, folder).run()
    return folder


def test_run_json_has_every_setting_versions_and_commit(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    assert Settings.from_dict(record["settings"]) == SETTINGS
    environment = record["environments"][0]
    assert environment["torch"] == torch.__version__
    assert {"kafops", "python", "packages", "processor", "threads", "backend", "commit"} <= set(environment)


def test_a_trained_network_is_read_back(run: Path) -> None:
    trainer = session.prepare(SETTINGS, run)
    assert trainer.finished
    latest = trained.load(run, "latest")
    x, _ = latest.data.test.tensors(8)
    trainer.model.eval()
    assert torch.equal(latest.model(x), trainer.model(x))
    assert not latest.model.training
    assert latest.settings == SETTINGS.as_dict()
    best = trained.load(run)
    held_out = trainer.watch.look(best.model, torch.device("cpu"))
    assert held_out.robust == max(record.robust for record in trainer.history)


def test_the_average_is_read_back_where_there_is_one(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, training=dataclasses.replace(SETTINGS.training, ema=0.8, epochs=1))
    trainer = session.prepare(settings, tmp_path / "run")
    trainer.run()
    x, _ = trainer.source.tensors(8)
    assert torch.equal(trained.load(tmp_path / "run", "latest").model(x), trainer.result.eval()(x))
    assert not torch.equal(trainer.result(x), trainer.model.eval()(x))


def test_a_restart_that_is_refused_costs_nothing(run: Path) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    (run / "mine.png").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"sharded among several processes, and there is one; start with torchrun"):
        session.prepare(SETTINGS, run, restart=True, shard=True)
    assert all(p.read_bytes() == content for p, content in before.items())
    with pytest.raises(UserError, match="no light:patch=5 with kaf_silu for"):
        session.prepare(dataclasses.replace(SETTINGS, network="light:patch=5"), run, restart=True)
    assert all(p.read_bytes() == content for p, content in before.items())
    (run / "mine.png").unlink()


def test_a_restart_removes_what_such_a_run_writes_and_nothing_else(tmp_path: Path) -> None:
    session.prepare(SETTINGS, tmp_path / "run").run()
    for name in ("mine.png", "evaluation/notes.txt"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("precious")
    session.prepare(SETTINGS, tmp_path / "run", restart=True)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"run.json", "mine.png", "evaluation", "curves"}
    assert not list((tmp_path / "run/curves").iterdir())
    assert (tmp_path / "run/evaluation/notes.txt").exists()


def test_a_folder_with_other_settings_or_things_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="network is light:width=4,dense=8,patch=4 there and vgg here"):
        session.prepare(dataclasses.replace(SETTINGS, network="vgg"), run)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="holds files of something else"):
        session.prepare(SETTINGS, tmp_path, restart=True)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, r"holds no run: there is no run\.json"),
        (lambda p: (p / "run.json").write_text("{"), "not valid JSON"),
        (lambda p: (p / "run.json").write_text('{"format": 1, "settings": {"seed": 0}}'), "has no data, network"),
        (
            lambda p: (p / "run.json").write_text(json.dumps({"format": 1, "settings": SETTINGS.as_dict()})),
            r"has no best\.safetensors; it has not finished an epoch",
        ),
    ],
)
def test_no_run_to_load(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path)
    with pytest.raises(RunError, match=message):
        trained.load(tmp_path)


def test_settings_survive_json_and_refuse_what_they_do_not_know() -> None:
    values = json.loads(json.dumps(SETTINGS.as_dict()))
    assert Settings.from_dict(values) == SETTINGS
    with pytest.raises(ValueError, match=r"unknown setting 'epoch'.*did you mean epochs"):
        Settings.from_dict({**values, "training": {**values["training"], "epoch": 3}})
    for wrong in ({"epochs": 1.5}, {"nesterov": "no"}, {"clip": "none"}, {"epochs": True}):
        with pytest.raises(ValueError, match=f"setting '{next(iter(wrong))}' must be"):
            Settings.from_dict({**values, "training": {**values["training"], **wrong}})
    with pytest.raises(ValueError, match="settings lack network"):
        Settings.from_dict({k: v for k, v in values.items() if k != "network"})
    with pytest.raises(ValueError, match=r"unknown activation 'kaff'.*did you mean kaf"):
        dataclasses.replace(SETTINGS, activation="kaff")


def test_tensorboard_events_hold_the_history(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = session.prepare(SETTINGS, tmp_path / "run")
    write, close = session.tensorboard(tmp_path / "run", 0)
    trainer.run(on_epoch=write)
    close()
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    robust = [(e.step, e.value) for e in events.Scalars("held out/robust accuracy")]
    assert robust == [(r.epoch, pytest.approx(r.robust)) for r in trainer.history]


def test_range_test_finds_where_the_loss_falls_and_diverges() -> None:
    settings = dataclasses.replace(SETTINGS, training=dataclasses.replace(SETTINGS.training, method="standard"))
    seen: list[float] = []
    found = lr_range.run(settings, 1e-3, 1e3, 200, on_step=lambda rate, loss: seen.append(rate))
    assert found.rates == tuple(seen)
    assert found.rates[0] == pytest.approx(1e-3)
    assert found.rates[1] / found.rates[0] == pytest.approx(1e6 ** (1 / 199))
    assert found.diverged
    assert found.rates[-1] < 1e3
    assert found.low <= found.high < found.rates[-1]
    assert min(found.smoothed) == found.smoothed[found.rates.index(found.high)] < 0.97 * found.losses[0]
    flat = lr_range.run(settings, 1e-9, 1e-8, 10)
    assert (flat.low, flat.high, flat.diverged) == (None, None, False)
    assert flat.verdict.startswith("The loss never fell in 10 steps, and it did not diverge. Give more --steps")
    with pytest.raises(TrainingError, match="diverges at learning rate 100000 already"):
        lr_range.run(settings, 1e5, 1e6, 10)
