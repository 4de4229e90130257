import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.attacks import LinfAttack, fast, fgsm, perturb, pgd, search


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """Logits (0, w·x): images of class 1 are attacked best by x - eps sign(w)."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = (x * self.weight).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)


class Threshold(nn.Module):
    """Class 1 where the only pixel is above 1/2; counts the images it is shown."""

    seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        score = 4 * (x.flatten(1).sum(1) - 0.5)
        return torch.stack([-score, score], 1)


def linear_case() -> tuple[Linear, torch.Tensor, torch.Tensor]:
    g = generator(1)
    model = Linear(torch.randn(1, 4, 4, generator=g))
    return model, torch.rand(32, 1, 4, 4, generator=g), torch.ones(32, dtype=torch.int64)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(16, 3))


def test_fgsm_is_exact_on_a_linear_model() -> None:
    model, x, y = linear_case()
    adversarial = perturb(model, x, y, fgsm(0.1), generator())
    assert torch.equal(adversarial, (x + (-0.1 * model.weight.sign()).expand_as(x)).clamp(0, 1))


def test_pgd_ends_in_the_corner_that_is_worst_for_a_linear_model() -> None:
    model, x, y = linear_case()
    adversarial = perturb(model, x, y, pgd(0.1, 20), generator())
    torch.testing.assert_close(adversarial, (x - 0.1 * model.weight.sign()).clamp(0, 1), rtol=0, atol=1e-7)


def test_presets_are_the_published_settings() -> None:
    assert fgsm(0.2) == LinfAttack(eps=0.2, step=0.2, steps=1, noise=0)
    assert fast(0.2) == LinfAttack(eps=0.2, step=0.25, steps=1, noise=0.2)
    assert pgd(0.2, 20) == LinfAttack(eps=0.2, step=0.025, steps=20, noise=0.2)
    assert pgd(0.2, 7, step=0.05, restarts=3) == LinfAttack(eps=0.2, step=0.05, steps=7, noise=0.2, restarts=3)


@pytest.mark.parametrize("attack", [fgsm(0.3), fast(0.3), pgd(0.3, 5), pgd(0.05, 2, step=0.4), pgd(1.0, 2), fgsm(0)])
def test_stays_in_the_ball_and_in_the_image_range(attack: LinfAttack) -> None:
    x, y = torch.rand(16, 1, 4, 4, generator=generator()), torch.arange(16) % 3
    for adversarial in (
        perturb(small_network(), x, y, attack, generator()),
        search(small_network().eval(), x, y, attack, generator())[0],
    ):
        assert (adversarial - x).abs().max() <= attack.eps + 1e-6
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1


def test_without_clip_the_step_adds_to_the_noise() -> None:
    model, x, y = linear_case()
    x = x * 0 + 0.5
    adversarial = perturb(model, x, y, LinfAttack(eps=0.05, step=0.05, noise=0.1, clip=False), generator())
    moved = (adversarial - x).abs().max()
    assert 0.14 < moved <= 0.15 + 1e-6


@pytest.mark.parametrize("attack", [fgsm(0.1), fast(0.1), pgd(0.1, 5)])
def test_raises_the_loss(attack: LinfAttack) -> None:
    model = small_network().eval()
    x, y = torch.rand(16, 1, 4, 4, generator=generator()), torch.arange(16) % 3
    before = F.cross_entropy(model(x), y, reduction="none")
    after = F.cross_entropy(model(perturb(model, x, y, attack, generator())), y, reduction="none")
    assert (after > before).all()


@pytest.mark.parametrize("training", [True, False])
def test_leaves_mode_gradients_and_flags_alone(training: bool) -> None:
    model = small_network().train(training)
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.full_like(model[4].weight, 7.0)
    x, y = torch.rand(8, 1, 4, 4), torch.arange(8) % 3
    perturb(model, x, y, fast(0.1), generator())
    assert all(module.training is training for module in model.modules())
    assert not model[0].weight.requires_grad
    assert all(p.requires_grad for p in (model[0].bias, *model[1].parameters(), *model[4].parameters()))
    assert torch.equal(model[4].weight.grad, torch.full_like(model[4].weight, 7.0))
    assert all(p.grad is None for p in (*model[0].parameters(), *model[1].parameters(), model[4].bias))


def test_flags_come_back_after_an_error() -> None:
    model = small_network()
    with pytest.raises(RuntimeError):
        perturb(model, torch.rand(2, 5, 4, 4), torch.zeros(2, dtype=torch.int64), fgsm(0.1), generator())
    assert all(p.requires_grad for p in model.parameters())


def test_noise_comes_from_the_generator_alone() -> None:
    model, x, y = linear_case()
    attack = LinfAttack(eps=0.1, step=0, noise=0.1)
    state = torch.get_rng_state()
    first = perturb(model, x, y, attack, generator(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, perturb(model, x, y, attack, generator(5)))
    assert not torch.equal(first, perturb(model, x, y, attack, generator(6)))


def test_search_says_what_it_found() -> None:
    model = small_network().eval()
    x, y = torch.rand(64, 1, 4, 4, generator=generator()), torch.arange(64) % 3
    adversarial, found = search(model, x, y, pgd(0.05, 5), generator())
    assert 0 < found.sum() < 64
    assert torch.equal(model(adversarial).argmax(1) != y, found)


def test_search_returns_misclassified_images_untouched() -> None:
    x = torch.tensor([0.2, 0.8]).view(2, 1, 1, 1)
    adversarial, found = search(Threshold(), x, torch.tensor([1, 1]), pgd(0.05, 3), generator())
    assert found.tolist() == [True, False]
    assert adversarial[0].item() == x[0].item()


def test_search_stops_at_images_that_are_broken() -> None:
    """Of three images one is wrong from the start, one within reach, one out of reach."""
    model = Threshold()
    x = torch.tensor([0.2, 0.55, 0.9]).view(3, 1, 1, 1)
    y = torch.ones(3, dtype=torch.int64)
    _, found = search(model, x, y, LinfAttack(eps=0.2, step=0.1, steps=10), generator())
    assert found.tolist() == [True, True, False]
    # 3 clean; 2 at the start, where 0.55 still holds; 2 after one step, where it breaks; then the last one alone.
    assert model.seen == 3 + 2 + 2 + 9


def test_restarts_find_what_one_start_misses() -> None:
    """With no step the attack is pure chance: an image on the border breaks in half of the starts."""
    x, y = torch.full((400, 1, 1, 1), 0.5), torch.zeros(400, dtype=torch.int64)
    one = search(Threshold(), x, y, LinfAttack(eps=0.1, step=0, noise=0.1), generator())[1].sum().item()
    five = search(Threshold(), x, y, LinfAttack(eps=0.1, step=0, noise=0.1, restarts=5), generator())[1].sum().item()
    assert abs(one - 200) < 5 * math.sqrt(400 / 4)
    assert abs(five - 400 * (1 - 2**-5)) < 5 * math.sqrt(400 * 2**-5 * (1 - 2**-5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": 1.5, "step": 0.1}, r"eps must be in \[0, 1\].*got 1.5"),
        ({"eps": math.nan, "step": 0.1}, "eps must be in"),
        ({"eps": 0.1, "step": -1}, "must not be negative, got step=-1"),
        ({"eps": 0.1, "step": 0.1, "steps": 0}, "must be at least 1, got 0 and 1"),
        ({"eps": 0.1, "step": 0.1, "restarts": 2}, "2 restarts without noise"),
    ],
)
def test_refuses_impossible_settings(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinfAttack(**arguments)
