import pytest
import torch
from torch import nn

from models.attacks import pgd
from models.evaluation import (
    Accuracy,
    EvaluationError,
    clean_accuracy,
    evaluation_mode,
    robust_accuracy,
    wilson_interval,
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
    assert clean_accuracy(Threshold(), images, labels, batch_size=7) == Accuracy(97, 100)
    within = int(((values - 0.5).abs() < 0.2).sum())
    assert robust_accuracy(Threshold(), images, labels, pgd(0.2, 20), seed=0, batch_size=33) == Accuracy(
        97 - within, 100
    )


def test_robust_accuracy_reports_progress_and_repeats() -> None:
    images, labels = torch.rand(10, 1, 1, 1), torch.arange(10) % 2
    done: list[int] = []
    first = robust_accuracy(Threshold(), images, labels, pgd(0.1, 2), seed=1, batch_size=4, on_batch=done.append)
    assert done == [4, 8, 10]
    assert first == robust_accuracy(Threshold(), images, labels, pgd(0.1, 2), seed=1, batch_size=4)


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
        clean_accuracy(model, torch.rand(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64))
