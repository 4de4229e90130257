import pytest
import torch
from torch import nn

from models.activations import KWinners
from models.attacks import (
    BPDA,
    EOT,
    Adaptive,
    LinfAttack,
    MultiTargeted,
    SmoothedAttack,
    Transfer,
    backward_of,
    fgsm,
    identity,
    perturb,
    pgd,
    soft_winners,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Round(nn.Module):
    """x to eighths: its gradient is 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 8).round() / 8


class Mean(nn.Module):
    """Logits (0, 100 (mean - 1/2)) of what a module makes of the image: class 1 is bright."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = 100 * (self.first(x).flatten(1).mean(1) - 0.5)
        return torch.stack([torch.zeros_like(score), score], 1)


def kwta_network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), KWinners(0.25), nn.Conv2d(4, 4, 2), KWinners(0.25, "channel"), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(4, 3)).eval()


def images(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, 1, 4, 4, generator=generator(2)), torch.arange(count) % 3


def test_bpda_keeps_values_and_replaces_gradients() -> None:
    model, (x, _) = Mean(Round()), images()
    before = model(x)
    x.requires_grad_()
    with backward_of(model, Round, identity):
        inside = model(x)
        (gradient,) = torch.autograd.grad(inside[:, 1].sum(), x)
        with torch.no_grad():
            assert torch.equal(model(x), before)
    assert torch.equal(inside, before)
    torch.testing.assert_close(gradient, torch.full_like(x, 100 / 16))
    (gradient,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    assert gradient.abs().max() == 0


def test_bpda_gives_the_gradient_of_any_function() -> None:
    """d/dx of x² in the place of the rounding: 2x times the mean's weight."""
    model, (x, _) = Mean(Round()), images()
    x.requires_grad_()
    with backward_of(model, Round, lambda module, x: x**2):
        (gradient,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    torch.testing.assert_close(gradient, 2 * x.detach() * 100 / 16)


def test_bpda_breaks_what_rounding_hides() -> None:
    model, y = Mean(Round()), torch.ones(10, dtype=torch.int64)
    x = 0.58 + 0.02 * torch.rand(10, 1, 4, 4, generator=generator())
    attack = LinfAttack(eps=0.2, step=0.05, steps=10)
    assert not attack.search(model, x, y, generator())[1].any()
    adversarial, found = BPDA(attack, Round).search(model, x, y, generator())
    assert found.all()
    assert (model(adversarial).argmax(1) != y).all()


@pytest.mark.parametrize("smooth", [identity, soft_winners])
def test_bpda_on_kwta_is_exact_forward_and_trains_nothing(smooth: object) -> None:
    model, (x, y) = kwta_network(), images()
    attack = BPDA(pgd(0.1, 5), KWinners, smooth)
    adversarial, found = attack.search(model, x, y, generator())
    assert torch.equal(model(adversarial).argmax(1) != y, found)
    assert (adversarial - x).abs().max() <= 0.1 + 1e-6
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not torch.equal(perturb(model, x, y, fgsm(0.1), generator()), bpda_step(model, x, y, smooth))


def bpda_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, smooth: object) -> torch.Tensor:
    with backward_of(model, KWinners, smooth):
        return perturb(model, x, y, fgsm(0.1), generator())


@pytest.mark.parametrize("per", ["volume", "channel"])
def test_soft_winners_are_the_winners_but_for_those_near_the_threshold(per: str) -> None:
    module, x = KWinners(0.25, per), torch.randn(5, 3, 4, 4, generator=generator())
    hard, soft = module(x), soft_winners(module, x)
    values = x.flatten(2 if per == "channel" else 1)
    least = values.topk(module.winners(values.shape[-1]), -1).values[..., -1:]
    far = ((values - least).abs() > 10 * 0.1 * values.std(-1, correction=0, keepdim=True)).view_as(x)
    assert 0.1 < far.float().mean() < 1
    torch.testing.assert_close(soft[far], hard[far], atol=1e-4 * x.abs().max().item(), rtol=1e-4)
    same = torch.full((2, 3, 4, 4), 1.5)  # all values equal: all win, and the gate is half open
    torch.testing.assert_close(soft_winners(module, same), same / 2)


def test_modules_get_their_forward_back_after_an_error() -> None:
    model = kwta_network()
    mine = model[1].forward
    model[1].forward = lambda x: mine(x) * 2  # someone else's patch
    patched = model[1].forward

    def fail() -> None:
        with backward_of(model, KWinners, identity):
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert model[1].forward is patched
    assert "forward" not in vars(model[3])


def test_nothing_to_replace_is_an_error() -> None:
    model, (x, y) = Mean(nn.Identity()), images()
    with pytest.raises(ValueError, match="the model has no module of the kind whose backward pass is to be replaced"):
        BPDA(fgsm(0.1), KWinners).search(model, x, y, generator())


def test_a_smooth_function_of_another_shape_is_an_error() -> None:
    model, (x, _) = Mean(Round()), images()
    with (
        backward_of(model, Round, lambda module, x: x.flatten(1)),
        pytest.raises(ValueError, match=r"gave shape \(8, 16\) instead of \(8, 1, 4, 4\)"),
    ):
        model(x.requires_grad_())


class RandomSign(nn.Module):
    """x times a random weight of mean 1/2 that is negative in a third of the draws: one gradient often points away."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.empty(()).uniform_(-1, 2)


def test_eot_follows_the_mean() -> None:
    """Logits (0, s (x - c)) with s random: the gradient of a mean of many draws has the right sign, one may not."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sign = RandomSign()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            score = self.sign(x - 0.4).flatten(1).mean(1)
            return torch.stack([torch.zeros_like(score), score], 1)

    x, y = torch.full((1, 1, 2, 2), 0.45), torch.ones(1, dtype=torch.int64)
    step = LinfAttack(eps=0.1, step=0.1)
    state = torch.get_rng_state()
    tries = 40
    alone, mean = 0, 0
    for seed in range(tries):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            alone += (perturb(Model(), x, y, step, generator(seed)) < x).all().item()
        mean += EOT(step, draws=100).search(Model(), x, y, generator(seed))[1].all().item()
    assert torch.equal(torch.get_rng_state(), state)
    assert mean == tries
    assert alone < 0.9 * tries
    again = EOT(step, draws=3).search(Model(), x, y, generator(7))[0]
    assert torch.equal(again, EOT(step, draws=3).search(Model(), x, y, generator(7))[0])


def test_eot_refuses_no_draws() -> None:
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        EOT(fgsm(0.1), draws=0)


def test_transfer_makes_its_images_on_the_source_alone() -> None:
    """The attacked model only rounds what the source sees: its own gradient is 0, and the source's points down."""
    source, model = Mean(nn.Identity()), Mean(Round())
    x, y = torch.full((3, 1, 4, 4), 0.6), torch.ones(3, dtype=torch.int64)
    x[2] = 0.9
    attack = Transfer(source, LinfAttack(eps=0.2, step=0.05, steps=4, loss="margin"), "mine")
    adversarial, found = attack.search(model, x, y, generator())
    torch.testing.assert_close(adversarial, x - 0.2)
    assert found.tolist() == [True, True, False]
    assert (attack.name, attack.origin) == ("transfer-linf", "mine")


def test_transfer_leaves_what_is_wrong_already_and_tries_every_restart() -> None:
    source, model = Mean(nn.Identity()), Mean(nn.Identity())
    x, y = torch.tensor([0.3, 0.5001]).view(2, 1, 1, 1), torch.ones(2, dtype=torch.int64)
    chance = LinfAttack(eps=0.1, step=0, noise=0.1, restarts=20)
    adversarial, found = Transfer(source, chance).search(model, x, y, generator())
    assert adversarial[0] == x[0]
    assert found.tolist() == [True, True]


def test_adaptive_takes_the_members_that_the_network_calls_for() -> None:
    attack = Adaptive(0.1, pgd_steps=7, pgd_restarts=2, targets=4, samples=20, growth=1, steps=3)
    by_gradient = pgd(0.1, 7, restarts=2, loss="margin")
    nes = SmoothedAttack(0.1, samples=20, growth=1, steps=3)
    targeted = MultiTargeted(pgd(0.1, 7, step=2.5 * 0.1 / 7), 4)
    assert attack.members(Mean(nn.Identity())) == (by_gradient, targeted, nes)
    relaxed = tuple(BPDA(by_gradient, KWinners, smooth) for smooth in (soft_winners, identity))
    assert attack.members(kwta_network()) == (by_gradient, targeted, *relaxed, nes)


def test_adaptive_breaks_what_any_member_breaks() -> None:
    attack = Adaptive(0.1, pgd_steps=5, pgd_restarts=1, samples=20, growth=1, steps=3)
    for model in (kwta_network(), Mean(Round())):
        x = torch.rand(60, 1, 4, 4, generator=generator(5))
        y = model(x).argmax(1)
        adversarial, found = attack.search(model, x, y, generator())
        first = attack.members(model)[0].search(model, x, y, generator())[1]
        assert (found | ~first).all()
        assert found.sum() > first.sum()
        assert torch.equal(model(adversarial).argmax(1) != y, found)
        assert (adversarial - x).abs().max() <= 0.1 + 1e-6


def test_adaptive_refuses_impossible_settings_at_once() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Adaptive(0.1, pgd_steps=0)
    with pytest.raises(ValueError, match="wanted an even number from 2, got 1"):
        Adaptive(0.1, samples=1)


def test_eot_does_not_depend_on_the_global_seed() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            score = (x * torch.randn_like(x)).flatten(1).mean(1)
            return torch.stack([torch.zeros_like(score), score], 1)

    x, y = torch.rand(4, 1, 3, 3, generator=generator(3)), torch.ones(4, dtype=torch.int64)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(EOT(LinfAttack(0.1, step=0.02, steps=3), draws=2).search(Noisy(), x, y, generator())[0])
    assert found[0].equal(found[1])
    other = EOT(LinfAttack(0.1, step=0.02, steps=3), draws=2).search(Noisy(), x, y, generator(1))[0]
    assert not other.equal(found[0])


def test_transfer_goes_on_after_a_restart_that_misses() -> None:
    """0.51 falls to the dark side with a chance of 0.45: of 40 images, and with 20 starts each, all do."""
    source, model = Mean(nn.Identity()), Mean(nn.Identity())
    x, y = torch.full((40, 1, 1, 1), 0.51), torch.ones(40, dtype=torch.int64)
    one = Transfer(source, LinfAttack(eps=0.1, step=0, noise=0.1)).search(model, x, y, generator())[1]
    assert 0 < one.sum() < 40
    many = LinfAttack(eps=0.1, step=0, noise=0.1, restarts=20)
    assert Transfer(source, many).search(model, x, y, generator())[1].all()
