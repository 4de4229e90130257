import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kafops
from models.activations import ACTIVATIONS, KWinners, SmoothReLU, activation

POINTS = [-3.0, -1.5, -0.25, 0.0, 0.25, 1.5, 3.0]
KAFS = [name for name in ACTIVATIONS.names if name.startswith("kaf")]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def make(text: str, channels: int) -> nn.Module:
    """Return a layer in float64 with reproducible random curves."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return activation(text)(channels).double()


DEFINITIONS: dict[str, Callable[[float], float]] = {
    "relu": lambda x: max(x, 0),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "leaky_relu:slope=1/8": lambda x: x if x > 0 else x / 8,
    "prelu": lambda x: x if x > 0 else x / 4,
    "elu": lambda x: x if x > 0 else math.exp(x) - 1,
    "silu": lambda x: x * sigmoid(x),
    "swish": lambda x: x * sigmoid(x),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "softplus": lambda x: math.log(1 + math.exp(x)),
    "softplus:beta=5": lambda x: math.log(1 + math.exp(5 * x)) / 5,
    "smoothrelu": lambda x: x - math.log(1 + 400 * x) / 400 if x > 0 else 0,
    "pssilu": lambda x: x * (sigmoid(x) - 1e-8) / (1 - 1e-8),
    "tanh": lambda x: (math.exp(x) - math.exp(-x)) / (math.exp(x) + math.exp(-x)),
    "sigmoid": sigmoid,
}


@pytest.mark.parametrize("text", DEFINITIONS)
def test_definition(text: str) -> None:
    """In float64, up to a few roundings of relative size 1e-16; softplus loses some more near 1."""
    y = make(text, 1)(torch.tensor(POINTS, dtype=torch.float64).view(-1, 1)).flatten()
    wanted = torch.tensor([DEFINITIONS[text](x) for x in POINTS], dtype=torch.float64)
    torch.testing.assert_close(y.detach(), wanted, rtol=1e-12, atol=1e-15)


def test_every_activation_has_a_definition_here() -> None:
    """Those without one, k-WTA and the KAFs, have tests of their own below."""
    names = {ACTIVATIONS.parse(text)[0] for text in DEFINITIONS}
    assert names | {"kwta"} | set(KAFS) == set(ACTIVATIONS.names)


def rational_quadratic(u: float) -> float:
    return 1 / (1 + u * u)


def matern32(u: float) -> float:
    return (1 + math.sqrt(2) * abs(u)) * math.exp(-math.sqrt(2) * abs(u))


def bspline(u: float) -> float:
    w = abs(u) * math.sqrt(2 / 3)
    return (max(2 - w, 0) ** 3 - 4 * max(1 - w, 0) ** 3) / 4


OTHER_KERNELS = {"kaf_rq": rational_quadratic, "kaf_matern": matern32, "kaf_bspline": bspline}


@pytest.mark.parametrize("name", KAFS)
def test_kaf_is_its_sum_of_kernels(name: str) -> None:
    kernel = OTHER_KERNELS.get(name, lambda u: math.exp(-u * u))
    layer = make(f"{name}:dictionary_size=9,boundary=3", 3)
    alpha, gamma, points = layer.alpha.tolist(), layer.bandwidths().tolist(), layer.points().expand(3, 9).tolist()
    torch.testing.assert_close(layer.points()[0], torch.linspace(-3, 3, 9, dtype=torch.float64), rtol=0, atol=1.2e-7)
    y = layer(torch.tensor(POINTS, dtype=torch.float64).view(-1, 1).expand(-1, 3))
    wanted = [
        [
            sum(a * kernel(math.sqrt(gamma[c]) * (x - d)) for a, d in zip(alpha[c], points[c], strict=True))
            for c in range(3)
        ]
        for x in POINTS
    ]
    torch.testing.assert_close(y.detach(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-9)


FITS = {
    "kaf_relu": "relu",
    "kaf_elu": "elu",
    "kaf_silu": "silu",
    "kaf_tanh": "tanh",
    **dict.fromkeys(OTHER_KERNELS, "elu"),
}


@pytest.mark.parametrize("name", FITS)
def test_kaf_fits_its_function_on_the_dictionary(name: str) -> None:
    """A ridge fit misses its target on the points by 1e-6 alpha; alpha in float32 adds 20 · 100 · 6e-8 at most."""
    layer = make(name, 2)
    points = layer.points().detach().T.expand(-1, 2)
    miss = make(FITS[name], 2)(points) - layer(points)
    torch.testing.assert_close(miss.detach(), 1e-6 * layer.alpha.detach().T, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", KAFS)
@pytest.mark.parametrize("base", ["identity", "relu", "silu", "gelu"])
def test_every_kaf_takes_a_base(name: str, base: str) -> None:
    """Beneath its sum of kernels, of the same start but for fits, which are to what the base lacks."""
    layer, plain = make(f"{name}:base={base}", 3), make(name, 3)
    assert layer.base == base
    assert make(f"{name}:base=none", 3).base is None
    assert torch.equal(layer.points(), plain.points())
    far = torch.tensor([[-50.0] * 3, [50.0] * 3], dtype=torch.float64)
    beyond = 1e-3 * layer.alpha.abs().sum().item() if name == "kaf_rq" else 1e-12  # its tails are slow
    torch.testing.assert_close(layer(far).detach(), kafops.bases.value(base, far), rtol=1e-12, atol=beyond)
    if name in ("kaf", "kaf_free"):
        assert torch.equal(layer.alpha, plain.alpha)
    elif name != "kaf_isometric":
        on_points = layer.points().expand(3, -1).T
        torch.testing.assert_close(layer(on_points), plain(on_points), rtol=0, atol=1e-3)


def test_a_kaf_on_what_it_is_fitted_to_is_that() -> None:
    for name, base in (("kaf_relu", "relu"), ("kaf_silu", "silu")):
        assert not make(f"{name}:base={base}", 3).alpha.any()


@pytest.mark.parametrize(("text", "std"), [("kaf", 0.3), ("kaf:std=0.8", 0.8), ("kaf_free:std=0.05", 0.05)])
def test_random_kaf_has_the_deviation_asked_for(text: str, std: float) -> None:
    """4000 coefficients: their deviation is within 4 / sqrt(2 · 4000) of the truth, 4.5 %."""
    assert make(text, 200).alpha.std().item() == pytest.approx(std, rel=0.045)


def test_isometric_kaf_keeps_gradients_in_scale() -> None:
    layer = make("kaf_isometric", 8)
    factor = kafops.init.gradient_factor(layer.alpha, layer.bandwidths(), layer.points())
    assert factor.max() <= math.sqrt(1.1) + 1e-6  # the bound of kafops.init.Isometric, in float32


def test_free_kaf_trains_points_and_bandwidths_and_the_others_do_not() -> None:
    parameters = {name: {n: list(p.shape) for n, p in make(name, 3).named_parameters()} for name in KAFS}
    assert parameters.pop("kaf_free") == {"alpha": [3, 20], "log_gamma": [3], "dictionary": [3, 20]}
    assert all(p == {"alpha": [3, 20]} for p in parameters.values())


def test_prelu_has_a_slope_per_channel() -> None:
    layer = make("prelu", 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 0.0, -1.0]))
    assert layer(torch.full((1, 3, 2, 2), -2.0).double())[0, :, 0, 0].tolist() == [-1.0, 0.0, 2.0]


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS.names if name != "kwta"])
def test_takes_any_rank_and_channels_are_dimension_1(name: str) -> None:
    """The same values as rows [N, C] and as maps: one function of the value and its channel, whatever the rank."""
    layer = make(name, 3)
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = layer(rows)
    maps = rows.view(2, 4, 5, 3).movedim(3, 1)
    torch.testing.assert_close(layer(maps).movedim(1, 3).reshape(40, 3), y)
    torch.testing.assert_close(layer(maps.flatten(2)).movedim(1, 2).reshape(40, 3), y)


@pytest.mark.parametrize("name", ACTIVATIONS.names)
def test_gradient_of_values_and_parameters_is_that_of_the_function(name: str) -> None:
    """Against central differences, away from the kink at 0 and from ties."""
    layer = make(name, 2)
    x = torch.tensor([[-2.0, 1.0], [0.7, -0.4], [0.3, 2.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *parameters: torch.func.functional_call(
            layer, dict(zip(dict(layer.named_parameters()), parameters, strict=True)), x
        ),
        (x, *layer.parameters()),
        eps=1e-9 if name == "pssilu" else 1e-6,  # b = 1e-8 is a step away from the kink of |b|
        atol=1e-4,
    )


@pytest.mark.parametrize("name", ACTIVATIONS.names)
def test_far_values_give_no_nan(name: str) -> None:
    layer = activation(name)(2)
    x = torch.tensor([[-1e4, 1e4], [0.0, -0.0], [-60.0, 60.0]], requires_grad=True)
    y = layer(x)
    y.sum().backward()
    tensors = [y, x.grad, *(p.grad for p in layer.parameters())]
    assert all(t is not None and t.isfinite().all() for t in tensors)


def test_smoothrelu_is_smooth_at_0_and_learns_one_number_for_the_layer() -> None:
    layer = SmoothReLU(1.5).double()
    beta = 1.5**2
    x = torch.tensor([-1.0, 0.0, 1e-6, 0.5], dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    wanted = torch.tensor([0, 0, beta * 1e-6 / (1 + beta * 1e-6), beta * 0.5 / (1 + beta * 0.5)], dtype=torch.float64)
    torch.testing.assert_close(x.grad, wanted)
    assert [list(p.shape) for p in layer.parameters()] == [[]]


def pssilu_network() -> nn.Module:
    factory = activation("pssilu")
    return nn.Sequential(nn.Linear(2, 3), factory(3), nn.Linear(3, 3), factory(3))


def test_pssilu_layers_share_one_pair() -> None:
    network = pssilu_network()
    assert len([p for p in network.parameters() if p.dim() == 0]) == 2
    network(torch.randn(4, 2, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    with torch.no_grad():
        network[1].a.fill_(2.0)
    assert network[3].a == 2


def test_pssilu_pairs_of_two_networks_are_two() -> None:
    first, second = pssilu_network(), pssilu_network()
    assert first[1].a is not second[1].a


def test_pssilu_sharing_survives_copies_casts_and_state_dicts() -> None:
    network = pssilu_network()
    with torch.no_grad():
        network[1].a.fill_(-1.5)
        network[1].b.fill_(0.25)
    loaded = pssilu_network()
    loaded.load_state_dict(network.state_dict())
    for other in (copy.deepcopy(network), copy.deepcopy(network).double(), loaded):
        assert other[1].a is other[3].a
        assert other[1].a is not network[1].a
        assert (other[1].a.item(), other[3].b.item()) == (-1.5, 0.25)


def test_pssilu_formula_with_trained_parameters() -> None:
    layer = make("pssilu", 1)
    with torch.no_grad():
        layer.a.fill_(-2.0)
        layer.b.fill_(-0.25)
    wanted = 1.5 * (sigmoid(3.0) - 0.25) / 0.75
    assert layer(torch.tensor([[1.5]], dtype=torch.float64)).item() == pytest.approx(wanted, rel=1e-12)


def test_pssilu_moves_b_from_its_start_in_float32() -> None:
    """df/db = x (σ(x) - 1) / (1 - b)² at b > 0, though 1 - 1e-8 is 1 in float32."""
    layer = activation("pssilu")(1)
    layer(torch.tensor([[2.0]])).sum().backward()
    assert layer.b.grad.item() == pytest.approx(2 * (sigmoid(2.0) - 1), rel=1e-5)


@pytest.mark.parametrize("b", [1.0, -1.0, 3.0])
def test_pssilu_stays_off_its_pole(b: float) -> None:
    layer = make("pssilu", 1)
    with torch.no_grad():
        layer.b.fill_(b)
    y = layer(torch.tensor([[2.0]], dtype=torch.float64))
    y.sum().backward()
    assert y.item() == pytest.approx(2 * (sigmoid(2.0) - 0.99) / 0.01, rel=1e-12)
    assert layer.b.grad.item() == 0


def distinct(*shape: int) -> Tensor:
    """Return values without ties, about half of them negative."""
    n = math.prod(shape)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    return (order - n // 2 + 0.5).double().view(shape)


@pytest.mark.parametrize(("ratio", "k"), [("0.2", 12), ("0.01", 1), ("0.19", 12), ("1", 60), ("7/60", 7), ("1e-6", 1)])
def test_kwta_keeps_exactly_the_k_largest_of_a_volume(ratio: str, k: int) -> None:
    """k = ceil(ratio · 60), at least 1."""
    x = distinct(2, 3, 4, 5)
    y = activation(f"kwta:ratio={ratio}")(3)(x)
    for before, after in zip(x.flatten(1), y.flatten(1), strict=True):
        kept = after != 0
        assert kept.sum() == k
        assert torch.equal(after[kept], before[kept])
        assert before[kept].min() > (before[~kept].max() if k < 60 else -math.inf)


def test_kwta_per_channel_keeps_k_of_each_map() -> None:
    x = distinct(2, 3, 4, 5)
    y = activation("kwta:ratio=0.2,per=channel")(3)(x)
    assert (y != 0).sum((2, 3)).eq(4).all()  # ceil(0.2 · 20)
    assert torch.equal(y[0, 1], KWinners(0.2)(x[:1, 1:2])[0, 0])


def test_kwta_of_a_dense_layer_is_over_its_outputs_in_both_cases() -> None:
    x = distinct(4, 10)
    volume, channel = (activation(f"kwta:per={per}")(10)(x) for per in ("volume", "channel"))
    assert (volume != 0).sum(1).eq(2).all()
    assert torch.equal(volume, channel)


def test_kwta_keeps_all_values_that_tie_with_the_last_winner() -> None:
    y = KWinners(0.4)(torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0]]))
    assert y.tolist() == [[3, 0, 2, 2, 2]]


def test_kwta_images_do_not_influence_each_other() -> None:
    x = distinct(3, 2, 4, 4)
    layer = KWinners(0.3)
    assert torch.equal(layer(x), torch.cat([layer(one[None]) for one in x]))


def test_kwta_gradient_is_that_of_its_mask() -> None:
    x = distinct(2, 3, 4).requires_grad_()
    y = KWinners(0.25)(x)
    gradient = distinct(2, 3, 4) + 100
    (found,) = torch.autograd.grad(y, x, gradient)
    assert torch.equal(found, gradient * (y != 0))


def test_kwta_shows_a_nan() -> None:
    assert KWinners(0.5)(torch.tensor([[1.0, math.nan, 3.0, 2.0]])).isnan().any()


def test_kwta_ratio_moves_linearly_to_its_end_and_is_in_the_state_dict() -> None:
    layer, x = activation("kwta:ratio=0.5,end=0.1")(1), distinct(1, 1, 100)
    kept = {}
    for progress in (0.0, 0.25, 0.5, 1.0):
        layer.set_progress(progress)
        kept[progress] = int((layer(x) != 0).sum())
    assert kept == {0.0: 50, 0.25: 40, 0.5: 30, 1.0: 10}
    other = activation("kwta:ratio=0.5,end=0.1")(1)
    other.load_state_dict(layer.state_dict())
    assert (other(x) != 0).sum() == 10
    assert (copy.deepcopy(layer)(x) != 0).sum() == 10


def test_kwta_without_end_keeps_its_ratio() -> None:
    layer, x = activation("kwta:ratio=0.3")(1), distinct(1, 1, 100)
    layer.set_progress(1.0)
    assert (layer(x) != 0).sum() == 30


@pytest.mark.parametrize("n", [5, 10, 25088, 65536, 1_000_000])
@pytest.mark.parametrize("hundredths", [5, 7, 20, 29, 57])
def test_kwta_rounding_never_adds_a_winner(n: int, hundredths: int) -> None:
    """0.2 in float32 is above 0.2, and 0.07 · 100 is 7.000000000000001 even in float64."""
    assert KWinners(hundredths / 100).winners(n) == -(-hundredths * n // 100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rleu", r"unknown activation 'rleu'.*did you mean relu"),
        ("swihs", r"unknown activation 'swihs'.*did you mean swish"),
        ("relu:slope=1", "activation 'relu' has no option 'slope': it has none"),
        ("kwta:raito=0.1", r"no option 'raito': it has ratio, per, end; did you mean ratio"),
        ("kwta:ratio=0", "ratio, the share of values that k-WTA keeps, must be above 0, at most 1, got 0"),
        ("kwta:ratio=1.5", "must be above 0, at most 1, got 1.5"),
        ("kwta:end=0", "end, the share of values"),
        ("kwta:per=pixel", "per must be 'volume' or 'channel', got 'pixel'"),
        ("softplus:beta=0", "'beta' of activation 'softplus' must be above 0, got 0"),
        ("kaf:dictionary_size=1", "'dictionary_size' of a KAF must be at least 2, got 1"),
        ("kaf_silu:boundary=0", "boundary must be a positive finite number, got boundary=0"),
        ("kaf:std=-1", "std must be a finite number ≥ 0, got std=-1"),
        ("kaf:base=sigmoid", "base must be None or one of 'identity', 'relu', 'silu', 'gelu', got 'sigmoid'"),
        ("kaf_isometric:boundary=0.2", "init 'isometric' wants"),
    ],
)
def test_refuses_at_once(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        activation(text)


def test_kwta_refuses_progress_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"progress must be in \[0, 1\], got 1.5"):
        KWinners().set_progress(1.5)


def test_looking_up_an_activation_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    for name in ACTIVATIONS.names:
        activation(name)
    assert torch.equal(torch.get_rng_state(), state)
