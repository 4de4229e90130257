"""Interval propagation: by hand, and no image of a box outside what it says."""

import math

import pytest
import torch
from torch import Tensor, nn
from trained_networks import NETWORKS, trained_like

import kafops
from models import images, networks
from models.activations import KWinners
from models.certified.intervals import Box, l2_ball, linf_box, logits, margins, propagate
from models.certified.traced import steps
from models.networks.blocks import Normalise


def linear(rows: list[list[float]], bias: list[float]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows))
    layer.weight.data, layer.bias.data = torch.tensor(rows), torch.tensor(bias)
    return layer


def two_layers() -> nn.Sequential:
    """The two-layer ReLU network that introductions to bound propagation work out by hand."""
    first, last = linear([[2.0, 1.0], [-3.0, 4.0]], [0.0, 0.0]), linear([[4.0, -2.0], [2.0, 1.0]], [1.0, 0.0])
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), last)


def pixels(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


def listed(tensor: Tensor) -> list[float]:
    return tensor.flatten().tolist()


def test_two_layers_by_hand() -> None:
    """x in [0.4, 0.6] × [0.3, 0.7].

    First layer: 2x + y in [1.1, 1.9], -3x + 4y in [-0.6, 1.6], after ReLU [0, 1.6]. Second layer: 4a - 2b + 1 in
    [4.4 - 3.2 + 1, 7.6 + 1], 2a + b in [2.2, 5.4]. Their difference 2a - 3b + 1, taken as one row, is at least
    2.2 - 4.8 + 1 = -1.6; taken from the two ranges it could be -3.2.
    """
    network = steps(two_layers(), (1, 1, 2))
    box = Box(pixels(0.4, 0.3), pixels(0.6, 0.7))
    first = propagate(network[:3], box)
    assert listed(first.lower) == pytest.approx([1.1, -0.6])
    assert listed(first.upper) == pytest.approx([1.9, 1.6])
    active = propagate(network[:4], box)
    assert listed(active.lower) == pytest.approx([1.1, 0])
    found = propagate(network, box)
    assert listed(found.lower) == pytest.approx([2.2, 2.2])
    assert listed(found.upper) == pytest.approx([8.6, 5.4])
    assert listed(margins(network, box, torch.tensor([0]))) == pytest.approx([0, -1.6])
    assert listed(margins(network, box, torch.tensor([1]))) == pytest.approx([-(2 * 1.9 + 1), 0])


def test_a_kaf_by_hand() -> None:
    """exp(-x²) on [-0.5, 1] is in [exp(-1), 1]; its sum with 2 exp(-x²) - 1 is one linear map of it."""
    layer = kafops.KAF(1, 1, gamma=1.0)
    layer.alpha.data.fill_(1.0)
    model = nn.Sequential(nn.Flatten(), linear([[1.0]], [-0.5]), layer, linear([[3.0]], [-1.0]))
    found = propagate(steps(model, (1, 1, 1)), Box(pixels(0.0), pixels(1.5)))
    # kafops.bounds.CurveRanges is exact to 1e-4 Σ|α|.
    assert listed(found.lower) == pytest.approx([3 * math.exp(-1) - 1], abs=1e-3)
    assert listed(found.upper) == pytest.approx([2], abs=1e-3)
    assert listed(found.lower)[0] <= 3 * math.exp(-1) - 1
    assert listed(found.upper)[0] >= 2


def test_a_ball_is_smaller_than_its_box() -> None:
    """By hand: around (0.5, 0.5), w = (3, 4) moves by 5 R over the ball and by 7 R over the box."""
    network = steps(nn.Sequential(nn.Flatten(), linear([[3.0, 4.0]], [0.0])), (1, 1, 2))
    found = propagate(network, l2_ball(pixels(0.5, 0.5), 0.1))
    assert listed(found.lower) == pytest.approx([3.0])
    assert listed(found.upper) == pytest.approx([4.0])
    found = propagate(network, linf_box(pixels(0.5, 0.5), 0.1))
    assert listed(found.lower) == pytest.approx([2.8])
    # At the edge of [0, 1] the box can be less: x ≤ 1 and y ≤ 1.
    found = propagate(network, l2_ball(pixels(1.0, 1.0), 0.1))
    assert listed(found.upper) == pytest.approx([7.0])


def test_winners_that_are_sure() -> None:
    """Of 4 the 2 largest: 3 surely, 0 surely not, and either of two that overlap."""
    network = steps(nn.Sequential(nn.Flatten(), KWinners(0.5)), (1, 1, 4))
    found = propagate(network, Box(pixels(2.9, 0.0, 0.9, 1.1), pixels(3.1, 0.2, 1.3, 1.5)))
    assert listed(found.lower) == pytest.approx([2.9, 0, 0, 0])
    assert listed(found.upper) == pytest.approx([3.1, 0, 1.3, 1.5])
    # All of them negative: a loser is 0, which is more.
    found = propagate(network, Box(pixels(-1.0, -2.0, -3.0, -4.0), pixels(-0.9, -1.9, -2.9, -0.5)))
    assert listed(found.lower) == pytest.approx([-1.0, -2.0, 0, -4.0])
    assert listed(found.upper) == pytest.approx([0, 0, 0, 0])


def samples(box: Box, count: int, generator: torch.Generator) -> Tensor:
    """Points of a box: even ones, and corners, where linear maps are extreme."""
    shares = torch.rand(count, *box.lower.shape, generator=generator, dtype=torch.float64)
    shares[count // 2 :] = shares[count // 2 :].round()
    return box.lower + shares * (box.upper - box.lower)


@pytest.mark.parametrize(("network", "activation"), NETWORKS)
def test_no_image_leaves_the_bounds(network: str, activation: str) -> None:
    model = trained_like(networks.build(network, activation, images.MNIST, seed=2)).double()
    taken = steps(model, (1, 28, 28))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(5, 1, 28, 28, generator=generator, dtype=torch.float64)
    radius = torch.tensor([0.0, 1e-6, 1e-3, 0.1, 1.0], dtype=torch.float64)
    box = linf_box(x, radius)
    found = propagate(taken, box)
    labels = torch.arange(5)
    proved = margins(taken, box, labels)
    slack = 3e-9 if activation == "softplus" else 0.0  # PyTorch's softplus is off by so much, over and over
    for inside in samples(box, 10, generator):
        with torch.no_grad():
            answers = model(inside)
        assert (answers >= found.lower - slack * 1e3).all()
        assert (answers <= found.upper + slack * 1e3).all()
        assert (answers.gather(1, labels[:, None]) - answers >= proved - slack * 1e3).all()
    # Folding the last layer into the margins loses nothing against the two ranges.
    apart = found.lower.gather(1, labels[:, None]) - found.upper
    others = torch.ones_like(proved, dtype=torch.bool).scatter(1, labels[:, None], False)
    assert (proved >= apart - 1e-9 * apart.abs())[others].all()


@pytest.mark.parametrize(("network", "activation"), [NETWORKS[0], NETWORKS[3], NETWORKS[6]])
def test_no_image_of_a_ball_leaves_the_bounds(network: str, activation: str) -> None:
    model = trained_like(networks.build(network, activation, images.MNIST, seed=2)).double()
    taken = steps(model, (1, 28, 28))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 1, 28, 28, generator=generator, dtype=torch.float64)
    radius = torch.tensor([0.0, 1e-3, 0.1, 3.0], dtype=torch.float64)
    ball, box = propagate(taken, l2_ball(x, radius)), propagate(taken, linf_box(x, radius))
    assert (ball.lower >= box.lower - 1e-9 * box.lower.abs()).all()
    assert (ball.upper <= box.upper + 1e-9 * box.upper.abs()).all()
    for _ in range(10):
        delta = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        delta *= (radius / delta.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
        with torch.no_grad():
            answers = model((x + delta).clamp(0, 1))
        assert (answers >= ball.lower).all()
        assert (answers <= ball.upper).all()


def test_a_wider_box_has_wider_bounds() -> None:
    model = trained_like(networks.build(*NETWORKS[0][:2], images.MNIST, seed=2))
    taken = steps(model, (1, 28, 28))
    x = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    widths = []
    for radius in (0.0, 1e-6, 1e-4, 1e-2, 1.0):
        found = propagate(taken, linf_box(x, radius))
        widths.append((found.upper - found.lower).max().item())
    assert widths == sorted(widths)
    assert widths[0] < 1e-6 * widths[-1]


def test_a_point_is_evaluated() -> None:
    x = torch.rand(3, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    model = two_layers()
    torch.testing.assert_close(logits(steps(model, (1, 1, 2)), x).float(), model(x).detach())


def test_infinite_bounds_stay_bounds() -> None:
    """Where everything is possible nothing is proved, and nothing is NaN."""
    network = steps(two_layers(), (1, 1, 2))
    everything = Box(torch.full((1, 1, 1, 2), -math.inf).double(), torch.full((1, 1, 1, 2), math.inf).double())
    found = propagate(network, everything)
    assert listed(found.lower) == [-math.inf, -math.inf]
    assert listed(margins(network, everything, torch.tensor([0]))) == [0, -math.inf]


@pytest.mark.parametrize(
    ("values", "radius", "message"),
    [
        ((0.5, 1.5), 0.1, r"images must be in \[0, 1\]"),
        ((0.5, math.nan), 0.1, r"images must be in \[0, 1\]"),
        ((0.5, 0.5), -0.1, "radius must be a number that is at least 0, or one for each image"),
        ((0.5, 0.5), math.nan, "radius must be"),
    ],
)
def test_what_makes_no_box_is_refused(values: tuple[float, ...], radius: float, message: str) -> None:
    for make in (linf_box, l2_ball):
        with pytest.raises(ValueError, match=message):
            make(pixels(*values), radius)


def test_a_ball_behind_a_norm_by_hand() -> None:
    """(0.5, 0.5) divided by 1/4 is (2, 2), and the ball of 0.1 one of 0.4: w = (3, 4) moves it from 14 by 5 · 0.4."""
    model = nn.Sequential(Normalise((0.0,), (0.25,)), nn.Flatten(), linear([[3.0, 4.0]], [0.0]))
    found = propagate(steps(model, (1, 1, 2)), l2_ball(pixels(0.5, 0.5), 0.1))
    assert listed(found.lower) == pytest.approx([12.0])
    assert listed(found.upper) == pytest.approx([16.0])


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)])
def test_the_worst_point_of_a_ball_is_within_the_bounds(layer: nn.Module) -> None:
    """x + R J / ‖J‖, where a linear output is extreme, which random directions in 18 dimensions do not come near."""
    generator = torch.Generator().manual_seed(0)
    trained_like(layer)
    last = nn.Linear(2 * 9, 3)
    model = nn.Sequential(layer, nn.Flatten(), last).double().eval()
    x, radius = torch.rand(1, 2, 3, 3, generator=generator, dtype=torch.float64) * 0.2 + 0.4, 0.05
    found = propagate(steps(model, (2, 3, 3)), l2_ball(x, radius))
    jacobian = torch.autograd.functional.jacobian(lambda image: model(image)[0], x)[:, 0].flatten(1)
    worst = radius * jacobian.norm(dim=1)
    y = model(x)[0].detach()
    assert (found.upper[0] >= y + worst).all()
    assert (found.lower[0] <= y - worst).all()
    if isinstance(layer, nn.BatchNorm2d):  # one factor a channel: the ball is followed exactly
        torch.testing.assert_close(found.upper[0], y + worst, rtol=1e-6, atol=1e-6)


def test_a_ball_keeps_the_deviation_of_each_channel_when_pixels_are_folded() -> None:
    """Images with σ = (1, 1/10): a sum over the second channel's four pixels is 10 √4 times the radius away."""
    weight = torch.tensor([[0.0] * 4 + [1.0] * 4, [1.0] * 4 + [0.0] * 4])
    model = nn.Sequential(
        Normalise((0.5, 0.5), (1.0, 0.1)), nn.PixelUnshuffle(2), nn.Flatten(), nn.Linear(8, 2, bias=False)
    )
    model[3].weight.data = weight
    network = steps(model.eval(), (2, 2, 2))
    found = propagate(network, l2_ball(torch.full((1, 2, 2, 2), 0.5), 0.1))
    assert listed(found.upper) == pytest.approx([2.0, 0.2], rel=1e-6)
    assert listed(found.lower) == pytest.approx([-2.0, -0.2], rel=1e-6)
