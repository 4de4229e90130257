"""Ranges of activations against dense grids, and constants known by hand."""

import math

import mpmath
import pytest
import torch
from torch import nn

import kafops
from models.activations import ACTIVATIONS, KWinners, activation
from models.certified.scalars import Scalar, scalar
from models.support.errors import UserError

CHANNELS = 3
BASES = ("identity", "relu", "silu", "gelu")
NAMES = [name for name in ACTIVATIONS.names if name != "kwta"]
NAMES += [f"{name}:base={base}" for name in ("kaf", "kaf_free", "kaf_bspline") for base in BASES]


def layer(name: str) -> nn.Module:
    """An activation of three channels, with parameters moved from where they start."""
    torch.manual_seed(0)
    module = activation(name)(CHANNELS).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def intervals() -> tuple[torch.Tensor, torch.Tensor]:  # [40, 3] each
    generator = torch.Generator().manual_seed(1)
    centre = 3 * torch.randn(40, CHANNELS, generator=generator, dtype=torch.float64)
    radius = 10 ** (4 * torch.rand(40, 1, generator=generator, dtype=torch.float64) - 3.5)
    return centre - radius, centre + radius


def sampled(module: nn.Module, lower: torch.Tensor, upper: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and slopes [2001, 40, 3] at even points of each interval, both ends among them."""
    shares = torch.linspace(0, 1, 2001, dtype=torch.float64).view(-1, 1, 1)
    x = (lower + shares * (upper - lower)).flatten(0, 1).requires_grad_()
    y = module(x)
    (slopes,) = torch.autograd.grad(y.sum(), x)
    return y.detach().view(2001, *lower.shape), slopes.view(2001, *lower.shape)


@pytest.mark.parametrize("name", NAMES)
def test_ranges_enclose_and_are_close(name: str) -> None:
    """A grid of 2,000 steps misses an extreme by no more than a step's change of value, or of slope."""
    module = layer(name)
    lower, upper = intervals()
    found = scalar(module)
    values, slopes = sampled(module, lower, upper)
    for (least, most), seen in ((found.values(lower, upper), values), (found.slopes(lower, upper), slopes)):
        # Float64's own rounding in the samples, larger for the sums of a KAF.
        assert (least <= seen.amin(0) + 1e-12).all()
        assert (most >= seen.amax(0) - 1e-12).all()
    least, most = found.values(lower, upper)
    miss = (upper - lower) / 2000 * slopes.abs().amax(0) + (0.02 if name.startswith("kaf") else 1e-8)
    assert (least >= values.amin(0) - miss).all()
    assert (most <= values.amax(0) + miss).all()


@pytest.mark.parametrize("name", NAMES)
def test_lipschitz_constants_are_the_largest_slopes(name: str) -> None:
    module = layer(name)
    x = torch.linspace(-40, 40, 400_001, dtype=torch.float64)[:, None].repeat(1, CHANNELS).requires_grad_()
    (slopes,) = torch.autograd.grad(module(x).sum(), x)
    if ":base=" in name:
        # Beside relu's kink, where the grid has the left side's slope only.
        beside = torch.tensor([-1e-9, 1e-9], dtype=torch.float64)[:, None].repeat(1, CHANNELS).requires_grad_()
        slopes = torch.cat([slopes, torch.autograd.grad(module(beside).sum(), beside)[0]])
    seen = slopes.abs().amax(0)
    constant = scalar(module).lipschitz.expand(CHANNELS)
    assert (constant >= seen * (1 - 1e-12)).all()
    # The limit of SmoothReLU's and softplus's slope is not reached, and a grid of 2e-4 misses second order.
    assert (constant <= seen * (1 + 1e-3)).all()


@pytest.mark.parametrize(
    ("module", "constant"),
    [
        (nn.ReLU(), 1.0),
        (nn.LeakyReLU(-2.0), 2.0),
        (nn.ELU(alpha=3.0), 3.0),
        (nn.SiLU(), 1.0998393194335),
        (nn.GELU(), 0.5 * (1 + math.erf(1)) + math.sqrt(2) * math.exp(-1) / math.sqrt(2 * math.pi)),  # Φ(√2) + √2 φ(√2)
        (nn.Sigmoid(), 0.25),
        (nn.Tanh(), 1.0),
        (nn.Softplus(beta=3.0), 1.0),
        (kafops.KAF(1, 1, gamma=2.0, init=torch.ones_like), 2 / math.sqrt(math.e)),  # α sqrt(2γ / e)
    ],
)
def test_constants_by_hand(module: nn.Module, constant: float) -> None:
    if isinstance(module, kafops.KAF):
        nn.init.ones_(module.alpha)
    assert scalar(module).lipschitz.item() == pytest.approx(constant, rel=1e-9)


def ends(found: Scalar, low: float, high: float) -> tuple[list[float], list[float]]:
    lower, upper = (torch.full((1, 1), x, dtype=torch.float64) for x in (low, high))
    return [x.item() for x in found.values(lower, upper)], [x.item() for x in found.slopes(lower, upper)]


def test_ranges_by_hand() -> None:
    assert ends(scalar(nn.ReLU()), -1, 2) == (pytest.approx([0, 2]), pytest.approx([0, 1]))
    assert ends(scalar(nn.ReLU()), -2, -1) == (pytest.approx([0, 0]), pytest.approx([0, 0]))
    assert ends(scalar(nn.ReLU()), 1, 2) == (pytest.approx([1, 2]), pytest.approx([1, 1]))
    # |x|, with its least value inside.
    assert ends(scalar(nn.LeakyReLU(-1.0)), -1, 2) == (pytest.approx([0, 2]), pytest.approx([-1, 1]))
    # Where SiLU's slope is 0, 1 + x (1 − σ(x)) = 0, its value x σ(x) is x + 1.
    values, slopes = ends(scalar(nn.SiLU()), -3, 0)
    assert values == pytest.approx([-0.27846454276107, 0], abs=1e-12)
    assert slopes == pytest.approx([1 - 1.0998393194335, 0.5], abs=1e-9)
    assert ends(scalar(nn.Tanh()), -1, 2)[1] == pytest.approx([1 - math.tanh(2) ** 2, 1])


def test_a_point_has_the_value_of_the_point() -> None:
    """A KAF's ranges on intervals of width 0 are exact to 1e-12 of its coefficients, so that they do not add up."""
    module = layer("kaf_silu")
    x = torch.linspace(-4, 4, 60, dtype=torch.float64).view(20, 3)
    least, most = scalar(module).values(x, x)
    scale = module.alpha.abs().sum(1)
    assert (least <= module(x)).all()
    assert (most >= module(x)).all()
    assert ((most - least) <= 3e-12 * scale).all()


@pytest.mark.parametrize("base", BASES)
def test_a_point_has_the_value_of_the_point_on_a_base_too(base: str) -> None:
    """Exact to 1e-12 of the coefficients and 64 ε of the point, so also far beyond the dictionary."""
    module = layer(f"kaf:base={base}")
    x = torch.linspace(-40, 40, 81, dtype=torch.float64).view(27, 3)
    least, most = scalar(module).values(x, x)
    assert (least <= module(x)).all()
    assert (most >= module(x)).all()
    assert ((most - least) <= 3e-12 * module.alpha.abs().sum(1) + 3e-14 * x.abs()).all()


@pytest.mark.parametrize("base", ["silu", "gelu"])
def test_a_base_alone_is_enclosed_in_30_digits(base: str) -> None:
    """Where float64 rounds it, by half of its last digit and more."""
    module = kafops.KAF(1, base=base, dtype=torch.float64)
    x = torch.linspace(-9, 30, 300, dtype=torch.float64)[:, None]
    least, most = scalar(module).values(x, x)
    with mpmath.workdps(30):
        for place, low, high in zip(x[:, 0].tolist(), least[:, 0].tolist(), most[:, 0].tolist(), strict=True):
            exact = place * (mpmath.ncdf(place) if base == "gelu" else 1 / (1 + mpmath.exp(-place)))
            assert mpmath.mpf(low) <= exact <= mpmath.mpf(high)


@pytest.mark.parametrize("base", BASES)
def test_infinite_intervals_on_a_base(base: str) -> None:
    module = layer(f"kaf:base={base}")
    wide = torch.full((1, CHANNELS), torch.inf, dtype=torch.float64)
    least, most = scalar(module).values(-wide, wide)
    assert (most == torch.inf).all()
    assert (least == -torch.inf).all() if base == "identity" else least.isfinite().all()
    for lower, upper in ((-wide, wide), (-wide, 0 * wide.nan_to_num()), (wide, wide)):
        values, slopes = scalar(module).values(lower, upper), scalar(module).slopes(lower, upper)
        assert not any(t.isnan().any() for t in (*values, *slopes))
        assert all(t.isfinite().all() for t in slopes)


def test_channels_of_a_layer_are_taken_as_dimension_1() -> None:
    module, other = layer("kaf:base=gelu"), layer("kaf:base=gelu")
    other.channel_dim = -1
    lower, upper = (x.view(4, 10, CHANNELS).movedim(2, 1) for x in intervals())
    for name in ("values", "slopes"):
        for a, b in zip(
            getattr(scalar(module), name)(lower, upper), getattr(scalar(other), name)(lower, upper), strict=True
        ):
            assert torch.equal(a, b)
    assert other.channel_dim == -1


def test_infinite_intervals_are_enclosed() -> None:
    module = layer("kaf")
    wide = torch.full((1, CHANNELS), torch.inf, dtype=torch.float64)
    least, most = scalar(module).values(-wide, wide)
    bounds = module.bounds().value
    assert (least <= bounds.minimum + 1e-9).all()
    assert (most >= bounds.maximum - 1e-9).all()
    assert least.isfinite().all()


def test_softplus_has_slope_one_above_its_threshold() -> None:
    """As PyTorch's: autograd says 1.0 where the formula says sigmoid(25) = 1 - 1.4e-11."""
    found = scalar(nn.Softplus(beta=2.0))
    for low, high in ((1.0, 10.5), (10.5, 11.0), (9.0, 10.0)):
        assert ends(found, low, high)[1][1] >= 1.0
    assert ends(found, 8.0, 9.0)[1][1] < 1.0


@pytest.mark.parametrize("options", [{"threshold": 1.0}, {"threshold": 19.9}, {"beta": -1.0}])
def test_a_softplus_that_jumps_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match="Softplus with beta > 0 and threshold >= 20, got beta="):
        scalar(nn.Softplus(**options))


def test_what_is_no_scalar_is_named() -> None:
    with pytest.raises(UserError, match="no bounds are known for the activation KWinners"):
        scalar(KWinners())
    with pytest.raises(UserError, match="GELU with approximate='none', got 'tanh'"):
        scalar(nn.GELU(approximate="tanh"))


def test_softplus_above_its_threshold_is_x_itself() -> None:
    """There log(1 + exp(x)) is more than PyTorch's value, x: a range of the former alone would miss it."""
    x = torch.linspace(20.0, 21.0, 11, dtype=torch.float64)[1:, None]
    y = nn.Softplus()(x)
    assert y.equal(x)
    least, most = scalar(nn.Softplus()).values(x, x)
    assert (least <= y).all()
    assert (most >= y).all()
