"""Radii that are proved: exact ones by hand, and no attack that breaks an image within its radius."""

import math

import pytest
import torch
from torch import Tensor, nn
from trained_networks import trained_like

from models import images, networks
from models.attacks import pgd
from models.certified.certificates import Certificates, accuracy_at, certify, interval_radius
from models.certified.lipschitz import upper_bound
from models.certified.traced import steps

NETWORKS = [
    ("vgg:width=2,dense=8,patch=2", "kaf_isometric"),
    ("light:width=3,dense=8,patch=4", "silu"),
    ("light:width=3,dense=8,patch=4", "kwta:ratio=0.3"),
    ("resnet20:width=2,patch=7", "relu"),
]


def certificates(model: nn.Module, x: Tensor, y: Tensor) -> Certificates:
    network = steps(model, x.shape[1:])
    return certify(network, upper_bound(network), x, y)


def test_a_linear_classifier_by_hand() -> None:
    """Logits (x + 2y, 3y + 0.25) at (0.8, 0.2): margin 1.2 - 0.85 = 0.35 of difference (1, -1) · (x, y) - 0.25.

    In L-infinity that is used up at 0.35 / 2, in L2 at 0.35 / sqrt(2). Locally nothing is gained. The box's corner
    (0.8 - r, 0.2 + r) is inside [0, 1].
    """
    layer = nn.Linear(2, 2)
    layer.weight.data, layer.bias.data = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([0.0, 0.25])
    x = torch.tensor([[[[0.8, 0.2]]], [[[0.8, 0.2]]]])
    found = certificates(nn.Sequential(nn.Flatten(), layer), x, torch.tensor([0, 1]))
    assert found.lipschitz.tolist() == pytest.approx([0.35 / math.sqrt(2), 0], rel=1e-5)
    assert found.local.tolist() == pytest.approx([0.35 / math.sqrt(2), 0], rel=1e-5)
    assert found.intervals.tolist() == pytest.approx([0.175, 0], rel=2e-3)
    assert found.linf.tolist() == pytest.approx([0.175, 0], rel=2e-3)
    assert found.l2.tolist() == pytest.approx([0.35 / math.sqrt(2), 0], rel=1e-5)
    assert found.local_bound[0].item() == pytest.approx(torch.linalg.svdvals(layer.weight)[0].item())


def test_what_nothing_can_change_has_the_largest_radius() -> None:
    layer = nn.Linear(4, 2)
    layer.weight.data.zero_()
    layer.bias.data = torch.tensor([1.0, 0.0])
    found = certificates(nn.Sequential(nn.Flatten(), layer), torch.rand(1, 1, 2, 2), torch.tensor([0]))
    assert found.intervals.item() == 1
    assert found.lipschitz.item() == pytest.approx(2)  # no image of 4 pixels is farther away
    assert found.linf.item() == 1


def test_local_radii_use_the_slopes_of_the_ball() -> None:
    """By hand: two logits ±silu(8 x - 9) / 2. At x = 0.2 silu's argument is -7.4, where its slope is far below 1.1."""
    first, last = nn.Linear(1, 1), nn.Linear(1, 2)
    first.weight.data, first.bias.data = torch.tensor([[8.0]]), torch.tensor([-9.0])
    last.weight.data, last.bias.data = torch.tensor([[0.5], [-0.5]]), torch.tensor([0.02, 0.0])
    model = nn.Sequential(nn.Flatten(), first, nn.SiLU(), last)
    found = certificates(model, torch.tensor([[[[0.2]]]]), torch.tensor([0]))

    def silu(z: float) -> float:
        return z / (1 + math.exp(-z))

    margin = silu(8 * 0.2 - 9) + 0.02
    assert found.lipschitz.item() == pytest.approx(margin / (8 * 1.0998393194335), rel=1e-5)
    # The answer changes where silu(8 x - 9) = -0.02, at 8 x - 9 = -5.7 or so: 0.21 away; the slope rises on the way.
    assert 5 * found.lipschitz.item() < found.local.item() < 0.22
    assert silu(8 * (0.2 + found.local.item()) - 9) > -0.02


def correct(network: str, activation: str, count: int = 12) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, images, and what it says of them."""
    model = trained_like(networks.build(network, activation, images.MNIST, seed=3))
    x = torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model, x, model(x).argmax(1)


@pytest.mark.parametrize(("network", "activation"), NETWORKS)
def test_no_attack_breaks_a_proved_image(network: str, activation: str) -> None:
    """PGD in L-infinity, and its steps scaled to the ball in L2, at 0.99 of the radii and, to see that it can, above.

    In float64, since a margin at the edge of a radius may be smaller than float32's rounding.
    """
    model, x, y = correct(network, activation)
    found = certificates(model, x, y)
    model, x = model.double(), x.double()
    assert (found.local >= found.lipschitz).all()
    assert (found.l2 >= found.linf).all()
    generator = torch.Generator().manual_seed(1)
    for radius, image, label in zip(found.linf.tolist(), x, y, strict=True):
        if radius > 0:
            attack = pgd(0.99 * radius, 10, restarts=2, loss="margin")
            assert not attack.search(model, image[None], label[None], generator)[1].item()
    assert (found.linf > 0).any()
    moved = _ascend_l2(model, x, y, 0.99 * found.l2)
    assert ((model(moved).argmax(1) == y) | (found.l2 == 0)).all()
    assert not pgd(0.5, 10).search(model, x, y, generator)[1].logical_not().all()


def _ascend_l2(model: nn.Module, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    moved, size = x.clone(), radius.view(-1, 1, 1, 1)
    for _ in range(20):
        moved = moved.detach().requires_grad_()
        logits = model(moved)
        margin = logits.scatter(1, y[:, None], -torch.inf).amax(1) - logits.gather(1, y[:, None])[:, 0]
        (gradient,) = torch.autograd.grad(margin.sum(), moved)
        step = gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-30).view(-1, 1, 1, 1)
        delta = moved.detach() + size * step - x
        delta = delta * (size / delta.flatten(1).norm(dim=1).clamp(min=1e-30).view(-1, 1, 1, 1)).clamp(max=1)
        moved = (x + delta).clamp(0, 1)
    return moved.detach()


def test_a_tiny_network_is_proved_nearly_as_far_as_it_is_robust() -> None:
    """Two layers on two pixels: the radius is a quarter of the distance to the nearest other answer, or more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    grid = torch.linspace(0, 1, 201, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid).view(-1, 1, 1, 2)
    with torch.no_grad():
        answers = model(points).argmax(1)
    assert 0.1 < answers.double().mean() < 0.9
    x, y = points[::2003], answers[::2003]
    radius = interval_radius(steps(model, (1, 1, 2)), x, y)
    for image, label, proved in zip(x, y, radius, strict=True):
        nearest = (points[answers != label] - image).abs().flatten(1).amax(1).min()
        assert nearest / 4 <= proved <= nearest


def test_accuracies_by_hand() -> None:
    radii = torch.tensor([0.0, 0.1, 0.2, 0.2])
    assert accuracy_at(radii, [0.0, 0.1, 0.15, 0.2, 0.3]) == pytest.approx([0.75, 0.75, 0.5, 0.5, 0])


def test_a_margin_that_rounding_could_make_proves_nothing() -> None:
    """Logits of 1 and 1 + 1e-12: float64 rounds such sums by as much."""
    layer = nn.Linear(1, 2).double()
    layer.weight.data = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    layer.bias.data = torch.tensor([0.5 + 1e-12, 1.0], dtype=torch.float64)
    x = torch.full((1, 1, 1, 1), 0.5)
    found = certificates(nn.Sequential(nn.Flatten(), layer), x, torch.tensor([0]))
    assert found.lipschitz.item() == found.local.item() == found.linf.item() == 0
    layer.bias.data[0] = 0.51
    assert certificates(nn.Sequential(nn.Flatten(), layer), x, torch.tensor([0])).lipschitz.item() > 0.009
