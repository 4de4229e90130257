"""Lower bounds of Lipschitz constants against singular values computed in full."""

import math

import pytest
import torch
from torch import nn
from trained_networks import trained_like

from models import images, networks
from models.activations import KWinners
from models.certified.expansion import jacobian_norm, largest_ratio
from models.certified.lipschitz import upper_bound
from models.certified.traced import steps


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def linear() -> tuple[nn.Module, float]:
    torch.manual_seed(0)
    layer = nn.Linear(9, 4).double()
    return nn.Sequential(nn.Flatten(), layer), torch.linalg.svdvals(layer.weight)[0].item()


def test_a_linear_network_is_found_out_exactly() -> None:
    model, norm = linear()
    x = torch.rand(3, 1, 3, 3, generator=generator(), dtype=torch.float64)
    found = jacobian_norm(model, x, generator(), steps=200, tolerance=1e-12)
    assert found.ratio.tolist() == pytest.approx([norm] * 3, rel=1e-6)
    assert found.direction.flatten(1).norm(dim=1).tolist() == pytest.approx([1] * 3)
    ratio = largest_ratio(model, x * 0.2 + 0.4, 0.05, found.direction)
    assert ratio.ratio.tolist() == pytest.approx([norm] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("network", "activation"),
    [("light:width=2,dense=6,patch=4", "kaf_silu"), ("resnet20:width=2,patch=7", "gelu"), ("light:width=2", "relu")],
)
def test_singular_values_of_networks(network: str, activation: str) -> None:
    model = trained_like(networks.build(network, activation, images.MNIST, seed=0)).double()
    x = torch.rand(3, 1, 28, 28, generator=generator(), dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: model(one[None])[0]))(x).flatten(2)
    true = torch.linalg.svdvals(jacobian)[:, 0]
    found = jacobian_norm(model, x, generator(), steps=300, tolerance=1e-9)
    assert (found.ratio <= true * (1 + 1e-12)).all()
    # Power iteration slows down where two singular values are close, but then either will do.
    assert (found.ratio >= true * (1 - 1e-3)).all()
    along = (jacobian @ found.direction.flatten(1)[..., None])[..., 0].norm(dim=1)
    assert (along >= true * (1 - 1e-3)).all()
    few = jacobian_norm(model, x, generator(), steps=2)
    assert (few.ratio <= true * (1 + 1e-12)).all()


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_ratios_are_of_pairs_in_the_ball(norm: str) -> None:
    """They are ratios of real pairs, at least those of the direction that they start in, and below the bound."""
    model = trained_like(networks.build("light:width=2,dense=6,patch=4", "kaf_silu", images.MNIST, seed=0)).double()
    x = torch.rand(4, 1, 28, 28, generator=generator(), dtype=torch.float64)
    start = torch.randn(x.shape, generator=generator(), dtype=torch.float64)
    once = largest_ratio(model, x, 0.1, start, norm, steps=0)
    found = largest_ratio(model, x, 0.1, start, norm)
    assert (found.ratio >= once.ratio).all()
    assert (found.ratio > 1.2 * once.ratio).any()
    assert (found.ratio <= upper_bound(steps(model, (1, 28, 28))).upper).all()


def test_a_jump_is_found() -> None:
    """k-WTA of two pixels that differ by 1e-6 changes its answer by their value, once their order changes."""
    model = nn.Sequential(nn.Flatten(), KWinners(0.5)).double()
    x = torch.tensor([[[[0.5, 0.5 + 1e-6]]]], dtype=torch.float64)
    start = torch.tensor([[[[1.0, -1.0]]]], dtype=torch.float64)
    found = largest_ratio(model, x, 1e-5, start, steps=5)
    assert found.ratio.item() > 1e4
    assert jacobian_norm(model, x, generator()).ratio.item() == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_network_stretches_nothing(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 2).to(dtype)
    nn.init.zeros_(layer.weight)
    model, x = nn.Sequential(nn.Flatten(), layer), torch.rand(2, 1, 2, 2, dtype=dtype)
    assert jacobian_norm(model, x, generator()).ratio.tolist() == [0, 0]
    assert largest_ratio(model, x, 0.1, torch.ones_like(x)).ratio.tolist() == [0, 0]
    assert largest_ratio(model, x, 0.1, torch.zeros_like(x)).direction.isfinite().all()


def test_parameters_are_left_alone() -> None:
    model, _ = linear()
    x = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    largest_ratio(model, x, 0.1, jacobian_norm(model, x, generator()).direction)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("radius", "norm", "message"),
    [
        (0.1, "L1", "norm must be L2 or Linf, got 'L1'"),
        (0.0, "L2", "radius must be above 0 and finite, got 0"),
        (math.inf, "L2", "radius must be above 0 and finite, got inf"),
    ],
)
def test_what_makes_no_ball_is_refused(radius: float, norm: str, message: str) -> None:
    model, _ = linear()
    with pytest.raises(ValueError, match=message):
        largest_ratio(model, torch.rand(1, 1, 3, 3).double(), radius, torch.ones(1, 1, 3, 3).double(), norm)


def test_the_direction_is_the_one_of_the_ratio() -> None:
    """In a linear network a ratio is that of its direction, whatever its length: the best one's, not the last one's.

    From the best one of all every step leads away: there the gradient is nothing but rounding, of which a step makes as
    much as of any other.
    """
    model, norm = linear()
    x = torch.full((1, 1, 3, 3), 0.5, dtype=torch.float64)
    start = torch.linalg.svd(model[1].weight.detach()).Vh[0].view_as(x)
    found = largest_ratio(model, x, 0.05, start, steps=2)
    assert found.ratio.item() == pytest.approx(norm, rel=1e-12)
    along = (model(x + found.direction) - model(x)).norm()
    assert along.item() == pytest.approx(norm, rel=1e-9)
