import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import kafops
from models import checkpoints
from models.activations import activation
from models.attacks import fast
from models.checkpoints import CheckpointError
from models.interrupts import Interrupted, StopRequest
from models.networks import resnet20
from models.schedules import step_progress, triangular
from models.training import Recipe, Trainer, TrainingError, epoch_order, parameter_groups

RECIPE = Recipe(epochs=3, batch_size=8, lr=0.05, seed=1, attack=fast(0.1))


def network() -> nn.Module:
    """Batch statistics, a random layer and learned curves: everything that resuming could get wrong."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        kafops.KAF2d(4),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(4 * 16, 2),
    )


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Bright images against dark ones, 20 of them: 3 batches an epoch, the last one smaller."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(20) % 2
    return 0.3 + 0.4 * labels.view(-1, 1, 1, 1) + 0.1 * torch.rand(20, 1, 6, 6, generator=g), labels


def trainer(path: Path, recipe: Recipe = RECIPE) -> Trainer:
    return Trainer(network(), recipe, *images(), path / "latest.safetensors")


def press_ctrl_c_after(steps: int) -> Callable[[Trainer], None]:
    def on_step(trainer: Trainer) -> None:
        if trainer.steps_done == steps:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


def assert_same_state(a: Trainer, b: Trainer) -> None:
    left, right = (checkpoints.load(t.checkpoint) for t in (a, b))
    assert left[0].keys() == right[0].keys()
    for name in left[0]:
        assert torch.equal(left[0][name], right[0][name]), name
    for record in (left[1], right[1]):
        for epoch in record["history"]:
            del epoch["seconds"]
    assert left[1] == right[1]


@pytest.mark.parametrize("stops", [(1,), (3,), (5,), (2, 4, 8)])
def test_resumed_training_has_the_same_bits(tmp_path: Path, stops: tuple[int, ...]) -> None:
    whole = trainer(tmp_path / "whole")
    whole.run()
    for stop in stops:
        torch.manual_seed(99 + stop)  # what the program did in between must not matter
        part = trainer(tmp_path / "parts")
        part.resume()
        with pytest.raises(Interrupted):
            part.run(press_ctrl_c_after(stop))
        assert part.steps_done == stop
    last = trainer(tmp_path / "parts")
    assert last.resume()
    last.run()
    assert_same_state(whole, last)


def test_resuming_a_finished_training_does_nothing(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    first.run()
    again = trainer(tmp_path)
    again.resume()
    again.run(lambda trainer: pytest.fail("trained again"))
    assert again.history == first.history


def test_without_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert trainer(tmp_path).resume() is False


def test_training_learns_and_records(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=8)
    run = trainer(tmp_path, recipe)
    run.run()
    assert [record.epoch for record in run.history] == list(range(1, 9))
    assert run.history[-1].loss < 0.5 * run.history[0].loss
    assert run.history[-1].accuracy > 0.9
    assert run.history[2].lr == pytest.approx(triangular(step_progress(8, 24), recipe.lr))
    assert run.steps_done == run.steps == 24


def test_global_generator_is_left_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    state = torch.get_rng_state()
    run.run()
    assert torch.equal(torch.get_rng_state(), state)


def test_epoch_order_is_a_function_of_seed_and_epoch() -> None:
    assert sorted(epoch_order(50, 3, 2).tolist()) == list(range(50))
    assert torch.equal(epoch_order(50, 3, 2), epoch_order(50, 3, 2))
    assert not torch.equal(epoch_order(50, 3, 2), epoch_order(50, 3, 3))
    assert not torch.equal(epoch_order(50, 3, 2), epoch_order(50, 4, 2))


def test_only_weights_of_convolutions_and_linear_layers_decay() -> None:
    model = resnet20(activation("kaf"), 2, seed=0)
    decaying, others = parameter_groups(model, 5e-4)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decaying["weight_decay"] == 5e-4
    assert others["weight_decay"] == 0
    wanted = {name for name in names.values() if "conv" in name or name in ("stem.weight", "classifier.weight")}
    assert {names[id(p)] for p in decaying["params"]} == wanted
    assert {names[id(p)] for p in others["params"]} == set(names.values()) - wanted


def test_nan_loss_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    run = trainer(tmp_path)

    def spoil(trainer: Trainer) -> None:
        if trainer.steps_done == 4:
            nn.init.constant_(trainer.model[5].weight, float("nan"))

    with pytest.raises(
        TrainingError, match=r"loss became nan in epoch 2, batch 2 of 3, at learning rate 0\.05.*epoch 2"
    ):
        run.run(spoil)
    fresh = trainer(tmp_path)
    fresh.resume()
    assert fresh.epoch == 1
    assert all(p.isfinite().all() for p in fresh.model.parameters())


def test_failed_save_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path)
    run.run()
    before = run.checkpoint.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    nn.init.zeros_(run.model[5].weight)
    with pytest.raises(CheckpointError, match=r"No space left on device.*previous checkpoint there is intact"):
        run.save()
    assert run.checkpoint.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["latest.safetensors"]


def test_checkpoint_of_another_recipe_or_network_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    with pytest.raises(CheckpointError, match="another recipe"):
        trainer(tmp_path, dataclasses.replace(RECIPE, lr=0.1)).resume()
    other = Trainer(nn.Sequential(nn.Flatten(), nn.Linear(36, 2)), RECIPE, *images(), tmp_path / "latest.safetensors")
    with pytest.raises(CheckpointError, match="of another network"):
        other.resume()


def test_second_ctrl_c_acts_at_once_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
