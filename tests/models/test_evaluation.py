import pytest
import torch
from torch import nn

from models.attacks import LinfAttack, SmoothedAttack, pgd
from models.evaluation import (
    Accuracy,
    EvaluationError,
    Gradients,
    Outcome,
    accuracy,
    evaluate_attack,
    evaluate_clean,
    evaluation_mode,
    input_gradients,
    per_class,
    wilson_interval,
    worst_case,
)


class Threshold(nn.Module):
    """Class 1 where the only pixel is above 1/2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = x.flatten(1).sum(1) - 0.5
        return torch.stack([-score, score], 1)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe 1998, Two-sided confidence intervals for the single proportion, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_as_published(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_is_symmetric_and_inside() -> None:
    low, high = wilson_interval(30, 100)
    assert wilson_interval(70, 100) == pytest.approx((1 - high, 1 - low))
    assert wilson_interval(20, 20)[1] == 1
    assert wilson_interval(0, 100)[0] == 0
    assert Accuracy(30, 100).interval == (low, high)
    assert Accuracy(30, 100).value == 0.3


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_nonsense(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match=f"got {successes} of {trials}"):
        wilson_interval(successes, trials)


def test_accuracies_of_a_model_that_can_be_worked_out() -> None:
    """Robust are the images whose distance to the border exceeds eps, and whose label is right."""
    values = torch.linspace(0.005, 0.995, 100)
    labels = (values > 0.5).long()
    labels[:3] = 1
    images = values.view(-1, 1, 1, 1)
    assert evaluate_clean(Threshold(), images, labels, batch_size=7).accuracy == Accuracy(97, 100)
    within = int(((values - 0.5).abs() < 0.2).sum())
    robust = evaluate_attack(Threshold(), images, labels, pgd(0.2, 20), seed=0, batch_size=33)
    assert robust.accuracy == Accuracy(97 - within, 100)


def test_an_attack_reports_progress_and_repeats() -> None:
    images, labels = torch.rand(10, 1, 1, 1), torch.arange(10) % 2
    done: list[int] = []
    first, again = (
        evaluate_attack(Threshold(), images, labels, pgd(0.1, 2), 1, 4, lambda so_far: done.append(len(so_far.found)))
        for _ in range(2)
    )
    assert done == 2 * [4, 8, 10]
    assert torch.equal(first.found, again.found)


def test_evaluation_mode_restores_every_module() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout())
    model[0].eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert (model.training, model[0].training, model[1].training) == (True, False, True)


def test_nan_logits_are_an_error() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    nn.init.constant_(model[1].weight, float("nan"))
    with pytest.raises(EvaluationError, match="not finite"):
        evaluate_clean(model, torch.rand(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64))


def on_the_border(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose only pixel is 1/2: noise alone breaks half of them."""
    return torch.full((count, 1, 1, 1), 0.5), torch.zeros(count, dtype=torch.int64)


def test_outcomes_tell_image_by_image() -> None:
    images, labels = torch.tensor([0.2, 0.45, 0.55, 0.8]).view(4, 1, 1, 1), torch.tensor([1, 0, 1, 1])
    clean = evaluate_clean(Threshold(), images, labels, batch_size=3)
    assert clean.found.tolist() == [True, False, False, False]
    outcome = evaluate_attack(Threshold(), images, labels, pgd(0.1, 5), seed=0, batch_size=3)
    assert outcome.found.tolist() == [True, True, True, False]
    assert outcome.accuracy == accuracy(outcome.found) == Accuracy(1, 4)
    assert outcome.seconds > 0


@pytest.mark.parametrize("attack", [LinfAttack(0.1, step=0, noise=0.1), SmoothedAttack(0.1, samples=2, steps=2)])
def test_an_interrupted_evaluation_goes_on_with_the_same_bits(attack: LinfAttack | SmoothedAttack) -> None:
    """Of three batches two are done. What a batch meets depends on its number, not on what the others did."""
    images, labels = on_the_border()
    labels[:16] = 1  # the first batch is broken from the start, and draws nothing

    def attacked(**arguments: object) -> Outcome:
        return evaluate_attack(Threshold(), images, labels, attack, seed=3, batch_size=16, **arguments)

    whole = attacked()
    parts: list[Outcome] = []
    assert torch.equal(attacked(on_batch=parts.append).found, whole.found)
    assert [len(part.found) for part in parts] == [16, 32, 40]
    model = Threshold()
    seen: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    rest = evaluate_attack(model, images, labels, attack, 3, 16, done=parts[1])
    assert torch.equal(rest.found, whole.found)
    assert seen[0] == 8
    assert rest.seconds > parts[1].seconds
    other = evaluate_attack(Threshold(), images, 0 * labels, attack, seed=3, batch_size=16)
    assert torch.equal(other.found[16:], whole.found[16:])


def test_seeds_and_batches_have_starts_of_their_own() -> None:
    images, labels = on_the_border()
    chance = LinfAttack(0.1, step=0, noise=0.1)

    def found(seed: int) -> torch.Tensor:
        return evaluate_attack(Threshold(), images, labels, chance, seed, batch_size=20).found

    assert torch.equal(found(0), found(0))
    assert not torch.equal(found(0), found(1))
    assert not torch.equal(found(0)[:20], found(0)[20:])


def test_what_is_done_must_be_whole_batches() -> None:
    done = Outcome(torch.zeros(5, dtype=torch.bool), 1.0)
    with pytest.raises(ValueError, match="5 images are done, which is no whole number of batches of 4"):
        evaluate_attack(Threshold(), *on_the_border(), pgd(0.1, 1), seed=0, batch_size=4, done=done)


def test_the_worst_case_is_any_attack() -> None:
    one, other = torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])
    worst = worst_case([Outcome(one, 1.5), Outcome(other, 2.0)])
    assert worst.found.tolist() == [True, True, True, False]
    assert worst.seconds == 3.5
    assert worst.accuracy == Accuracy(1, 4)


def test_accuracy_of_each_class() -> None:
    found, labels = torch.tensor([True, False, True, False, False]), torch.tensor([0, 0, 2, 2, 2])
    assert per_class(found, labels, 4) == [Accuracy(1, 2), None, Accuracy(2, 3), None]


def test_gradients_that_tell_nothing_are_counted() -> None:
    """Of five images one is misclassified. Two pixels, of which the second has no influence, and the clamp has none."""

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            score = x[:, 0, 0, 0].clamp(0.1, 0.9) - 0.5
            return torch.stack([-score, score * torch.ones(())], 1)

    images = torch.tensor([[0.2, 0.0], [0.95, 0.0], [0.7, 0.0], [0.05, 0.0], [0.6, 0.0]]).view(5, 1, 1, 2)
    labels = torch.tensor([0, 1, 1, 0, 0])
    model = Model()
    assert input_gradients(model, images, labels, batch_size=2) == Gradients(4, 2, 0, 6 / 8)
    root = nn.Sequential(nn.Flatten(), Sqrt())
    bad = input_gradients(root, images[:2] * 0, torch.zeros(2, dtype=torch.int64))
    assert (bad.total, bad.bad) == (2, 2)


class Sqrt(nn.Module):
    """Logits (1, sqrt(0 · x)): the gradient is 0 / 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        root = (0 * x[:, 0]).sqrt()
        return torch.stack([torch.ones_like(root), root], 1)
