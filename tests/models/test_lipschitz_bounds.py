"""Upper bounds of Lipschitz constants: by hand, against singular values, and against every pair of images tried."""

import math

import pytest
import torch
from torch import Tensor, nn
from trained_networks import NETWORKS, trained_like

import kafops
from models import images, networks
from models.activations import KWinners
from models.certified.lipschitz import Chain, upper_bound
from models.certified.local_lipschitz import local_bound
from models.certified.traced import steps
from models.images import ImageFormat
from models.networks.blocks import Normalise
from models.networks.resnet import PadShortcut

SMALL = ImageFormat(1, 12, 4, (0.3,), (0.5,))
SMOOTH = [(network, activation) for network, activation in NETWORKS if not activation.startswith("kwta")]


def linear(rows: list[list[float]], bias: bool = False) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=bias)
    layer.weight.data = torch.tensor(rows)
    return layer


def upper(model: nn.Module, *shape: int) -> float:
    return upper_bound(steps(model.eval(), shape)).upper.item()


def kaf(alpha: list[list[float]], gamma: float) -> kafops.KAF:
    """One node at 0: slopes up to |α| sqrt(2γ / e)."""
    layer = kafops.KAF(len(alpha), 1, gamma=gamma)
    layer.alpha.data = torch.tensor(alpha)
    return layer


def test_two_layers_by_hand() -> None:
    """Below are the two layers without ReLU, whose slopes are at most 1; above the product by hand with T.

    S = (1, 1), r = (3, 4), q = (1, √5): T² = q / r = (1/3, √5/4), and ‖T A₁‖ = max(3 T_1, 4 T_2) = 4 T_2 = 2 · 5^(1/4).
    """
    flat = nn.Flatten()
    first, last = linear([[3.0, 0.0], [0.0, 4.0]]), linear([[1.0, 1.0], [0.0, 2.0]])
    assert upper(nn.Sequential(flat, first), 1, 1, 2) == pytest.approx(4)
    found = upper(nn.Sequential(flat, first, nn.ReLU(), last), 1, 1, 2)
    assert found >= torch.linalg.svdvals(last.weight @ first.weight)[0].item()
    turn = torch.tensor([1 / 3, math.sqrt(5) / 4]).sqrt()
    assert found == pytest.approx(2 * 5**0.25 * torch.linalg.svdvals(last.weight / turn)[0].item(), rel=1e-6)


def test_diagonal_networks_are_exact() -> None:
    """In a chain of diagonal matrices and slopes T brings each product together: max of (2 · 5, 3 · 7) · slopes."""
    slope = math.sqrt(2 * 0.5 / math.e)  # of α = 1, γ = 1/2
    model = nn.Sequential(
        nn.Flatten(), linear([[2.0, 0.0], [0.0, 30.0]]), kaf([[1.0], [-0.1]], 0.5), linear([[5.0, 0.0], [0.0, 7.0]])
    )
    assert upper(model, 1, 1, 2) == pytest.approx(max(2 * slope * 5, 30 * 0.1 * slope * 7), rel=1e-6)


def test_a_norm_is_folded_in() -> None:
    """A batch norm of factors 10 and 0.1 on a kernel that feeds them 0.1 and 10: together no more than 1."""
    norm = nn.BatchNorm2d(2, eps=0.0)
    norm.running_var.copy_(torch.tensor([1.0, 100.0]))
    norm.weight.data = torch.tensor([10.0, 1.0])
    norm.running_mean.copy_(torch.tensor([5.0, -3.0]))
    conv = nn.Conv2d(2, 2, 1, bias=False)
    conv.weight.data = torch.tensor([[0.1, 0.0], [0.0, 10.0]]).view(2, 2, 1, 1)
    for model in (nn.Sequential(conv, norm, nn.Flatten()), nn.Sequential(norm, conv, nn.Flatten())):
        assert upper(model, 2, 3, 3) == pytest.approx(1)


class Residual(nn.Module):
    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut, self.flat = branch, shortcut, nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.shortcut(x) + self.branch(x))


def one_by_one(*factors: float) -> nn.Conv2d:
    conv = nn.Conv2d(len(factors), len(factors), 1, bias=False)
    conv.weight.data = torch.diag(torch.tensor(factors)).view(len(factors), len(factors), 1, 1)
    return conv


def test_a_branch_is_added_to_the_shortcut() -> None:
    """x + c x: 1 + |c|, exact for positive c."""
    assert upper(Residual(one_by_one(3.0), nn.Identity()), 1, 4, 4) == pytest.approx(4)
    assert upper(Residual(one_by_one(3.0), one_by_one(-2.0)), 1, 4, 4) == pytest.approx(5)
    both = nn.Sequential(nn.ReLU(), one_by_one(0.5))
    assert upper(nn.Sequential(one_by_one(2.0), Residual(both, nn.Identity())), 1, 4, 4) == pytest.approx(3)


@pytest.mark.parametrize(
    ("model", "shape", "wanted"),
    [
        (Normalise((0.1, 0.2), (0.5, 0.25)), (2, 4, 4), 4),
        (nn.MaxPool2d(2), (1, 4, 4), 1),
        (nn.MaxPool2d(3, 2, 1), (1, 4, 4), 2),  # a value is in 2 × 2 windows
        (nn.AvgPool2d(2), (1, 4, 4), 0.5),  # 2 × 2 equal values move their mean by as much, of norm 1/2
        (nn.AdaptiveAvgPool2d(1), (1, 4, 4), 0.25),
        (nn.PixelUnshuffle(2), (1, 4, 4), 1),
        (PadShortcut(1, 3, 2), (1, 4, 4), 1),
        (nn.Dropout(0.5), (1, 4, 4), 1),
        (nn.SiLU(), (1, 4, 4), 1.0998393194335),
    ],
)
def test_single_modules_by_hand(model: nn.Module, shape: tuple[int, ...], wanted: float) -> None:
    assert upper(nn.Sequential(model, nn.Flatten()), *shape) == pytest.approx(wanted)


def test_k_winners_jump() -> None:
    bound = upper_bound(steps(nn.Sequential(nn.Flatten(), KWinners(0.5), linear([[1.0, 1.0], [1.0, 0.0]])), (1, 1, 2)))
    assert bound.upper.item() == math.inf
    assert bound.layers[-1].bound == math.inf


def test_a_channel_that_does_not_pass_counts_for_nothing() -> None:
    """The second channel is multiplied by 0 behind the first convolution, so its 1000 does not matter."""
    norm = nn.BatchNorm2d(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 0.0])
    model = nn.Sequential(one_by_one(2.0, 1000.0), norm, nn.ReLU(), one_by_one(3.0, 1.0), nn.Flatten())
    assert 6 <= upper(model, 2, 3, 3) <= 6.01


def test_differences_of_logits() -> None:
    bound = upper_bound(steps(nn.Sequential(nn.Flatten(), linear([[1.0, 0.0], [0.0, 2.0], [1.0, 0.5]])), (1, 1, 2)))
    found = bound.margins(torch.tensor([0, 2]))
    wanted = torch.tensor([[0, math.sqrt(5), 0.5], [0.5, math.sqrt(1 + 1.5**2), 0]], dtype=torch.float64)
    torch.testing.assert_close(found, wanted)
    # Without a last linear layer two logits together change by at most sqrt(2) times all of them.
    bound = upper_bound(steps(nn.Sequential(nn.Flatten(), nn.ReLU()), (1, 1, 2)))
    torch.testing.assert_close(bound.margins(torch.tensor([1])), torch.tensor([[math.sqrt(2), 0]], dtype=torch.float64))


def pairs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Images, and others that are far away, near, and very near."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(40, *shape, generator=generator, dtype=torch.float64)
    other = torch.rand(40, *shape, generator=generator, dtype=torch.float64)
    share = (10.0 ** -torch.arange(40) / 8).double().view(-1, 1, 1, 1).clamp(min=1e-5)
    return x, x + share * (other - x)


def jacobians(model: nn.Module, x: Tensor) -> Tensor:  # [N, K, pixels]
    x = x.detach().requires_grad_()
    answers = model(x)
    rows = [torch.autograd.grad(logit.sum(), x, retain_graph=True)[0].flatten(1) for logit in answers.T]
    return torch.stack(rows, 1)


@pytest.mark.parametrize(("network", "activation"), SMOOTH)
def test_no_image_violates_the_bound(network: str, activation: str) -> None:
    model = trained_like(networks.build(network, activation, images.MNIST, seed=1)).double()
    bound = upper_bound(steps(model, (1, 28, 28)))
    x, other = pairs((1, 28, 28))
    with torch.no_grad():
        ratio = (model(x) - model(other)).norm(dim=1) / (x - other).flatten(1).norm(dim=1)
    jacobian = jacobians(model, x[:5])
    for found in (ratio.max(), torch.linalg.svdvals(jacobian).max()):
        assert found.item() <= bound.upper.item()
    differences = jacobian[:, :, None] - jacobian[:, None]  # [N, K, K, pixels]
    assert (differences.norm(dim=3) <= bound.before * bound.differences + 1e-12).all()


@pytest.mark.parametrize(("network", "activation"), [*SMOOTH[:4], SMOOTH[5]])
def test_no_image_of_a_ball_violates_its_bound(network: str, activation: str) -> None:
    model = trained_like(networks.build(network, activation, images.MNIST, seed=1)).double()
    taken = steps(model, (1, 28, 28))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6, 1, 28, 28, generator=generator, dtype=torch.float64)
    radius = torch.tensor([0.0, 1e-4, 1e-2, 0.1, 0.5, 2.0], dtype=torch.float64)
    bound = local_bound(taken, x, radius)
    assert (bound.upper <= upper_bound(taken).upper * (1 + 1e-6)).all()
    for _ in range(5):
        delta = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        delta *= (radius / delta.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
        inside = (x + delta).clamp(0, 1)
        assert (torch.linalg.svdvals(jacobians(model, inside))[:, 0] <= bound.upper).all()


def test_local_slopes_are_those_of_the_ball() -> None:
    """By hand: -1 + x, with x in [0.1, 0.3], is in [-0.9, -0.7], where ReLU's slope is 0 and SiLU's is known."""
    first = linear([[1.0]], bias=True)
    first.bias.data.fill_(-1.0)
    x = torch.tensor([[[[0.2]]]], dtype=torch.float64)
    last = linear([[1.0], [-1.0]])
    relu = steps(nn.Sequential(nn.Flatten(), first, nn.ReLU(), last), (1, 1, 1))
    assert local_bound(relu, x, 0.1).upper.item() == pytest.approx(0, abs=1e-9)
    assert local_bound(relu, x, 0.9).upper.item() == pytest.approx(math.sqrt(2))
    silu = steps(nn.Sequential(nn.Flatten(), first, nn.SiLU(), last), (1, 1, 1))

    def slope(z: float) -> float:
        s = 1 / (1 + math.exp(-z))
        return s * (1 + z * (1 - s))

    found = local_bound(silu, x, 0.1).upper.item()
    assert found == pytest.approx(math.sqrt(2) * slope(-0.7), rel=1e-6)
    assert upper_bound(silu).upper.item() == pytest.approx(math.sqrt(2) * 1.0998393194335)


def test_entries_change_by_less_than_the_whole() -> None:
    """By hand: rows (1, 1) and (0, 3) of a linear layer have norms sqrt(2) and 3; entries of the image change by 1."""
    network = steps(nn.Sequential(nn.Flatten(), linear([[1.0, 1.0], [0.0, 3.0]]), nn.ReLU()), (1, 1, 2))
    chain = Chain(network)
    reaches = []
    for number in range(len(network)):
        reaches.append(chain.step(number, reaches))
    wanted = torch.tensor([[math.sqrt(2), 3]], dtype=torch.float64)
    for reach in reaches[2:]:
        torch.testing.assert_close(reach.entries, wanted)


def test_the_table_ends_with_the_bound() -> None:
    model = networks.build("resnet20:width=2,patch=4", "kaf", images.MNIST, seed=0)
    bound = upper_bound(steps(model, (1, 28, 28)))
    names = [layer.name for layer in bound.layers]
    assert names[0] == "stem"
    assert names[-1] == "classifier"
    assert bound.layers[-1].bound == pytest.approx(bound.upper.item())
    activations = [layer for layer in bound.layers if layer.kind == "activation"]
    slopes = [m.bounds().lipschitz.max().item() for m in model.modules() if isinstance(m, kafops.KAF)]
    assert [layer.slope for layer in activations] == pytest.approx(slopes)


def test_negative_weights_of_a_norm_stretch_as_much_as_positive_ones() -> None:
    norm = nn.BatchNorm2d(2, eps=0.0)
    norm.weight.data = torch.tensor([-10.0, 1.0])
    assert upper(nn.Sequential(norm, nn.ReLU(), nn.Flatten()), 2, 3, 3) == pytest.approx(10)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), norm, nn.ReLU(), nn.Flatten(), linear([[1.0] * 8]))
    model[0].weight.data = torch.ones(2, 1, 1, 1)
    x = torch.full((1, 1, 2, 2), 0.5, requires_grad=True)
    norm.bias.data.fill_(20.0)
    slope = torch.autograd.grad(model.eval()(x).sum(), x)[0].norm().item()
    assert slope == pytest.approx(2 * 9)  # 1 - 10 in each of 4 pixels
    assert upper(model, 1, 2, 2) >= slope


def test_with_one_channel_an_images_bound_is_its_own_alone() -> None:
    """Steep around 0 and flat far from it: the image where the curve is flat must not get the other one's reach."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(),
        linear([[3.0]]),
        nn.Tanh(),
        linear([[3.0]]),
        nn.Tanh(),
        linear([[2.0]]),
        nn.Tanh(),
        linear([[1.0]]),
    )
    network = steps(model.eval(), (1, 1, 1))
    x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    both = local_bound(network, x, 0.1).upper
    alone = torch.cat([local_bound(network, one[None], 0.1).upper for one in x])
    torch.testing.assert_close(both, alone, rtol=1e-9, atol=0)
    assert alone[0] > 10 * alone[1]


class _Sum(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module, *after: nn.Module) -> None:
        super().__init__()
        self.left, self.right, self.after = left, right, nn.Sequential(*after)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.left(x) + self.right(x))


def _scales(*values: float) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(values), eps=0.0)
    norm.weight.data = torch.tensor(values)
    return norm


@pytest.mark.parametrize("turned", [False, True])
def test_a_sum_is_as_steep_as_both_of_its_parts(turned: bool) -> None:
    """(x, x/100) + (x/100, x): the scales of either part alone would be 100 times too small for one channel."""
    parts = [_scales(1.0, 0.01), _scales(0.01, 1.0)]
    for channel in ([[0.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]):
        left, right = reversed(parts) if turned else parts
        model = _Sum(left, right, nn.Flatten(), linear(channel))
        assert upper(model, 2, 1, 1) >= 1.01


@pytest.mark.parametrize("turned", [False, True])
def test_the_entries_of_a_sum_go_as_far_as_both_of_its_parts(turned: bool) -> None:
    """sigmoid(x/1000 + 40 x - 30) is flat at 1/2 and has slope 10 at 3/4, which the steeper part alone reaches."""
    parts = [nn.Linear(1, 1), nn.Linear(1, 1)]
    for part, weight, bias in zip(parts, (0.001, 40.0), (0.0, -30.0), strict=True):
        part.weight.data, part.bias.data = torch.tensor([[weight]]), torch.tensor([bias])
    left, right = (nn.Sequential(nn.Flatten(), part) for part in (reversed(parts) if turned else parts))
    model = _Sum(left, right, nn.Sigmoid(), linear([[1.0], [0.0]]))
    network = steps(model.eval(), (1, 1, 1))
    assert local_bound(network, torch.full((1, 1, 1, 1), 0.5), 0.25).upper.item() >= 40.001 / 4 * (1 - 1e-3)
