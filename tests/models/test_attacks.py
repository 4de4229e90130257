import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.attacks import (
    ATTACKS,
    Adaptive,
    LinfAttack,
    MultiTargeted,
    Strongest,
    fast,
    fgsm,
    margin,
    nfgsm,
    perturb,
    pgd,
    search,
)


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


class Breaks(nn.Module):
    """Says 1 of every image, and nothing that is a number of one that was moved at all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moved = (x != 0.5).flatten(1).any(1)
        logits = torch.tensor([0.0, 1.0]) + x.mean((1, 2, 3))[:, None] * torch.tensor([0.1, 0.0])
        return torch.where(moved[:, None], torch.tensor([0.0, torch.nan]), logits)


@pytest.mark.parametrize("name", ["pgd-3", "fgsm", "targeted:steps=2"])
def test_where_logits_are_no_numbers_an_image_is_broken(name: str) -> None:
    """NaN at the label is the largest to argmax."""
    x, y = torch.full((2, 1, 2, 2), 0.5), torch.ones(2, dtype=torch.long)
    _, found = ATTACKS.create(name, 0.1).search(Breaks(), x, y, generator())
    assert found.all()


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
    assert nfgsm(0.2) == LinfAttack(eps=0.2, step=0.2, steps=1, noise=0.4, clip=False)
    assert nfgsm(0.2, k=1).noise == 0.2
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


def test_margin_is_positive_where_another_class_wins() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0], [3.0, 3.0, 0.0]])
    assert margin(logits, torch.tensor([1, 2, 0])).tolist() == [-2.0, 2.0, 0.0]


def test_the_margin_has_a_gradient_where_the_cross_entropy_rounds_to_none() -> None:
    """Logits 1,000 apart give a probability of exactly 1 in float32, and a cross-entropy with gradient exactly 0."""
    model = Linear(torch.full((1, 2, 2), 1000.0))
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.ones(1, dtype=torch.int64)
    by_loss, by_margin = (
        perturb(model, x, y, LinfAttack(0.1, step=0.1, loss=loss), generator()) for loss in ("ce", "margin")
    )
    assert torch.equal(by_loss, x)
    torch.testing.assert_close(by_margin, x - 0.1)


class TwoLayers(nn.Module):
    """The gradient of a pixel is 4 · 5e-5 · 5e-5 = 1e-8, which float16, with a least number of 6e-8, rounds to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)
        nn.init.constant_(self.first.weight, 5e-5)
        self.second.weight.data = torch.tensor([[-5e-5], [5e-5]]).expand(2, 4).clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x.flatten(1)))


def test_loss_scale_saves_the_step_from_float16() -> None:
    model, x, y = TwoLayers(), torch.full((3, 1, 2, 2), 0.5), torch.ones(3, dtype=torch.int64)
    with torch.autocast("cpu", torch.float16):
        lost = perturb(model, x, y, fgsm(0.1), generator())
        saved = perturb(model, x, y, fgsm(0.1), generator(), loss_scale=1024)
        overflown = perturb(model, x, y, fgsm(0.1), generator(), loss_scale=1e30)
    assert torch.equal(lost, x)
    torch.testing.assert_close(saved, x - 0.1)
    assert overflown.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_goes_on_under_the_same_autocast(dtype: torch.dtype) -> None:
    """Weights cast while frozen must not be cached: the loss would have no way back to them."""
    model, x, y = small_network(), torch.rand(8, 1, 4, 4, generator=generator()), torch.arange(8) % 3
    with torch.autocast("cpu", dtype):
        adversarial = perturb(model, x, y, pgd(0.1, 2), generator())
        loss = F.cross_entropy(model(adversarial), y)
    assert adversarial.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in (model[0].weight, model[4].weight))


def test_no_hook_of_a_parameter_fires() -> None:
    """Those of distributed training would start to exchange gradients."""
    model, x, y = small_network(), torch.rand(8, 1, 4, 4), torch.arange(8) % 3
    fired: list[str] = []
    for name, p in model.named_parameters():
        p.register_hook(lambda gradient, name=name: fired.append(name))
        p.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(name))
    perturb(model, x, y, fast(0.1), generator())
    search(model.eval(), x, y, pgd(0.1, 3), generator())
    assert fired == []
    F.cross_entropy(model(x), y).backward()
    assert set(fired) == {name for name, _ in model.named_parameters()}


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
        ({"eps": 0.1, "step": 0.1, "loss": "hinge"}, "loss must be one of ce, margin, got 'hinge'"),
    ],
)
def test_refuses_impossible_settings(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinfAttack(**arguments)


@pytest.mark.parametrize(
    ("text", "attack"),
    [
        ("fgsm", fgsm(0.1)),
        ("fast", fast(0.1)),
        ("pgd-50", pgd(0.1, 50)),
        ("pgd-50-10", pgd(0.1, 50, restarts=10)),
        ("pgd-20:step=2/255", pgd(0.1, 20, step=2 / 255)),
        ("pgd-20-5:loss=margin", pgd(0.1, 20, restarts=5, loss="margin")),
        ("pgd:steps=7", pgd(0.1, 7)),
        ("targeted:targets=3", MultiTargeted(pgd(0.1, 50, step=0.1 / 4), 3)),
        ("targeted:steps=5,step=0.02", MultiTargeted(pgd(0.1, 5, step=0.02))),
        ("adaptive:samples=50,steps=20", Adaptive(0.1, samples=50, steps=20)),
    ],
)
def test_attacks_by_name(text: str, attack: object) -> None:
    assert ATTACKS.create(text, 0.1) == attack


def test_names_say_what_an_attack_is() -> None:
    for text in ("fgsm", "fast", "pgd-50", "pgd-50-10", "nes", "spsa", "adaptive", "autoattack", "square"):
        assert ATTACKS.create(text, 0.1).name == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pdg-50", "unknown attack 'pdg-50', there are fgsm, fast, pgd"),
        ("fgsmm", "did you mean fgsm"),
        ("pgd-0", "steps must be at least 1, got 0"),
        ("pgd-5-0", "steps and restarts must be at least 1, got 5 and 0"),
        ("pgd-5:size=3", "attack 'pgd' has no option 'size': it has steps, restarts, step, loss"),
        ("nes:samples=3", "wanted an even number from 2, got 3"),
        ("nfgsm", "unknown attack 'nfgsm'"),  # it leaves the ball
    ],
)
def test_refuses_names_that_make_no_attack(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ATTACKS.create(text, 0.1)


def test_later_members_get_only_the_survivors() -> None:
    """0.2 is wrong from the start; FGSM breaks 0.55; two steps of 0.2 break 0.8; nothing breaks 1."""
    x = torch.tensor([0.2, 0.55, 0.8, 1.0]).view(4, 1, 1, 1)
    y = torch.ones(4, dtype=torch.int64)
    first, second = fgsm(0.1), LinfAttack(eps=0.4, step=0.2, steps=2)
    model = Threshold()
    adversarial, found = Strongest("both", (first, second)).search(model, x, y, generator())
    assert found.tolist() == [True, True, True, False]
    torch.testing.assert_close(adversarial.flatten(), torch.tensor([0.2, 0.45, 0.4, 0.6]))
    alone, rest = Threshold(), Threshold()
    first.search(alone, x, y, generator())
    second.search(rest, x[2:], y[2:], generator())
    assert model.seen == alone.seen + rest.seen


def test_an_attack_made_of_attacks_refuses_other_norms_and_no_members() -> None:
    with pytest.raises(ValueError, match="none needs at least one member"):
        Strongest("none", ())
    with pytest.raises(ValueError, match=r"got 2 of which \['cw'\] have another"):
        Strongest("mixed", (fgsm(0.1), ATTACKS.create("cw:l2=1", 0.1)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pgd-20:step=2", r"step must be in \[0, 1\], the range of the images, such as 2/255, got 2"),
        ("pgd-20:step=2/255", "20 steps of 0.007843 go 0.1569, and eps is 0.2"),
        ("nes:step=2", "such as 2/255"),
        ("spsa:steps=10,step=0.01", "10 steps of 0.01 go 0.1, and eps is 0.2"),
    ],
)
def test_refuses_steps_beyond_the_images_or_short_of_the_radius(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ATTACKS.create(text, 0.2)


def test_takes_a_step_that_reaches_the_radius_but_for_rounding() -> None:
    assert ATTACKS.create("pgd:steps=3,step=0.1", 0.3) == pgd(0.3, 3, 0.1)


def test_an_images_starts_do_not_depend_on_which_others_are_left() -> None:
    """`evaluate_attack` promises it: the same random start in every network, whichever images it gets wrong."""
    attack = LinfAttack(eps=0.1, step=0, noise=0.1, restarts=3)
    x, y = torch.full((6, 1, 1, 1), 0.56), torch.ones(6, dtype=torch.int64)
    whole = search(Threshold(), x, y, attack, generator(4))
    y[0] = 0  # wrong from the start
    part = search(Threshold(), x, y, attack, generator(4))
    assert part[0][1:].equal(whole[0][1:])
    assert part[1][1:].equal(whole[1][1:])
    assert not whole[1].all()
