"""Layers whose kernel is not the Gaussian: bandwidths, state, initial curves."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from other_kernels import F32, F64, KERNELS, definition, of_kernels

import kafops
from kafops.init import Isometric, Normal, gradient_factor, ridge

LEARNED = {"learn_gamma": True, "learn_dictionary": True}


def made(kernel, *arguments, **options):
    torch.manual_seed(0)
    return kafops.KAF(*arguments, kernel=kernel, **options)


@of_kernels
@pytest.mark.parametrize("options", [{}, LEARNED], ids=["fixed", "learned"])
def test_forward_is_the_definition(kernel, options):
    layer = made(kernel, 5, 7, 2.0, dtype=F64, **options)
    x = torch.randn(4, 5, dtype=F64)
    u = layer.bandwidths()[:, None].sqrt() * (x[..., None] - layer.points())
    torch.testing.assert_close(layer(x), (layer.alpha * definition(kernel, u)).sum(-1), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("kernel", "spacing"), [*((k, 1 / 6) for k in ("gaussian", *KERNELS[:2])), ("bspline", 3 / 2)])
def test_bandwidth_by_default(kernel, spacing):
    layer = made(kernel, 3, 11, 5.0, dtype=F64)  # Δ = 1
    torch.testing.assert_close(layer.gamma, torch.full((3,), spacing, dtype=F64))
    torch.testing.assert_close(made(kernel, 3, gamma=0.7).gamma, torch.full((3,), 0.7))
    with pytest.raises(ValueError, match="got 3/\\(2Δ²\\) = inf" if kernel == "bspline" else "got 1/\\(6Δ²\\) = inf"):
        made(kernel, 3, 11, 1e-200)


def test_the_kernel_is_shown_unless_it_is_the_gaussian():
    assert repr(made("gaussian", 4)) == "KAF(4, dictionary_size=20, boundary=3, init=elu, gamma=1.671)"
    assert repr(kafops.KAF2d(4, kernel="bspline")).endswith("gamma=15.04, kernel=bspline)")
    assert "kernel=matern32" in repr(kafops.LazyKAF1d(kernel="matern32"))
    assert (
        repr(Isometric()) == repr(Isometric().for_kernel("matern32")) == "Isometric(ratio=1.1, std=0.7071067811865476)"
    )


@of_kernels
def test_other_layers_take_it(kernel):
    lazy = kafops.LazyKAF2d(kernel=kernel, init="silu")
    x = torch.randn(2, 3, 4, 4)
    y = lazy(x)
    assert type(lazy) is kafops.KAF2d
    torch.testing.assert_close(y, kafops.kaf(x, lazy.alpha, lazy.gamma, 3.0, kernel=kernel))
    again = copy.deepcopy(lazy)
    again.reset_parameters()
    assert torch.equal(again.alpha, lazy.alpha)
    for cls, shape in ((kafops.KAF1d, (2, 3)), (kafops.KAF3d, (2, 3, 2, 2, 2))):
        layer = cls(3, kernel=kernel)
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), kafops.kaf(x, layer.alpha, layer.gamma, 3.0, kernel=kernel))


@pytest.mark.parametrize("options", [{}, LEARNED], ids=["fixed", "learned"])
def test_state_of_another_kernel_is_refused(options):
    layers = {kernel: made(kernel, 3, **options) for kernel in ("gaussian", *KERNELS)}
    for a, source in layers.items():
        state = {k: v.bfloat16() if k == "curve" else v for k, v in source.state_dict().items()}
        for b, target in layers.items():
            if a == b:
                target.load_state_dict(state)
                continue
            with pytest.raises(ValueError, match=f"kernel in the state_dict is {a} but .*kernel='{b}'"):
                target.load_state_dict(state)
    strange = layers["bspline"].state_dict()
    for value, name in (([3.0, 77.0, 0.0], "kernel"), ([3.0, 3.0, 77.0], "base")):
        strange["curve"] = torch.tensor(value)
        with pytest.raises(ValueError, match=f"{name} .* number 77, which this version of kafops does not know"):
            layers["bspline"].load_state_dict(strange)


def test_state_of_another_boundary_is_refused():
    with pytest.raises(ValueError, match=r"boundary in the state_dict is 2 but .* boundary=3; build it"):
        made("bspline", 3).load_state_dict(made("bspline", 3, boundary=2.0).state_dict())


def test_state_from_before_there_were_kernels():
    layer = made("gaussian", 3)
    old = {"alpha": torch.ones(3, 20), "gamma": torch.ones(3), "_extra_state": torch.tensor(3.0, dtype=F64)}
    layer.load_state_dict(old)
    assert layer.alpha.sum() == 60
    assert layer.curve.tolist() == [3, 0, 0]
    with pytest.raises(ValueError, match=r"kernel in the state_dict is gaussian but .*kernel='matern32'"):
        made("matern32", 3).load_state_dict(old)
    del layer.__dict__["kernel"]  # as a layer pickled then comes back
    assert layer.kernel == "gaussian"


# ------------------------------------------------------------------------------------------------------ initial curves


@of_kernels
@pytest.mark.parametrize("target", ["relu", "silu", "tanh", "identity"])
def test_ridge_solves_its_system(kernel, target):
    """With the kernel's own matrix; the fit misses the target on the points by eps α, exactly."""
    function = {"identity": lambda x: x, "tanh": torch.tanh}.get(target) or getattr(F, target)
    delta = torch.linspace(-3, 3, 20, dtype=F64)
    gamma = torch.tensor([1.5, 0.7], dtype=F64)
    alpha = ridge(function, delta, gamma, kernel=kernel)
    for row, g in zip(alpha, gamma, strict=True):
        system = definition(kernel, g.sqrt() * (delta[:, None] - delta)) + 1e-6 * torch.eye(20, dtype=F64)
        assert (system @ row - function(delta)).abs().max() < 1e-10
    layer = made(kernel, 2, init=target, gamma=gamma, dtype=F64)
    torch.testing.assert_close(layer.alpha.detach(), alpha)
    x = delta[:, None].expand(-1, 2)
    torch.testing.assert_close(function(x) - layer(x).detach(), 1e-6 * alpha.T, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("target", "error"), [(F.relu, 0.2 * 6 / 19), (F.silu, 1e-3), (torch.tanh, 1e-3)])
def test_spline_fits_between_the_points(target, error):
    """As good as an interpolating cubic spline: a kink costs a part of Δ, a smooth function far less.

    What is missing beyond the outermost points, some 0.25, shrinks by 2 − √3 at each point on the way in, five here.
    """
    layer = made("bspline", 1, init=target, dtype=F64)
    x = torch.linspace(-1.4, 1.4, 801, dtype=F64)
    assert (layer(x) - target(x)).abs().max() < error


@of_kernels
@pytest.mark.parametrize(
    ("size", "boundary", "init"), [(20, 3.0, "isometric"), (64, 4.0, "isometric"), (20, 3.0, Isometric(1.3, std=1.0))]
)
def test_isometric_curves_rise_within_their_ratio(kernel, size, boundary, init):
    rule = Isometric() if init == "isometric" else init
    layer = made(kernel, 6, size, boundary, init=init, dtype=F64)
    x = torch.linspace(-10, 10, 20001, dtype=F64)
    weight = torch.exp(-x * x / 2)
    weight = (weight / weight.sum())[:, None]  # the trapezoid rule: errors of h³ times jumps of a third derivative
    x = x[:, None].expand(-1, 6).clone().requires_grad_()
    y = layer(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    mean, y = (weight * y).sum(0).detach(), y.detach()
    variance, ratio = (weight * (y - mean) ** 2).sum(0), (weight * slope**2).sum(0) / rule.std**2
    assert mean.abs().max() < 1e-7 * rule.std
    torch.testing.assert_close(variance, torch.full_like(variance, rule.std**2), rtol=1e-7, atol=0)
    assert (ratio <= rule.ratio * (1 + 1e-7)).all()
    assert ratio.min() > 0.97 * rule.ratio
    factor = gradient_factor(layer.alpha, layer.bandwidths(), layer.points(), kernel)
    torch.testing.assert_close(factor**2, ratio, rtol=1e-7, atol=0)
    low, high = layer(torch.tensor([[-1.0], [1.0]], dtype=F64).expand(2, 6))
    assert (high > low).all()
    assert layer.alpha.unique(dim=0).shape[0] == 6


def test_rules_that_do_not_depend_on_the_kernel_stay_what_they_are():
    rule = Normal(0.5)
    assert rule.for_kernel("bspline") is rule
    assert Isometric().for_kernel("gaussian") == Isometric()
    alphas = [made(kernel, 4, init=rule, dtype=F32).alpha for kernel in ("gaussian", *KERNELS)]
    assert all(torch.equal(a, alphas[0]) for a in alphas)


def test_gradient_factor_of_free_dictionaries_is_that_of_each_channel():
    generator = torch.Generator().manual_seed(0)
    alpha, points = (torch.randn(3, 5, dtype=F64, generator=generator) for _ in range(2))
    gamma = torch.tensor([0.5, 2.0, 2.0], dtype=F64)
    together = gradient_factor(alpha, gamma, points, "bspline")
    alone = [gradient_factor(alpha[i : i + 1], gamma[i : i + 1], points[i : i + 1], "bspline") for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=0)
    assert (together >= 1).all()
    assert gradient_factor(0 * alpha, gamma, points, "bspline").isnan().all()
    assert math.isclose(  # the same curve, shifted by symmetry
        gradient_factor(alpha[:1], gamma[:1], points[:1], "matern32").item(),
        gradient_factor(alpha[:1], gamma[:1], -points[:1], "matern32").item(),
        rel_tol=1e-10,
    )
