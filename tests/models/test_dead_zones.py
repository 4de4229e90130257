"""The attack on KAF networks whose own gradient is 0 where images are."""

import copy

import pytest
import torch
from torch import nn

import kafops
from models.attacks import (
    BPDA,
    Adaptive,
    LinfAttack,
    MultiTargeted,
    backward_of,
    continued,
    has_dead_zones,
    margin,
    pgd,
    widened,
)

EPS = 0.1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Brightness(nn.Module):
    """Logits (1/2, f(z)), z = 110 (mean brightness - 0.4), with one curve f that is the kernel of one point, or two."""

    def __init__(self, curve: kafops.KAF, *points: int) -> None:
        super().__init__()
        self.curve = curve
        with torch.no_grad():
            curve.alpha.zero_()
            curve.alpha[:, points] = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = 110 * (x.flatten(1).mean(1, keepdim=True) - 0.4)
        return torch.cat((torch.full_like(z, 0.5), self.curve(z)), 1)


def beyond() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Images at z = 13 to 14, where f is 0 in float32; at z = 2.4, within reach, it is 1."""
    return Brightness(kafops.KAF(1), -3).eval(), *images(0.4 + 13 / 110)


def in_a_gap() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The same between points at 2.4 and at 40: no image is beyond the dictionary."""
    curve = kafops.KAF(1, learn_dictionary=True)
    with torch.no_grad():
        curve.dictionary[:, -1] = 40
    return Brightness(curve, -3, -1).eval(), *images(0.4 + 13 / 110)


def images(darkest: float) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.linspace(darkest, darkest + 1 / 110, 6)[:, None, None, None].expand(6, 1, 10, 10).contiguous()
    return x, torch.zeros(6, dtype=torch.int64)


@pytest.mark.parametrize(("network", "finds"), [(beyond, (continued, widened)), (in_a_gap, (widened,))])
def test_breaks_what_pgd_cannot_see(network: object, finds: tuple) -> None:
    model, x, y = network()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    assert not gradient.any()
    x = x.detach()
    for loss in ("ce", "margin"):
        assert not pgd(EPS, 50, restarts=10, loss=loss).search(model, x, y, generator())[1].any()
    for smooth in (continued, widened):
        found = BPDA(pgd(EPS, 20, loss="margin"), kafops.KAF, smooth).search(model, x, y, generator())[1]
        assert found.all() if smooth in finds else not found.any()
    adversarial, found = Adaptive(EPS, pgd_steps=20, pgd_restarts=1, samples=2, steps=1).search(
        model, x, y, generator()
    )
    assert found.all()
    assert (model(adversarial).argmax(1) != y).all()
    assert (adversarial - x).abs().max() <= EPS + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


LAYERS = {
    "random": lambda channels: kafops.KAF(channels, init="normal"),
    "trained points and bandwidths": lambda channels: kafops.KAF(
        channels, init="normal", learn_gamma=True, learn_dictionary=True
    ),
    "channels last": lambda channels: nn.Sequential(Last(), kafops.KAF(channels, channel_dim=-1), Last()),
    "one curve": lambda channels: kafops.KAF(1, kernel="matern32"),
    "silu beneath": lambda channels: kafops.KAF(channels, base="silu", init="relu"),
    "another function beneath": lambda channels: kafops.KAF(channels, base="same", old=nn.Tanh()),
}


class Last(nn.Module):
    """Swap channels and columns."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, -1)


def network(layer: str) -> nn.Module:
    torch.manual_seed(0)
    parts = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), LAYERS[layer](4), nn.Dropout(), nn.Flatten(), nn.Linear(64, 5))
    return nn.Sequential(*parts)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("smooth", [continued, widened])
def test_values_are_the_networks_own_and_nothing_of_it_changes(layer: str, smooth: object) -> None:
    model = network(layer)
    model[0].weight.requires_grad_(False)
    model.eval()
    model[3].train()  # a mode of its own
    x, y = 4 * torch.rand(8, 1, 6, 6, generator=generator(1)), torch.arange(8) % 5
    kept, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    torch.manual_seed(3)
    before = model(x)
    with backward_of(model, kafops.KAF, smooth):
        torch.manual_seed(3)
        inside = model(x.clone().requires_grad_())
        assert torch.equal(inside, before)
        inside.sum().backward()
    model[3].eval()
    for parameter in model.parameters():
        parameter.grad = None
    x /= 4
    BPDA(pgd(EPS, 3), kafops.KAF, smooth).search(model, x, y, generator())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.weight"]
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    model[3].train()
    assert [module.training for module in model.modules()] == modes
    assert not any("forward" in vars(module) for module in model.modules())


def slope(smooth: object, layer: kafops.KAF, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(smooth(layer, x).sum(), x)
    return gradient


def test_a_curve_goes_on_at_the_slope_of_its_ends() -> None:
    layer = kafops.KAF(3, boundary=2.0, init="normal").double()
    x = torch.tensor([-9.0, -2.0, -1.3, 0.4, 2.0, 2.1, 50.0], dtype=torch.float64)[:, None].expand(7, 3)
    own = slope(lambda layer, x: layer(x), layer, x.clamp(-2, 2))
    torch.testing.assert_close(slope(continued, layer, x), own)
    assert own.abs().min() > 1e-3


def test_with_a_base_a_curve_keeps_its_slope() -> None:
    layer, x = kafops.KAF(3, base="silu", init="relu"), torch.linspace(-9, 9, 50)[:, None].expand(50, 3)
    torch.testing.assert_close(slope(continued, layer, x), slope(lambda layer, x: layer(x), layer, x))


def test_widened_curves_are_smoothed_by_a_gaussian() -> None:
    """The mean of f(x + s n), n standard normal, s² = 3 / (2 γ), by the trapezoidal rule."""
    layer = kafops.KAF(2, init="normal").double()
    x = torch.linspace(-5, 5, 21, dtype=torch.float64)[:, None].expand(21, 2)
    n = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    weight = torch.exp(-(n**2) / 2) * (n[1] - n[0]) / (2 * torch.pi) ** 0.5
    s = (3 / (2 * layer.bandwidths())) ** 0.5
    mean = sum(w * layer(x + s * z) for w, z in zip(weight, n, strict=True))
    torch.testing.assert_close(widened(layer, x), mean, rtol=0, atol=1e-9)


def test_adaptive_carries_gradients_where_there_are_dead_zones() -> None:
    attack = Adaptive(EPS)
    for layer in LAYERS:
        model = network(layer)
        smooths = [m.smooth for m in attack.members(model) if isinstance(m, BPDA)]
        dead = "beneath" not in layer
        assert has_dead_zones(model) is dead
        assert smooths == ([continued, widened] if dead else [])


@pytest.mark.parametrize("layer", ["random", "silu beneath"])
def test_adaptive_breaks_what_any_member_breaks(layer: str) -> None:
    model = network(layer).eval()
    x = torch.rand(60, 1, 6, 6, generator=generator(5))
    y = model(x).argmax(1)
    attack = Adaptive(0.2, pgd_steps=4, pgd_restarts=1, targets=2, samples=4, growth=1, steps=2)
    adversarial, found = attack.search(model, x, y, generator())
    assert torch.equal(model(adversarial).argmax(1) != y, found)
    assert (adversarial - x).abs().max() <= 0.2 + 1e-6
    alone = [member.search(model, x, y, generator())[1] for member in attack.members(model)]
    assert (found | ~alone[0]).all()
    assert 0 < alone[0].sum() < max(member.sum() for member in alone) <= found.sum() < 60


class Ridge(nn.Module):
    """Three classes: 1 gets near 0 as the first pixel grows but never wins, 2 wins where the second pixel is 0.7."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.flatten(1).unbind(1)
        return torch.stack([torch.ones_like(a), 0.9 - (1 - a).square(), 4 * (b - 0.5)], 1)


def test_aims_at_classes_that_the_margin_never_follows() -> None:
    x, y = torch.full((5, 1, 1, 2), 0.6), torch.zeros(5, dtype=torch.int64)
    one = LinfAttack(0.2, step=0.02, steps=20, loss="margin")
    for attack in (one, MultiTargeted(one, 1)):
        assert not attack.search(Ridge(), x, y, generator())[1].any()
    adversarial, found = MultiTargeted(one, 9).search(Ridge(), x, y, generator())
    assert found.all()
    assert (margin(Ridge()(adversarial), y) > 0).all()
    assert (adversarial - x).abs().max() <= 0.2 + 1e-6


def test_targets_leave_alone_what_is_wrong_already() -> None:
    x, y = torch.full((2, 1, 1, 2), 0.6), torch.tensor([0, 2])
    attack = MultiTargeted(pgd(0.2, 20), 9)
    adversarial, found = attack.search(Ridge(), x, y, generator())
    assert found.all()
    assert torch.equal(adversarial[1], x[1])
    with pytest.raises(ValueError, match="targets must be at least 1, got 0"):
        MultiTargeted(pgd(0.2, 20), 0)
