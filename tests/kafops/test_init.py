import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kafops
from kafops.init import Isometric, Normal, gradient_factor, ridge

F64 = torch.float64


def default_gamma(dictionary_size, boundary):
    return ((dictionary_size - 1) / (2 * boundary)) ** 2 / 6


def grid(dictionary_size, boundary=3.0):
    return torch.linspace(-boundary, boundary, dictionary_size, dtype=F64)


def gaussian_moments(alpha, gamma, dictionary):
    """E f, Var f and E f′² for x ~ N(0, 1) by the trapezoid rule, which converges geometrically here."""
    x = torch.linspace(-10, 10, 1001, dtype=F64)[:, None, None]
    weight = torch.exp(-(x[..., 0] ** 2) / 2)
    weight = weight / weight.sum()
    kernel = torch.exp(-gamma[:, None] * (x - dictionary) ** 2).expand(-1, len(alpha), -1)  # [X, C, D]
    f = torch.einsum("xcd,cd->xc", kernel, alpha)
    slope = torch.einsum("xcd,cd->xc", -2 * gamma[:, None] * (x - dictionary) * kernel, alpha)
    mean = (weight * f).sum(0)
    return mean, (weight * (f - mean) ** 2).sum(0), (weight * slope**2).sum(0)


def layer_factor(layer):
    return gradient_factor(layer.alpha, layer.bandwidths(), layer.points())


def test_gradient_factor_of_one_gaussian_by_hand():
    # f = exp(-x²/2): E f = 1/√2, E f² = 1/√3, E f′² = E x² exp(-x²) = 3^(-3/2)
    factor = gradient_factor(torch.tensor([[2.0]]), torch.tensor([0.5]), torch.zeros(1, 1))
    torch.testing.assert_close(factor, torch.tensor([math.sqrt(3**-1.5 / (3**-0.5 - 0.5))], dtype=F64))


def test_gradient_factor_is_the_integral_and_ignores_scale():
    generator = torch.Generator().manual_seed(0)
    alpha = torch.randn(4, 7, dtype=F64, generator=generator)
    dictionary = torch.randn(4, 7, dtype=F64, generator=generator)
    gamma = torch.tensor([0.1, 0.5, 2.0, 8.0], dtype=F64)
    _, variance, slope = gaussian_moments(alpha, gamma, dictionary)
    factor = gradient_factor(alpha, gamma, dictionary)
    torch.testing.assert_close(factor, (slope / variance).sqrt(), rtol=1e-8, atol=0)
    torch.testing.assert_close(factor, gradient_factor(-3 * alpha, gamma, dictionary), rtol=1e-8, atol=0)
    assert (factor >= 1).all()


def test_normal_has_its_std_and_the_factor_of_its_kernel():
    torch.manual_seed(0)
    for init, std in (("normal", 0.3), (Normal(0.8), 0.8)):
        layer = kafops.KAF(500, init=init)
        n = layer.alpha.numel()
        assert abs(layer.alpha.std() / std - 1) < 5 / math.sqrt(2 * n)
        assert abs(layer.alpha.mean()) < 5 * std / math.sqrt(n)
        assert 1.8 < layer_factor(layer).mean() < 2.0  # 1.94 was measured over 64 draws; sqrt(2γ) = 1.83


@pytest.mark.parametrize("target", ["relu", "elu", "silu", "tanh", "identity"])
@pytest.mark.parametrize("dictionary_size", [2, 20, 64])
def test_ridge_solves_its_system(target, dictionary_size):
    function = {"identity": lambda x: x, "tanh": torch.tanh}.get(target) or getattr(F, target)
    delta = grid(dictionary_size)
    gamma = torch.tensor([1.0, 0.7], dtype=F64) * default_gamma(dictionary_size, 3)
    alpha = ridge(function, delta, gamma)
    for row, g in zip(alpha, gamma, strict=True):
        system = torch.exp(-g * (delta[:, None] - delta) ** 2) + 1e-6 * torch.eye(dictionary_size, dtype=F64)
        torch.testing.assert_close(row, torch.linalg.lstsq(system, function(delta)[:, None]).solution[:, 0])
        assert (system @ row - function(delta)).abs().max() < 1e-10
    layer = kafops.KAF(2, dictionary_size, init=target, gamma=gamma)
    torch.testing.assert_close(layer.alpha.detach(), alpha.float())


def test_ridge_by_hand():
    # One node at 0: α (1 + ε) = f(0). Two nodes ±1, k = exp(-4γ): α = ±1/(1 + ε - k) if odd, 1/(1 + ε + k) if even.
    one = torch.tensor([1.0], dtype=F64)
    torch.testing.assert_close(ridge(torch.cos, 0 * one, one, eps=0.5), torch.tensor([[1 / 1.5]], dtype=F64))
    delta, k = torch.tensor([-1.0, 1.0], dtype=F64), math.exp(-4)
    odd, even = 1 / (1 + 1e-6 - k), 1 / (1 + 1e-6 + k)
    torch.testing.assert_close(ridge(lambda x: x, delta, one), torch.tensor([[-odd, odd]], dtype=F64))
    torch.testing.assert_close(ridge(torch.square, delta, one), torch.tensor([[even, even]], dtype=F64))


@pytest.mark.parametrize(
    ("target", "low", "high", "factor"),  # largest error on [-3, 3]; sqrt(E f′²/Var f) of the target itself
    [
        (F.relu, 0.045, 0.055, 1.211),
        (F.elu, 0.012, 0.015, 1.039),
        (F.silu, 0.010, 0.013, 1.101),
        (torch.tanh, 0.0025, 0.0035, 1.085),
    ],
)
def test_ridge_fit_is_as_good_as_known(target, low, high, factor):
    layer = kafops.KAF(1, init=target)
    x = torch.linspace(-3, 3, 2001)
    assert low < (layer(x) - target(x)).abs().max() < high
    assert layer_factor(layer).item() == pytest.approx(factor, abs=0.025)


@pytest.mark.parametrize(
    ("dictionary_size", "boundary", "init"),
    [
        (20, 3.0, "isometric"),
        (20, 4.0, "isometric"),
        (64, 3.0, "isometric"),
        (5, 3.0, "isometric"),
        (128, 3.0, Isometric(1.2)),
        (20, 3.0, Isometric(1.5, std=1.0)),
        (20, 2.0, Isometric(1.4, std=0.1)),
    ],
)
def test_isometric_curves_rise_within_their_ratio(dictionary_size, boundary, init):
    rule = Isometric() if init == "isometric" else init
    for seed in range(4):
        torch.manual_seed(seed)
        layer = kafops.KAF(10, dictionary_size, boundary, init, dtype=F64)
        mean, variance, slope = gaussian_moments(layer.alpha.detach(), layer.gamma[:1], layer.points())
        assert mean.abs().max() < 1e-9 * rule.std
        low, high = layer(torch.tensor([[-1.0], [1.0]], dtype=F64).expand(2, 10))
        assert (high > low).all()
        torch.testing.assert_close(variance, torch.full_like(variance, rule.std**2), rtol=1e-8, atol=0)
        ratio = slope / variance
        assert (ratio <= rule.ratio * (1 + 1e-9)).all()
        if dictionary_size >= 20:  # smaller ones spend much of it on the penalty of large coefficients
            assert ratio.min() > 0.97 * rule.ratio  # curves are no straighter than they need to be
        torch.testing.assert_close(layer_factor(layer) ** 2, ratio, rtol=1e-8, atol=0)


def test_isometric_curves_follow_x_and_differ():
    torch.manual_seed(0)
    layer = kafops.KAF(64, init="isometric")
    assert layer.alpha.abs().max() < 20  # far below the 72 of a ReLU fit
    torch.manual_seed(1)
    x = torch.randn(2000, 1).expand(-1, 64)
    y = layer(x).detach()
    correlation = torch.corrcoef(torch.cat([x[:, :1], y], 1).T)
    assert (correlation[0, 1:] > 0.9).all()
    between = correlation[1:, 1:].masked_select(~torch.eye(64, dtype=torch.bool))
    assert between.max() < 1 - 1e-5
    assert between.median() < 0.98


def test_isometric_says_when_the_dictionary_cannot():
    for size, boundary in ((1, 3.0), (20, 1.0), (128, 3.0)):
        with pytest.raises(ValueError, match=r"'isometric' wants .* ≤ 1.1, but a dictionary of \d+ points .* no less"):
            kafops.KAF(4, size, boundary, "isometric", gamma=1.0 if size == 1 else None)


def test_isometric_fits_each_channel_to_its_own_gamma():
    torch.manual_seed(0)
    layer = kafops.KAF(4, init="isometric", gamma=torch.tensor([2.0, 0.5, 1.0, 0.5]), dtype=F64)
    assert (layer_factor(layer) ** 2 <= 1.1 + 1e-9).all()


def test_isometric_keeps_gradients_in_scale_through_depth():
    def first_over_last(init):
        torch.manual_seed(0)
        linear = [nn.Linear(32, 32, bias=False) for _ in range(30)]
        layers = [m for one in linear for m in (one, nn.BatchNorm1d(32), kafops.KAF1d(32, init=init))]
        nn.Sequential(*layers)(torch.randn(64, 32)).square().sum(1).sqrt().sum().backward()
        return (linear[0].weight.grad.norm() / linear[-1].weight.grad.norm()).item()

    assert first_over_last("normal") > 1e4
    assert 1 / 30 < first_over_last("isometric") < 30


@pytest.mark.parametrize("init", ["normal", "isometric", Normal(0.8)])
def test_a_seed_gives_the_same_curves_in_every_dtype(init):
    def draw(seed, dtype):
        torch.manual_seed(seed)
        return kafops.KAF(6, init=init, dtype=dtype).alpha.detach()

    assert torch.equal(draw(0, torch.float32), draw(0, torch.float32))
    assert torch.equal(draw(0, torch.float64).float(), draw(0, torch.float32))
    assert not torch.equal(draw(0, torch.float32), draw(1, torch.float32))


def test_a_target_that_works_in_place_or_needs_grad_is_fine():
    wanted = kafops.KAF(2, init="relu").alpha
    assert torch.equal(kafops.KAF(2, init=nn.ReLU(inplace=True)).alpha, wanted)
    scale = torch.tensor(1.0, dtype=F64, requires_grad=True)
    assert torch.equal(kafops.KAF(2, init=lambda x: scale * F.relu(x)).alpha, wanted)


@pytest.mark.parametrize(
    ("init", "error", "message"),
    [
        (
            "rellu",
            ValueError,
            r"init must be one of 'normal', 'isometric', .*got 'rellu'; did you mean 'relu' or 'elu'",
        ),
        ("SiLU", ValueError, "did you mean 'silu'"),
        ("zzz", ValueError, r"or a callable, got 'zzz'$"),
        (3, TypeError, "init must be a name, .* or a callable, got int"),
        (nn.SiLU, TypeError, r"init must map a tensor \[20\] .* returned SiLU"),
        (lambda x: x > 0, TypeError, "returned dtype torch.bool"),
        (lambda x: x[:5], ValueError, r"returned shape \[5\]"),
        (torch.log, ValueError, r"finite everywhere, but it returned nan at -3"),
    ],
)
def test_bad_init(init, error, message):
    with pytest.raises(error, match=message):
        kafops.KAF2d(4, init=init)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Normal(-1.0), ValueError, r"std must be a finite number ≥ 0, got std=-1.0"),
        (lambda: Normal(math.nan), ValueError, "std must be"),
        (lambda: Normal("0.3"), TypeError, "std must be .* got str"),
        (lambda: Isometric(1.0), ValueError, r"ratio must be a finite number > 1, got ratio=1.0"),
        (lambda: Isometric(std=0.0), ValueError, r"std must be a finite number > 0"),
        (lambda: Isometric(True), TypeError, "got bool"),
    ],
)
def test_bad_numbers(make, error, message):
    with pytest.raises(error, match=message):
        make()
