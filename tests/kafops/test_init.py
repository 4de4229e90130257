import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kafops
from kafops import bases
from kafops.init import Initializer, Isometric, Normal, Zeros, default, gradient_factor, resolve, ridge

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


def test_isometric_keeps_its_deviation_where_the_allowance_is_more_than_curves_can_use():
    """At most as much as the second eigenfunction costs, 2.1, beyond which nothing were left for the first."""
    for ratio in (2.0, 4.0):
        torch.manual_seed(0)
        layer = kafops.KAF(6, init=Isometric(ratio), dtype=F64)
        mean, variance, slope = gaussian_moments(layer.alpha.detach(), layer.gamma[:1], layer.points())
        assert mean.abs().max() < 1e-9
        torch.testing.assert_close(variance, torch.full_like(variance, 0.5), rtol=1e-8, atol=0)
        assert (slope / variance).max() < min(ratio, 2.2)
        low, high = layer(torch.tensor([[-1.0], [1.0]], dtype=F64).expand(2, 6))
        assert (high > low).all()


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
            r"init must be one of 'normal', 'isometric', .*got 'rellu'; did you mean 'relu' or ",
        ),
        ("SiLU", ValueError, "did you mean 'silu'"),
        ("zzz", ValueError, r"or a callable, got 'zzz'$"),
        (3, TypeError, "init must be a name, .* or a module class, got 3"),
        (dict, TypeError, "or a module class, got <class 'dict'>"),
        ("Swish", ValueError, "did you mean 'silu'"),
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


# ------------------------------------------------------------------------------------------------------- on a base

of_bases = pytest.mark.parametrize("base", bases.BASES)
FUNCTIONS = {"relu": F.relu, "elu": F.elu, "silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh, "identity": torch.clone}
BENEATH = {"identity": torch.clone, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}
ALONE = {  # E b′² / Var b for x ~ N(0, 1), of relu 1/2 : 1/2 - 1/(2π); of the others as torch's own functions have it
    "identity": 1.0,
    "relu": 0.5 / (0.5 - 0.5 / math.pi),
    "silu": 1.2120811147571111,
    "gelu": 1.3188449708656238,
}


def moments_on_base(alpha, gamma, dictionary, base):
    """E f, Var f and E f′² for x ~ N(0, 1) by the midpoint rule, whose error is h² times jumps of slopes."""
    h = 1e-3
    x = torch.arange(-10 + h / 2, 10, h, dtype=F64)
    weight = h * torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    z = x.clone().requires_grad_()
    b = BENEATH[base](z)
    (steep,) = torch.autograd.grad(b.sum(), z)
    k = torch.exp(-gamma * (x[:, None] - dictionary) ** 2)
    f = b.detach()[:, None] + k @ alpha.T
    slope = steep[:, None] + (-2 * gamma * (x[:, None] - dictionary) * k) @ alpha.T
    mean = weight @ f
    return mean, weight @ (f - mean) ** 2, weight @ slope**2


def test_defaults():
    assert default(None) == "elu"
    assert all(default(base) == "zeros" for base in bases.BASES)


@of_bases
def test_a_layer_on_a_base_starts_as_its_base(base):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    layer = kafops.KAF(5, base=base)
    assert torch.equal(torch.get_rng_state(), state)  # whoever swaps activations draws the same numbers after it
    assert torch.equal(layer.alpha, torch.zeros(5, 20))
    assert not layer.alpha.signbit().any()
    assert torch.equal(kafops.KAF(5, base=base, init="zeros").alpha, layer.alpha)


def test_zeros_without_a_base():
    assert torch.equal(kafops.KAF(3, init="zeros").alpha, torch.zeros(3, 20))
    assert torch.equal(Zeros()(grid(7), torch.ones(2, dtype=F64)), torch.zeros(2, 7, dtype=F64))


@of_bases
@pytest.mark.parametrize("target", FUNCTIONS)
def test_fits_on_a_base_are_of_what_it_lacks(base, target):
    gamma, function = torch.tensor([default_gamma(20, 3), 0.7], dtype=F64), FUNCTIONS[target]
    alpha = ridge(function, grid(20), gamma, base=base)
    torch.testing.assert_close(
        alpha, ridge(lambda x: function(x) - BENEATH[base](x), grid(20), gamma), rtol=0, atol=2e-8
    )
    layer = kafops.KAF(2, init=target, base=base, gamma=gamma, dtype=F64)
    torch.testing.assert_close(layer.alpha.detach(), alpha, rtol=0, atol=2e-8)
    if target == base:
        assert (layer.alpha == 0).all()
    else:
        x = grid(20)[:, None].expand(-1, 2)
        # (K + 1e-6 I) α = target − base; the rest is of rounding, with |α| up to 1e4.
        missed = 1e-6 * layer.alpha.detach().T
        torch.testing.assert_close(layer(x).detach(), function(x) - missed, rtol=0, atol=1e-9)
    custom = kafops.KAF(2, init=lambda x: function(x), base=base, gamma=gamma, dtype=F64)
    assert torch.equal(custom.alpha, alpha)


def test_a_fit_to_gelu_is_one():
    layer = kafops.KAF(1, init="gelu")
    x = torch.linspace(-3, 3, 2001)
    assert (layer(x) - F.gelu(x)).abs().max() < 0.03
    # On silu there is less to fit, and nothing beyond ±3 to fall back from.
    layer = kafops.KAF(1, init="gelu", base="silu")
    assert (layer(x) - F.gelu(x)).abs().max() < 2e-3


def test_random_coefficients_are_the_same_on_a_base():
    torch.manual_seed(0)
    plain = kafops.KAF(4, init="normal").alpha
    torch.manual_seed(0)
    assert torch.equal(kafops.KAF(4, init="normal", base="silu").alpha, plain)


@of_bases
def test_gradient_factor_on_a_base(base):
    gamma, points = torch.tensor([1.7], dtype=F64), grid(9)[None]
    alone = gradient_factor(torch.zeros(1, 9), gamma, points, base=base)
    assert alone.item() == pytest.approx(math.sqrt(ALONE[base]), rel=1e-12)
    alpha = torch.randn(3, 9, dtype=F64, generator=torch.Generator().manual_seed(0))
    _, variance, slope = moments_on_base(alpha, 1.7, points, base)
    for kernel in ("gaussian",):
        found = gradient_factor(alpha, gamma, points, kernel, base=base)
        torch.testing.assert_close(found, (slope / variance).sqrt(), rtol=1e-6, atol=0)
    matern = gradient_factor(alpha, gamma, points, "matern32", base=base)
    assert (matern - found).abs().min() > 1e-3
    free = gradient_factor(alpha, gamma, points + torch.zeros(3, 1), base=base)
    torch.testing.assert_close(free, found, rtol=1e-12, atol=0)


@of_bases
@pytest.mark.parametrize(
    ("dictionary_size", "boundary", "init"),
    [
        (20, 3.0, "isometric"),
        (20, 4.0, "isometric"),
        (64, 3.0, "isometric"),
        (8, 3.0, Isometric(1.3)),
        (20, 3.0, Isometric(1.5, std=1.0)),
        (20, 3.0, Isometric(4.0)),
        (20, 3.0, Isometric(1.2, std=0.6)),
        (20, 2.0, Isometric(1.5, std=0.8)),
    ],
)
def test_isometric_sums_of_base_and_curve(base, dictionary_size, boundary, init):
    rule = Isometric(std=1.0) if init == "isometric" else init
    for seed in range(2):
        torch.manual_seed(seed)
        layer = kafops.KAF(10, dictionary_size, boundary, init, base=base, dtype=F64)
        alpha, gamma = layer.alpha.detach(), layer.gamma[0]
        mean, variance, slope = moments_on_base(alpha, gamma, layer.points(), base)
        # The midpoint rule is off by 1e-7 at the kink of relu.
        assert mean.abs().max() < 1e-7
        torch.testing.assert_close(variance, torch.full_like(variance, rule.std**2), rtol=1e-6, atol=0)
        ratio = slope / variance
        assert (ratio <= rule.ratio * (1 + 1e-6)).all()
        low, high = layer(torch.tensor([[-1.0], [1.0]], dtype=F64).expand(2, 10)).detach()
        assert (high > low).all()
        if dictionary_size >= 20 and boundary >= 3 and rule.ratio < 2:
            assert ratio.min() > 0.97 * rule.ratio  # bends fill what is allowed
        assert ratio.max() < 2.2  # what the second eigenfunction costs, even if more is allowed
        between = torch.cdist(alpha, alpha) + 10 * torch.eye(10, dtype=F64)
        assert between.min() > 1e-2  # no two alike
        if boundary == 3.0 and dictionary_size == 20:
            assert alpha.abs().max() < 20
        factor = gradient_factor(alpha, layer.gamma, layer.points(), base=base)
        torch.testing.assert_close(factor**2, ratio, rtol=1e-5, atol=0)


@of_bases
@pytest.mark.parametrize("kernel", ["rational_quadratic", "matern32", "bspline"])
def test_isometric_sums_of_other_kernels(base, kernel):
    layer = kafops.KAF(4, init="isometric", kernel=kernel, base=base, dtype=F64)
    factor = gradient_factor(layer.alpha, layer.bandwidths(), layer.points(), kernel, base=base)
    assert (factor**2 <= 1.1 * (1 + 1e-9)).all()
    assert (factor**2 >= 1.03).all()


@of_bases
@pytest.mark.parametrize("std", [math.sqrt(0.5), 0.9])
def test_no_sum_costs_less_than_the_least(base, std):
    """Against curves with the same mean and variance, near the best one and far from it."""
    points, gamma = grid(12), torch.tensor([0.9], dtype=F64)
    with pytest.raises(ValueError, match="no less than") as error:
        Isometric(1.0001, std).for_layer("gaussian", base)(points, gamma)
    least = float(str(error.value).split("no less than ")[1].split()[0])
    assert 1 <= least < 1.2
    torch.manual_seed(0)
    alpha = Isometric(1.2, std).for_layer("gaussian", base)(points, gamma.expand(300))
    _, variance, slope = moments_on_base(alpha, 0.9, points, base)
    cost = (slope + 1e-4 * alpha.square().sum(1)) / variance
    # The message has four digits.
    assert cost.min() > least - 1e-3
    # Just above the least there are curves, and they cost no more.
    alpha = Isometric(least + 2e-3, std).for_layer("gaussian", base)(points, gamma.expand(5))
    _, variance, slope = moments_on_base(alpha, 0.9, points, base)
    cost = (slope + 1e-4 * alpha.square().sum(1)) / variance
    assert (cost <= least + 2e-3 + 1e-6).all()
    # Around them: coefficients moved, and put back to E f = 0 and Var f = std² along the first two that do it.
    draw = torch.Generator().manual_seed(0)
    at, tried = alpha[0], []
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            moved = _feasible(at + size * torch.randn(12, generator=draw, dtype=F64), points, 0.9, base, std)
            if moved is not None:
                _, variance, slope = moments_on_base(moved[None], 0.9, points, base)
                assert variance.item() == pytest.approx(std**2, rel=1e-5)
                tried.append(((slope + 1e-4 * moved.square().sum()) / variance).item())
    assert len(tried) > 40
    assert min(tried) > least - 1e-3


def _feasible(alpha, points, gamma, base, std):
    """The coefficients nearest to these, by a few steps of Newton, with E f = 0 and Var f = std²; or None."""
    h = 1e-2
    x = torch.arange(-8 + h / 2, 8, h, dtype=F64)
    weight = h * torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    k, b = torch.exp(-gamma * (x[:, None] - points) ** 2), BENEATH[base](x)
    for _ in range(30):
        f = b + k @ alpha
        wrong = torch.stack([weight @ f, weight @ f**2 - std**2])
        by_alpha = torch.stack([weight @ k, 2 * (weight * f) @ k])
        alpha = alpha - torch.linalg.lstsq(by_alpha, wrong[:, None], driver="gelsd").solution[:, 0]
    f = b + k @ alpha
    return alpha if (weight @ f).abs() < 1e-9 and ((weight @ f**2) - std**2).abs() < 1e-9 else None


def test_isometric_says_when_the_base_does_not_allow_it():
    for base, size, boundary, rule in (
        ("relu", 3, 3.0, Isometric()),
        ("silu", 20, 1.0, Isometric()),
        ("relu", 20, 3.0, Isometric(std=0.3)),  # its kink alone is steeper than that
        ("gelu", 1, 3.0, Isometric()),
        ("relu", 20, 3.0, Isometric(std=1e-3)),  # less than what no curve takes out of relu
    ):
        message = (
            rf"'isometric' wants .* ≤ 1.1, but a dictionary of {size} points .* no less than .* base '{base}' with"
        )
        with pytest.raises(ValueError, match=message + r" std=.*; widen boundary, lower gamma, choose another std"):
            kafops.KAF(4, size, boundary, rule, base=base, gamma=1.0 if size == 1 else None)


def test_isometric_on_a_base_fits_each_channel_to_its_own_gamma():
    torch.manual_seed(0)
    layer = kafops.KAF(4, init="isometric", gamma=torch.tensor([2.0, 0.5, 1.0, 0.5]), base="silu", dtype=F64)
    factor = gradient_factor(layer.alpha, layer.bandwidths(), layer.points(), base="silu")
    assert (factor**2 <= 1.1 + 1e-9).all()
    assert (factor**2 >= 1.07).all()


def test_isometric_on_a_base_keeps_gradients_in_scale_through_depth():
    def first_over_last(init, base):
        torch.manual_seed(0)
        linear = [nn.Linear(32, 32, bias=False) for _ in range(30)]
        layers = [m for one in linear for m in (one, nn.BatchNorm1d(32), kafops.KAF1d(32, init=init, base=base))]
        nn.Sequential(*layers)(torch.randn(64, 32)).square().sum(1).sqrt().sum().backward()
        return (linear[0].weight.grad.norm() / linear[-1].weight.grad.norm()).item()

    gentle = Isometric(1.05, std=1.0)
    assert first_over_last("zeros", "relu") > 150
    assert 1 / 30 < first_over_last(gentle, "relu") < 30
    assert 1 / 30 < first_over_last(gentle, "silu") < 30
    # The smaller std, the more those inputs grow that are beyond the dictionary.
    assert first_over_last(Isometric(1.1, std=0.5), "identity") > 1e3
    assert first_over_last("isometric", "identity") < 100


@of_bases
def test_isometric_by_name_has_the_deviation_of_a_base_s_line(base):
    torch.manual_seed(0)
    named = kafops.KAF(3, init="isometric", base=base).alpha
    torch.manual_seed(0)
    assert torch.equal(kafops.KAF(3, init=Isometric(std=1.0), base=base).alpha, named)


@pytest.mark.parametrize("init", ["isometric", Isometric(1.3)])
def test_a_seed_gives_the_same_curves_on_a_base_in_every_dtype(init):
    def draw(seed, dtype):
        torch.manual_seed(seed)
        return kafops.KAF(6, init=init, base="gelu", dtype=dtype).alpha.detach()

    assert torch.equal(draw(0, torch.float64).float(), draw(0, torch.float32))
    assert not torch.equal(draw(0, torch.float32), draw(1, torch.float32))


def test_an_initializer_of_version_0_1_needs_no_rule_for_bases():
    class Own(Initializer):
        def __init__(self, kernel="gaussian"):
            self.kernel = kernel

        def for_kernel(self, kernel):
            return Own(kernel)

        def __call__(self, dictionary, gamma):
            return torch.full((len(gamma), len(dictionary)), float(len(self.kernel)), dtype=F64)

    layer = kafops.KAF(2, 3, init=Own(), kernel="bspline", base="relu")
    assert torch.equal(layer.alpha, torch.full((2, 3), 7.0))
    assert isinstance(resolve("silu", grid(5), "matern32", "silu"), Initializer)
    assert Isometric().for_layer("bspline", "relu") == Isometric(kernel="bspline", base="relu")
    assert Isometric().for_kernel("bspline") == Isometric(kernel="bspline")


@pytest.mark.parametrize("call", [lambda b: Isometric(base=b), lambda b: resolve("relu", grid(5), "gaussian", b)])
def test_wrong_bases_are_named(call):
    with pytest.raises(ValueError, match=r"base must be None or one of 'identity', .* got 'swish'"):
        call("swish")
    with pytest.raises(ValueError, match="base must be None or one of"):
        gradient_factor(torch.ones(1, 3), torch.ones(1), torch.ones(1, 3), base="swish")
    with pytest.raises(ValueError, match="base must be None or one of"):
        ridge(F.relu, grid(5), torch.ones(1), base="swish")


@pytest.mark.parametrize("name", sorted(kafops.init.FUNCTIONS))
def test_names_are_torchs_functions(name):
    function = {"identity": lambda x: x, "tanh": torch.tanh, "sigmoid": torch.sigmoid}.get(name) or getattr(F, name)
    layer = kafops.KAF(2, init=name)
    assert torch.equal(layer.alpha, kafops.KAF(2, init=function).alpha)
    assert repr(layer) == repr(kafops.KAF(2, init=name))
    assert name in get_args(kafops.init.InitName)


def test_every_name_is_typed():
    names = {"normal", "isometric", "zeros", "same", *kafops.init.FUNCTIONS}
    assert set(get_args(kafops.init.InitName)) == names
    assert set(get_args(kafops.kernels.KernelName)) == set(kafops.kernels.KERNELS)
    assert set(get_args(kafops.bases.BaseName)) == set(kafops.bases.BASES)


def test_modules_and_classes_are_targets():
    want = kafops.KAF(2, init=F.mish).alpha
    assert torch.equal(kafops.KAF(2, init=nn.Mish).alpha, want)
    assert torch.equal(kafops.KAF(2, init=nn.Mish(inplace=True)).alpha, want)
    prelu = nn.PReLU(init=0.125)
    assert torch.equal(kafops.KAF(2, init=prelu).alpha, kafops.KAF(2, init=lambda x: F.leaky_relu(x, 0.125)).alpha)
    assert prelu.weight.requires_grad
    assert prelu.weight.dtype == torch.float32


GRID, GAMMA = torch.linspace(-3, 3, 4), torch.ones(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ridge(torch.tanh, [1.0], GAMMA),
            TypeError,
            r"dictionary must be a finite floating tensor \[D\], got list",
        ),
        (lambda: ridge(torch.tanh, GRID[None], GAMMA), ValueError, r"dictionary .* got shape \[1, 4\]"),
        (lambda: ridge(torch.tanh, GRID, -GAMMA), ValueError, "gamma .* of positive numbers, got -1"),
        (lambda: ridge(torch.tanh, GRID, GAMMA * torch.nan), ValueError, "gamma .* got nan"),
        (lambda: ridge(torch.tanh, GRID, GAMMA, eps=-1), ValueError, "eps must be a finite number ≥ 0, got eps=-1"),
        (lambda: ridge("relu", GRID, GAMMA), TypeError, "target must be a callable, .* got 'relu'"),
        (lambda: gradient_factor(1, GAMMA, GRID), TypeError, "alpha must be a finite floating tensor .*, got int"),
        (lambda: gradient_factor(torch.ones(2, 4), -GAMMA, GRID[None]), ValueError, "gamma .* got -1"),
        (
            lambda: gradient_factor(torch.ones(3, 4), GAMMA, GRID[None]),
            ValueError,
            r"fit together, got \[3, 4\], \[2\]",
        ),
        (lambda: gradient_factor(torch.ones(2, 4), GAMMA, GRID), ValueError, r"dictionary .* got shape \[4\]"),
    ],
)
def test_tensors_are_checked(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (None, TypeError, "got NoneType"),
        (torch.ones(3, 20, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.ones(3, 19), ValueError, r"got shape \[3, 19\]"),
        (torch.full((3, 20), torch.nan), ValueError, "got nan"),
    ],
)
def test_ones_own_initializer_is_checked(returned, error, message):
    class Own(Initializer):
        def __call__(self, dictionary, gamma):
            return returned

    with pytest.raises(error, match=r"init must return finite floating coefficients \[C, D\] = \[3, 20\], " + message):
        kafops.KAF(3, init=Own())
