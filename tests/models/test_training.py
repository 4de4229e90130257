import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import kafops
from models.data import TensorSource
from models.images import MNIST
from models.networks import build
from models.support import checkpoints
from models.support.checkpoints import CheckpointError
from models.support.interrupts import Interrupted, StopRequest
from models.training import Recipe, Trainer, TrainingError, parameter_groups
from models.training.processes import Processes
from models.training.schedules import SCHEDULES
from models.training.watch import Watch, Watched

RECIPE = Recipe(epochs=3, batch_size=8, lr=0.05, method="fast", eps=0.1, watch_images=6)
RECIPES = {
    "fast": RECIPE,
    "free": dataclasses.replace(RECIPE, method="free:m=2"),
    "trades": dataclasses.replace(RECIPE, method="trades:steps=2"),
    "everything": dataclasses.replace(
        RECIPE, ema=0.9, precision="bfloat16", clip=1.0, label_smoothing=0.1, activation_lr=3.0, nesterov=True
    ),
    "float16": dataclasses.replace(RECIPE, precision="float16"),
}


def network() -> nn.Module:
    """Batch statistics, a random layer and learned curves: everything that resuming could get wrong."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        kafops.KAF2d(4, init="normal"),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(4 * 16, 2),
    )


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Bright images against dark ones, 20 of them: 3 batches an epoch, the last one smaller."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(20) % 2
    return 0.3 + 0.4 * labels.view(-1, 1, 1, 1) + 0.1 * torch.rand(20, 1, 6, 6, generator=g), labels


def trainer(path: Path, recipe: Recipe = RECIPE, model: nn.Module | None = None) -> Trainer:
    x, y = images()
    return Trainer(model or network(), recipe, 1, TensorSource(x, y, 1), (x[:6], y[:6]), path)


def metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


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


@pytest.mark.parametrize(
    ("name", "stops"),
    [("fast", (1,)), ("fast", (3,)), ("fast", (5,)), *((name, (2, 4, 8)) for name in RECIPES)],
)
def test_resumed_training_has_the_same_bits(tmp_path: Path, name: str, stops: tuple[int, ...]) -> None:
    recipe = RECIPES[name]
    whole = trainer(tmp_path / "whole", recipe)
    whole.run()
    for stop in stops:
        torch.manual_seed(99 + stop)  # what the program did in between must not matter
        part = trainer(tmp_path / "parts", recipe)
        part.resume()
        with pytest.raises(Interrupted):
            part.run(press_ctrl_c_after(stop))
        assert part.steps_done == stop
    last = trainer(tmp_path / "parts", recipe)
    assert last.resume()
    last.run()
    assert_same_state(whole, last)
    assert (tmp_path / "whole/best.safetensors").exists()
    for one, other in zip(*(metrics(tmp_path / folder) for folder in ("whole", "parts")), strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


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
    # The 9th of 24 steps is at 9/25 of training, on the way up to the peak at 1/2.
    assert run.history[2].lr == pytest.approx(recipe.lr * 2 * 9 / 25)
    assert run.steps_done == run.steps == 24
    assert metrics(tmp_path) == [dataclasses.asdict(record) for record in run.history]


def test_global_generator_is_left_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    state = torch.get_rng_state()
    run.run()
    assert torch.equal(torch.get_rng_state(), state)


def test_only_weights_of_convolutions_and_linear_layers_decay() -> None:
    model = build("resnet20:width=2", "kaf", MNIST, seed=0)
    decaying, others, curves = parameter_groups(model, 5e-4, activation_lr=2.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decaying["weight_decay"] == 5e-4
    assert others["weight_decay"] == 0
    wanted = {name for name in names.values() if "conv" in name or name in ("stem.weight", "classifier.weight")}
    assert {names[id(p)] for p in decaying["params"]} == wanted
    assert {names[id(p)] for p in curves["params"]} == {name for name in names.values() if name.endswith("alpha")}
    assert curves["weight_decay"] == 0
    assert (decaying["scale"], others["scale"], curves["scale"]) == (1, 1, 2)
    left = set(names.values()) - wanted - {names[id(p)] for p in curves["params"]}
    assert {names[id(p)] for p in others["params"]} == left
    assert all(group["weight_decay"] == 5e-4 for group in parameter_groups(model, 5e-4, "all"))
    linear = parameter_groups(model, 5e-4, "linear")[0]
    assert {names[id(p)] for p in linear["params"]} == {"classifier.weight"}


def test_nan_loss_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    run = trainer(tmp_path)

    def spoil(trainer: Trainer) -> None:
        if trainer.steps_done == 4:
            nn.init.constant_(trainer.model[5].weight, float("nan"))

    with pytest.raises(
        TrainingError, match=r"loss became nan in epoch 2, batch 2 of 3, at learning rate 0\.05.*last state saved"
    ):
        run.run(spoil)
    fresh = trainer(tmp_path)
    fresh.resume()
    assert fresh.epoch == 1
    assert all(p.isfinite().all() for p in fresh.model.parameters())


@pytest.mark.parametrize("steps", [3, 6])
def test_weights_that_the_last_update_breaks_are_not_saved(tmp_path: Path, steps: int) -> None:
    """No loss sees them: at the end of an epoch, or of the training, they would take the place of the good ones."""
    run = trainer(tmp_path, dataclasses.replace(RECIPE, watch_steps=0))

    def spoil(trainer: Trainer) -> None:
        if trainer.steps_done == steps:
            nn.init.constant_(trainer.model[5].weight, float("nan"))

    spoiled = run._end_epoch
    run._end_epoch = lambda: (spoil(run), spoiled())  # type: ignore[method-assign]
    with pytest.raises(
        TrainingError, match=rf"weights are no longer finite after epoch {steps // 3} \(5.weight first of"
    ):
        run.run()
    fresh = trainer(tmp_path, dataclasses.replace(RECIPE, watch_steps=0))
    assert fresh.resume() is (steps == 6)
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
    assert {p.name for p in tmp_path.iterdir()} == {"latest.safetensors", "best.safetensors", "metrics.jsonl", "curves"}


def test_checkpoint_of_another_recipe_or_network_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    with pytest.raises(CheckpointError, match=r"another recipe: lr is 0\.05 there and 0\.1 here"):
        trainer(tmp_path, dataclasses.replace(RECIPE, lr=0.1)).resume()
    other = trainer(tmp_path, model=nn.Sequential(nn.Flatten(), nn.Linear(36, 2)))
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


def test_average_of_the_weights_is_what_is_watched_and_returned(tmp_path: Path) -> None:
    """The average after each step is decay · before + (1 − decay) · weights, and starts at the first step's weights."""
    run = trainer(tmp_path, dataclasses.replace(RECIPE, ema=0.75, epochs=1))
    seen: list[torch.Tensor] = []
    run.run(lambda t: seen.append(t.model[5].weight.detach().clone()))
    average = seen[0]
    for weight in seen[1:]:
        average = 0.75 * average + 0.25 * weight
    torch.testing.assert_close(run.result[5].weight, average)
    assert run.result is not run.model


def test_clip_bounds_the_gradient(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, clip=1e-3, momentum=0.0, weight_decay=0.0, epochs=1, schedule="constant")
    run = trainer(tmp_path, recipe)
    before = [p.detach().clone() for p in run.model.parameters()]
    moves: list[float] = []

    def on_step(t: Trainer) -> None:
        now = [p.detach().clone() for p in t.model.parameters()]
        moves.append(math.sqrt(sum((a - b).square().sum().item() for a, b in zip(now, before, strict=True))))
        before[:] = now

    run.run(on_step)
    # Weights of about 1 have roundings of 1e-7, which is 0.2 % of the moves.
    assert all(move <= recipe.lr * 1e-3 * 1.005 for move in moves)
    assert max(moves) > recipe.lr * 1e-3 * 0.9


def test_activation_parameters_have_their_own_learning_rate(tmp_path: Path) -> None:
    run = trainer(tmp_path, dataclasses.replace(RECIPE, activation_lr=0.5, epochs=1))
    rates: list[list[float]] = []
    run.run(lambda t: rates.append([group["lr"] for group in t.optimizer.param_groups]))
    for weights, rest, activations in rates:
        assert weights == rest
        assert activations == pytest.approx(0.5 * weights)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_stays_near_float32(tmp_path: Path, precision: str) -> None:
    """Half types have 8 and 11 bits; after 3 steps losses differ by less than a few of their roundings."""
    losses = []
    for name in ("float32", precision):
        run = trainer(tmp_path / name, dataclasses.replace(RECIPE, precision=name, epochs=1, method="pgd:steps=2"))
        run.run()
        losses.append(run.history[0].loss)
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert run.scaler.is_enabled() is (precision == "float16")


@pytest.mark.parametrize("method", ["fast", "pgd:steps=2", "trades:steps=2", "gradalign:weight=0.2"])
def test_float16_attacks_work_at_the_scale_that_the_scaler_grows_to(method: str) -> None:
    """The scaler doubles its scale as long as the mean loss's gradient is finite; the attack's must be so too."""
    from torch.nn import functional as F

    from models.training.methods import METHODS, Step
    from models.training.noise import Noise

    model, x = network(), torch.rand(128, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    y = torch.arange(128) % 2
    losses = []
    for scale in (1.0, 2.0**18):
        step = Step(model, model, F.cross_entropy, Noise(torch.Generator().manual_seed(0)), scale)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.float16):
            losses.append(next(METHODS.create(method, 0.2)(step, x, y)).loss.item())
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            torch.manual_seed(0)
            start = F.cross_entropy(model(x).float(), y).item()
    # At scale 1 some gradients round to 0, so the two attacks are alike but not the same.
    assert losses[1] == pytest.approx(losses[0], rel=0.2)
    assert losses[1] > start


def test_set_progress_is_called_with_the_part_done(tmp_path: Path) -> None:
    class Anneal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[float] = []

        def set_progress(self, progress: float) -> None:
            self.seen.append(progress)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = network()
    model.append(Anneal())
    trainer(tmp_path, RECIPE, model).run()
    assert model[-1].seen == [step / 9 for step in range(9)]


def test_collapse_is_seen_and_the_best_state_restored(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=8, watch_drop=0.3)
    run = trainer(tmp_path, recipe)

    def spoil(t: Trainer) -> None:
        if t.epoch == 6:  # the classes change places
            t.model[5].weight.data.mul_(-50)
            t.model[5].bias.data.mul_(-50)

    run.run(spoil)
    assert run.collapsed
    assert run.finished
    last = run.history[-1]
    assert last.collapsed
    assert last.epoch == len(run.history) == 7
    assert last.robust < run.best - 0.3
    weights = run.model.state_dict()
    for name in ("latest", "best"):
        tensors, record = checkpoints.load(tmp_path / f"{name}.safetensors")
        assert record["collapsed"] is (name == "latest")
        assert all(torch.equal(t, weights[n]) for n, t in checkpoints.under("model", tensors).items())
    again = trainer(tmp_path, recipe)
    again.resume()
    again.run(lambda t: pytest.fail("trained on after a collapse"))


def test_without_a_drop_the_watch_only_looks(tmp_path: Path) -> None:
    run = trainer(tmp_path, dataclasses.replace(RECIPE, watch_drop=0.0))
    run.run(lambda t: t.model[5].weight.data.mul_(-1) if t.batch == 3 else None)
    assert not run.collapsed
    assert all(record.robust is not None for record in run.history)


def test_standard_training_keeps_the_best_by_clean_accuracy(tmp_path: Path) -> None:
    run = trainer(tmp_path, dataclasses.replace(RECIPE, method="standard"))
    run.run()
    assert all(record.robust is None for record in run.history)
    assert run.best == max(record.clean for record in run.history)


def test_every_process_needs_an_image_of_the_last_batch(tmp_path: Path) -> None:
    x, y = images()
    with pytest.raises(TrainingError, match="last batch of an epoch has 2 of 20 images, fewer than the 3 processes"):
        Trainer(network(), dataclasses.replace(RECIPE, batch_size=9), 0, TensorSource(x, y, 0), None, tmp_path,
                Processes(0, 3))  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"eps": 1.5}, r"eps must be in \[0, 1\], got 1\.5"),
        ({"eps": 0.0}, "method fast attacks, so eps must be above 0, got 0; or use method=standard"),
        ({"precision": "half"}, "precision must be one of float32, bfloat16, float16, got half"),
        ({"decay": "some"}, "decay must be one of weights, linear, all, got some"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1"),
        ({"momentum": 0.0, "nesterov": True}, "momentum must be above 0 for Nesterov's, got 0"),
        ({"clip": 0.0}, "clip must be above 0, or none, got 0"),
        ({"schedule": "cosinus"}, "unknown schedule 'cosinus'.*did you mean cosine"),
        ({"method": "gradalign", "eps": 0.3}, "authors of GradAlign"),
    ],
)
def test_recipe_refuses_what_makes_no_sense(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPE, **changes)


@pytest.mark.parametrize(
    ("text", "epochs", "wanted"),
    [
        ("triangular", 10, {0: 0, 2.5: 0.5, 5: 1, 7.5: 0.5, 10: 0}),
        ("triangular:peak=0.4", 10, {0: 0, 2: 0.5, 4: 1, 7: 0.5, 10: 0}),
        ("triangular:floor=0.02/0.1", 10, {0: 0.2, 2.5: 0.6, 5: 1, 7.5: 0.6, 10: 0.2}),
        ("piecewise", 8, {0: 1, 3.9: 1, 4: 0.1, 5.9: 0.1, 6: 0.01}),
        ("piecewise:at=30;60;90,warmup=5", 100, {0: 0, 1: 0.2, 5: 1, 30: 0.1, 60: 0.01, 95: 0.001}),
        ("cosine", 4, {0: 1, 2: 0.5, 4: 0}),
        ("cosine:warmup=2", 6, {0: 0, 1: 0.5, 2: 1, 4: 0.5}),
        ("constant", 3, {0: 1, 3: 1}),
    ],
)
def test_schedules(text: str, epochs: int, wanted: dict[float, float]) -> None:
    factor = SCHEDULES.create(text, epochs)
    assert {epoch: factor(epoch) for epoch in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("triangular:peak=1", "peak must be inside"),
        ("triangular:floor=2", r"floor.* must be in \[0, 1\], got 2"),
        ("piecewise:at=3;2", "must rise, got 3;2"),
        ("piecewise:at=x", "got 'x'"),
        ("piecewise:at=9", "not inside its 8 epochs"),
        ("piecewise:warmup=-2", r"warmup must be in \[0, 8\) and gamma in \(0, 1\], got -2 and 0\.1"),
        ("piecewise:gamma=-1", "gamma in"),
        ("cosine:warmup=8", "less than the 8 epochs"),
    ],
)
def test_schedules_refuse_what_makes_no_sense(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SCHEDULES.create(text, 8)


@pytest.mark.parametrize(("pixels", "good"), [(1, False), (2, True)])
def test_a_last_batch_of_one_image_is_refused_where_a_norm_needs_two(tmp_path: Path, pixels: int, good: bool) -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(pixels), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(pixels**2, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = images()

    def make(batch_size: int) -> Trainer:
        recipe = dataclasses.replace(RECIPE, batch_size=batch_size, epochs=1)
        return Trainer(model, recipe, 1, TensorSource(x[:17], y[:17], 1), None, tmp_path)

    if not good:
        with pytest.raises(TrainingError, match=r"batches of 8 leaves a process one of 17 images.*another batch size"):
            make(8)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    make(8 if good else 9).run()


def test_curves_stay_as_they_start_where_their_learning_rate_is_0(tmp_path: Path) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer(tmp_path, dataclasses.replace(RECIPE, activation_lr=0, decay="all", epochs=1), model).run()
    assert model.state_dict()["2.alpha"].equal(before["2.alpha"])
    assert not model.state_dict()["0.weight"].equal(before["0.weight"])


def test_a_resumed_training_remembers_its_best(tmp_path: Path) -> None:
    """A network that is worse after the stop must not take the best one's place."""
    recipe = dataclasses.replace(RECIPE, epochs=8, watch_drop=0.0)
    first = trainer(tmp_path, recipe)
    with pytest.raises(Interrupted):
        first.run(press_ctrl_c_after(19))
    kept = checkpoints.load(tmp_path / "best.safetensors")[0]
    again = trainer(tmp_path, recipe)
    assert again.resume()
    assert again.best == first.best

    def spoil(run: Trainer) -> None:
        run.model[5].weight.data.mul_(-50)
        run.model[5].bias.data.mul_(-50)

    again.run(spoil)
    assert max(record.robust for record in again.history[6:]) < again.best
    assert all(t.equal(kept[n]) for n, t in checkpoints.load(tmp_path / "best.safetensors")[0].items())


def test_the_average_has_the_average_statistics(tmp_path: Path) -> None:
    run = trainer(tmp_path, dataclasses.replace(RECIPE, ema=0.75, epochs=1))
    seen: list[torch.Tensor] = []
    run.run(lambda t: seen.append(t.model[1].running_mean.clone()))
    average = seen[0]
    for mean in seen[1:]:
        average = 0.75 * average + 0.25 * mean
    torch.testing.assert_close(run.result[1].running_mean, average)
    assert not run.result[1].running_mean.equal(seen[-1])


def test_clip_is_of_the_gradient_and_not_of_its_scaled_one(tmp_path: Path) -> None:
    """The scaler's 65,536 clipped with it would leave a step of lr · clip / 65,536; a rounding of a weight is 1e-7."""
    recipe = dataclasses.replace(
        RECIPE, clip=0.1, momentum=0.0, weight_decay=0.0, epochs=1, schedule="constant", precision="float16"
    )
    run = trainer(tmp_path, recipe)
    before = [p.detach().clone() for p in run.model.parameters()]
    moves: list[float] = []

    def on_step(t: Trainer) -> None:
        now = [p.detach().clone() for p in t.model.parameters()]
        moves.append(math.sqrt(sum((a - b).square().sum().item() for a, b in zip(now, before, strict=True))))
        before[:] = now

    run.run(on_step)
    assert all(move <= recipe.lr * 0.1 * 1.001 for move in moves)
    assert max(moves) > recipe.lr * 0.1 * 0.9


def test_norms_of_any_kind_do_not_decay() -> None:
    for norm in (nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.InstanceNorm1d(2, affine=True), nn.BatchNorm1d(2)):
        (group,) = parameter_groups(nn.Sequential(norm), 5e-4)
        assert group["name"] == "norms and biases"
        assert group["weight_decay"] == 0


def test_a_fall_of_just_the_drop_is_no_collapse() -> None:
    x, y = images()
    watch = Watch(dataclasses.replace(RECIPE, watch_drop=0.25), x, y)
    assert not watch.collapsed(0.75, Watched(1.0, 0.5))
    assert watch.collapsed(0.75, Watched(1.0, 0.4375))
    assert not watch.collapsed(0.75, Watched(0.0, None))
