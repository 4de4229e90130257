import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy

import kafops
from kafops import KAF, KAF1d, KAF2d, KAF3d, LazyKAF1d, LazyKAF2d, LazyKAF3d

F64 = torch.float64
LEARNED = {"learn_gamma": True, "learn_dictionary": True}
LAZY = [(LazyKAF1d, KAF1d, (2, 5)), (LazyKAF2d, KAF2d, (2, 5, 3, 3)), (LazyKAF3d, KAF3d, (2, 5, 3, 2, 2))]


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make()


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def through_file(obj):
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    return torch.load(file, weights_only=isinstance(obj, dict))


def test_one_node_by_hand():
    layer = KAF(1, dictionary_size=1, gamma=0.5)
    layer.alpha.data.fill_(2)
    x = torch.tensor([0.0, 1.0, -2.0])
    torch.testing.assert_close(layer(x), torch.tensor([2.0, 2 * math.exp(-0.5), 2 * math.exp(-2)]))


def test_three_nodes_per_channel_by_hand():
    # Δ = 1, so γ = 1/6, with nodes -1, 0, 1
    layer = KAF1d(2, dictionary_size=3, boundary=1)
    layer.alpha.data.copy_(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, -1.0]]))
    near, far = math.exp(-1 / 6), math.exp(-4 / 6)
    x = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    wanted = torch.tensor([[2 + 4 * near, -near], [3 + 2 * near + far, -far]])
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize(("size", "boundary"), [(20, 3.0), (2, 3.0), (33, 0.5), (128, 100.0)])
def test_gamma_defaults_to_the_spacing(size, boundary):
    layer = KAF(4, size, boundary)
    assert layer.gamma.shape == (4,)
    spacing = layer.points()[0].diff().double().mean()
    torch.testing.assert_close(layer.gamma, (1 / (6 * spacing**2)).float().expand(4))
    assert layer.points()[0, [0, -1]].tolist() == [-boundary, boundary]


@pytest.mark.parametrize(
    ("cls", "shape"),
    [
        (KAF, (4, 5)),
        (KAF, (4, 5, 2, 2)),
        (KAF1d, (4, 5)),
        (KAF1d, (4, 5, 7)),
        (KAF2d, (4, 5, 3, 2)),
        (KAF2d, (0, 5, 3, 2)),
        (KAF3d, (4, 5, 2, 3, 2)),
    ],
)
@pytest.mark.parametrize("channels", [5, 1])
@pytest.mark.parametrize("options", [{}, LEARNED], ids=["fixed", "learned"])
def test_forward_is_the_definition(cls, shape, channels, options):
    torch.manual_seed(0)
    gamma = torch.linspace(0.5, 2, channels)
    layer = cls(channels, 7, 2.0, gamma=gamma, **options)
    x = 2 * torch.randn(shape)
    nodes = torch.linspace(-2, 2, 7, dtype=F64)
    z, spatial = x.double()[..., None], (1,) * (len(shape) - 2)
    kernel = torch.exp(-gamma.double().view(channels, *spatial, 1) * (z - nodes) ** 2)
    wanted = (layer.alpha.detach().double().view(channels, *spatial, 7) * kernel).sum(-1)
    torch.testing.assert_close(layer(x).detach(), wanted.float())


def test_shared_curve_takes_any_shape():
    layer = KAF(1)
    x = torch.linspace(-4, 4, 24)
    y = layer(x)
    for shape in ((24, 1), (2, 3, 4), (1, 2, 3, 4)):
        torch.testing.assert_close(layer(x.view(shape)), y.view(shape))
    assert layer(x[3]).item() == pytest.approx(y[3].item())


def test_learned_state_gets_gradients():
    torch.manual_seed(0)
    layer = KAF1d(3, 5, dtype=F64, **LEARNED)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        "alpha": (3, 5),
        "log_gamma": (3,),
        "dictionary": (3, 5),
    }
    assert layer.gamma is None
    assert [name for name, _ in layer.named_buffers()] == ["curve"]
    x = torch.randn(8, 3, dtype=F64)
    layer(x).square().sum().backward()
    leaves = [t.detach().requires_grad_() for t in (layer.alpha, layer.bandwidths(), layer.points())]
    kafops.reference.kaf_free(x, *leaves).square().sum().backward()
    torch.testing.assert_close(layer.alpha.grad, leaves[0].grad)
    torch.testing.assert_close(layer.log_gamma.grad, leaves[1].grad * leaves[1])  # dL/d log γ = γ dL/dγ
    torch.testing.assert_close(layer.dictionary.grad, leaves[2].grad)
    assert all(p.grad.abs().min() > 0 for p in layer.parameters())


def test_gamma_stays_positive_in_training():
    layer = KAF(1, learn_gamma=True)
    optimizer = torch.optim.SGD([layer.log_gamma], lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        layer.bandwidths().sum().backward()
        optimizer.step()
    assert 0 < layer.bandwidths().item() < 0.1


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda m: m.half(), torch.float32),
        (lambda m: m.bfloat16(), torch.float32),
        (lambda m: m.to(torch.float16), torch.float32),
        (lambda m: m.to("cpu", torch.bfloat16), torch.float32),
        (lambda m: m.type(torch.float16), torch.float32),
        (lambda m: m.double().half(), torch.float32),
        (lambda m: m.double(), F64),
        (lambda m: m.double().float(), torch.float32),
    ],
)
@pytest.mark.parametrize("options", [{}, LEARNED], ids=["fixed", "learned"])
def test_conversion_leaves_state_exact(convert, dtype, options):
    layer = KAF1d(3, gamma=1.1, **options)
    layer(torch.randn(4, 3)).sum().backward()
    before = {
        name: (t.detach().clone(), None if t.grad is None else t.grad.clone())
        for name, t in layer.state_dict(keep_vars=True).items()
    }
    model = nn.Sequential(layer, nn.Linear(3, 2))
    parameters = list(layer.parameters())
    convert(model)
    assert all(p is q for p, q in zip(parameters, layer.parameters(), strict=True))  # as an optimizer needs
    for name, t in [*layer.named_parameters(), *layer.named_buffers()]:
        value, grad = before[name]
        assert t.dtype == (F64 if name == "curve" else dtype)
        assert torch.equal(t.to(value.dtype), value)  # to the bit
        if t.requires_grad:
            assert t.grad.dtype == dtype
            assert torch.equal(t.grad.float(), grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_a_converted_layer_takes_and_gives_x_in_its_dtype(dtype):
    layer = seeded(lambda: KAF2d(3, init="relu")).to(dtype)
    x = torch.randn(2, 3, 4, 4).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    alpha, gamma = layer.alpha.detach().double(), layer.gamma.double()
    wanted = kafops.reference.kaf(x.double(), alpha, gamma, 3.0)
    summed = kafops.reference.kaf(x.double(), alpha.abs(), gamma, 3.0).max().item()  # what cancels in a ReLU fit
    accumulation = 8 * torch.finfo(layer.alpha.dtype).eps * summed
    torch.testing.assert_close(y.detach().double(), wanted, rtol=torch.finfo(dtype).eps, atol=accumulation)


def test_moves_and_conversions_combine():
    layer = KAF1d(3, **LEARNED).to("meta", torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float32)}


def test_conversion_to_what_cannot_be_raises():
    with pytest.raises(TypeError, match=r"state is floating, it cannot be converted to torch\.complex64"):
        KAF(2)._apply(lambda t: t.to(torch.complex64))


def test_default_dtype_and_swapping_conversion():
    layer = KAF(2)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        alpha = layer.alpha.detach().clone()
        assert torch.equal(layer.half().alpha, alpha)
        assert torch.equal(layer.double().alpha, alpha.double())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for default, wanted in ((torch.bfloat16, torch.float32), (F64, F64)):
        torch.set_default_dtype(default)
        try:
            assert {t.dtype for t in (KAF(2, init="isometric").alpha, KAF(2).gamma)} == {wanted}
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("options", [{}, LEARNED], ids=["fixed", "learned"])
@pytest.mark.parametrize("init", ["normal", "isometric", "elu"])
def test_meta_then_reset_is_a_fresh_layer(init, options):
    with torch.device("meta"):
        layer = KAF2d(4, init=init, **options)
    assert {t.device.type for t in layer.state_dict(keep_vars=True).values()} == {"meta"}
    layer.to_empty(device="cpu")
    seeded(layer.reset_parameters)
    assert_same_state(layer, seeded(lambda: KAF2d(4, init=init, **options)))


def test_reset_restores_everything():
    layer = seeded(lambda: KAF1d(3, gamma=torch.tensor([0.5, 1.0, 2.0]), **LEARNED))
    fresh = copy.deepcopy(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(1)
    seeded(layer.reset_parameters)
    assert_same_state(layer, fresh)
    torch.testing.assert_close(layer.bandwidths().detach(), torch.tensor([0.5, 1.0, 2.0]))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_file])
@pytest.mark.parametrize("init", ["normal", "silu", lambda x: x.sin(), kafops.init.Normal(0.8)])
@pytest.mark.parametrize("options", [{}, LEARNED], ids=["fixed", "learned"])
def test_copies_are_equal_and_independent(copier, init, options):
    layer = KAF2d(3, 9, 2.5, init, 0.7, **options)
    other = copier(layer)
    assert_same_state(layer, other)
    assert repr(layer) == repr(other)
    x = torch.randn(2, 3, 4, 4)
    y = layer(x)
    assert torch.equal(y, other(x))
    other.alpha.data.zero_()
    assert torch.equal(y, layer(x))
    seeded(other.reset_parameters)
    seeded(layer.reset_parameters)
    assert_same_state(layer, other)


@pytest.mark.parametrize("options", [{}, LEARNED], ids=["fixed", "learned"])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(options, assign):
    source = nn.Sequential(KAF1d(3, 9, gamma=0.7, **options))
    target = nn.Sequential(KAF1d(3, 9, gamma=1.3, init="elu", **options))
    target.load_state_dict(through_file(source.state_dict()), assign=assign)
    assert_same_state(source, target)
    x = torch.randn(4, 3)
    assert torch.equal(source(x), target(x))


@pytest.mark.parametrize("make", [lambda: KAF(3), LazyKAF1d], ids=["built", "lazy"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: KAF(3, 10), r"size mismatch for alpha: .*\[3, 10\].*\[3, 20\]"),
        (lambda: KAF(3, learn_gamma=True), r"Missing key.*\"gamma\".*\n.*Unexpected key.*\"log_gamma\""),
        (lambda: KAF(3, boundary=4.0), r"boundary in the state_dict is 4 but .* boundary=3; build it with boundary=4"),
    ],
)
def test_loading_another_layers_state_raises(make, other, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        make().load_state_dict(other().state_dict())


@pytest.mark.parametrize("channels", [1, 4])
def test_loading_another_number_of_channels_raises(channels):
    with pytest.raises(RuntimeError, match=rf"size mismatch for alpha: .*\[{channels}, 20\].*\[3, 20\]"):
        KAF(3).load_state_dict(KAF(channels).state_dict())


def test_boundary_check_forgives_rounding_and_learned_dictionaries():
    layer = KAF(3, boundary=3.1)
    rounded = {k: v.to(torch.bfloat16) for k, v in layer.state_dict().items()}
    layer.load_state_dict(rounded)
    assert layer.boundary == 3.1
    KAF(3, boundary=4.0, learn_dictionary=True).load_state_dict(KAF(3, learn_dictionary=True).state_dict())
    with pytest.raises(ValueError, match=r"boundary in the state_dict is 3\.1 "):
        KAF(3).load_state_dict(layer.state_dict(), strict=False)


@pytest.mark.parametrize(("lazy", "eager", "shape"), LAZY)
@pytest.mark.parametrize("options", [{}, {"gamma": 0.7, "init": "isometric"}, LEARNED, {"dtype": F64}])
def test_lazy_becomes_the_layer(lazy, eager, shape, options):
    layer = lazy(9, **options)
    assert is_lazy(layer.alpha)
    assert layer.gamma is None
    layer.reset_parameters()  # nothing to reset yet
    x = torch.randn(shape)
    y = seeded(lambda: layer(x))
    assert type(layer) is eager
    wanted = seeded(lambda: eager(5, 9, **options))
    assert_same_state(layer, wanted)
    assert torch.equal(y, wanted(x))
    assert repr(layer) == repr(wanted)
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("options", [{}, LEARNED], ids=["fixed", "learned"])
def test_lazy_loads_before_its_first_call(options):
    source = nn.Sequential(KAF2d(5, 9, init="silu", gamma=0.7, **options))
    lazy = nn.Sequential(LazyKAF2d(9, **options))
    lazy.load_state_dict(source.state_dict())
    assert_same_state(lazy, source)  # saved again before the first call
    assert lazy[0].num_parameters == 5
    x = torch.randn(2, 5, 3, 3)
    assert torch.equal(lazy(x), source(x))
    assert type(lazy[0]) is KAF2d
    assert_same_state(lazy, source)


@pytest.mark.parametrize("options", [{}, LEARNED])
def test_lazy_on_meta_becomes_a_layer_on_meta(options):
    layer = LazyKAF1d(9, device="meta", **options)
    assert layer(torch.randn(2, 5, device="meta")).shape == (2, 5)
    wanted = KAF1d(5, 9, device="meta", **options)
    tensors = {name: (t.device, t.dtype, t.shape) for name, t in layer.state_dict().items()}
    assert tensors == {name: (t.device, t.dtype, t.shape) for name, t in wanted.state_dict().items()}


def test_lazy_loads_an_uninitialised_state_and_fills_in_what_a_partial_one_lacks():
    layer = LazyKAF1d(9, gamma=0.7)
    layer.load_state_dict(LazyKAF1d(9).state_dict())
    assert is_lazy(layer.alpha)
    layer.load_state_dict({"alpha": torch.ones(3, 9)}, strict=False)
    assert torch.equal(layer.alpha.detach(), torch.ones(3, 9))
    assert torch.equal(layer.gamma, torch.full((3,), 0.7))


@pytest.mark.parametrize("change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.bfloat16()])
@pytest.mark.parametrize("options", [{}, LEARNED], ids=["fixed", "learned"])
def test_lazy_can_be_copied_and_converted(change, options):
    layer = change(LazyKAF2d(**options))
    assert is_lazy(layer.alpha)
    seeded(lambda: layer(torch.randn(2, 5, 3, 3)))  # draws x first
    wanted = seeded(lambda: (torch.randn(2, 5, 3, 3), KAF2d(5, **options))[1])
    assert_same_state(layer, wanted)
    assert LazyKAF1d().double().alpha.dtype == F64


@pytest.mark.parametrize(
    ("options", "x", "message"),
    [
        ({}, torch.randn(2, 5), r"LazyKAF2d wants x of shape \[N, C, H, W\], got 2 dimensions: \[2, 5\]"),
        ({}, torch.randn(2, 0, 3, 3), r"at least one channel \(dimension 1\) where LazyKAF2d starts, got 0"),
        ({"gamma": torch.ones(4)}, torch.randn(2, 5, 3, 3), r"gamma must have shape \[5\] or \[1\], got \[4\]"),
        ({"boundary": 0.5, "init": "isometric"}, torch.randn(2, 5, 3, 3), "reaches no less than"),
    ],
)
def test_lazy_stays_lazy_after_a_bad_first_call(options, x, message):
    layer = LazyKAF2d(**options)
    with pytest.raises(ValueError, match=message):
        layer(x)
    assert is_lazy(layer.alpha)
    with pytest.raises(RuntimeError, match="LazyKAF2d has no bandwidths before its first call"):
        layer.bandwidths()


@pytest.mark.parametrize(
    ("layer", "wanted"),
    [
        (lambda: KAF(16), "KAF(16, dictionary_size=20, boundary=3, init=elu, gamma=1.671)"),
        (
            lambda: KAF2d(2, 5, 1.5, torch.sin, torch.ones(2), True, True),
            "KAF2d(2, dictionary_size=5, boundary=1.5, init=sin, gamma=2 values, "
            "learn_gamma=True, learn_dictionary=True)",
        ),
        (
            lambda: LazyKAF1d(init=kafops.init.Normal(std=0.8)),
            "LazyKAF1d(0, dictionary_size=20, boundary=3, init=Normal(std=0.8), gamma=1.671)",
        ),
    ],
)
def test_repr(layer, wanted):
    assert repr(layer()) == wanted


def test_numpy_numbers_are_numbers():
    layer = KAF(np.int64(3), np.int32(5), np.float32(2), gamma=np.float64(0.5))
    assert repr(layer) == repr(KAF(3, 5, 2.0, gamma=0.5))
    assert layer(torch.zeros(1, 3)).shape == (1, 3)
    assert layer.gamma.tolist() == [0.5] * 3


def test_gamma_is_copied():
    gamma = torch.ones(3)
    layer = KAF(3, gamma=gamma)
    gamma.zero_()
    layer.reset_parameters()
    assert layer.gamma.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_parameters": 0}, ValueError, "num_parameters must be an integer ≥ 1, got num_parameters=0"),
        ({"num_parameters": True}, TypeError, "num_parameters must be an integer ≥ 1, got bool True"),
        ({"num_parameters": 3.0}, TypeError, "num_parameters .* got float 3.0"),
        ({"dictionary_size": 0}, ValueError, "dictionary_size must be an integer ≥ 1, got dictionary_size=0"),
        ({"dictionary_size": "20"}, TypeError, "dictionary_size .* got str '20'"),
        ({"boundary": 0}, ValueError, "boundary must be a positive finite number, got boundary=0"),
        ({"boundary": -3.0}, ValueError, "boundary=-3.0"),
        ({"boundary": math.nan}, ValueError, "boundary=nan"),
        ({"boundary": math.inf}, ValueError, "boundary=inf"),
        ({"boundary": torch.tensor(3.0)}, TypeError, "boundary .* got Tensor"),
        ({"boundary": 1e-30}, ValueError, r"gamma must be a positive .* in torch.float32, got 1/\(6Δ²\) = "),
        ({"boundary": 1e30}, ValueError, r"in torch.float32, got 1/\(6Δ²\) = "),
        ({"gamma": 0}, ValueError, r"gamma must be a positive finite number, .* got 0\.0"),
        ({"gamma": -1.0}, ValueError, r"got -1\.0"),
        ({"gamma": math.nan}, ValueError, "got nan"),
        ({"gamma": 1e-60}, ValueError, "in torch.float32, got 1e-60"),
        ({"gamma": True}, TypeError, "gamma must be .* got bool"),
        ({"gamma": "1"}, TypeError, "gamma must be .* got str"),
        ({"gamma": torch.ones(5)}, ValueError, r"got shape \[5\] with num_parameters=4"),
        ({"gamma": torch.ones(4, 1)}, ValueError, r"got shape \[4, 1\]"),
        ({"gamma": torch.tensor([1.0, 1.0, math.inf, 1.0])}, ValueError, "got inf"),
        ({"gamma": torch.ones(4, dtype=torch.int64)}, TypeError, "gamma.dtype=torch.int64"),
        ({"gamma": torch.ones(4, requires_grad=True)}, ValueError, "without requires_grad; learn_gamma=True"),
        ({"dictionary_size": 1}, ValueError, "gamma must be given for dictionary_size=1"),
        ({"dtype": torch.complex64}, TypeError, r"dtype must be one of torch\.float32, .*, got torch\.complex64"),
        ({"dtype": torch.int32}, TypeError, "got torch.int32"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        KAF2d(**{"num_parameters": 4, **arguments})


@pytest.mark.parametrize(
    ("layer", "x", "error", "message"),
    [
        (KAF1d(5), torch.randn(5), ValueError, r"KAF1d wants x of shape \[N, C\] or \[N, C, L\], got 1 .*: \[5\]"),
        (KAF1d(5), torch.randn(2, 5, 3, 3), ValueError, "KAF1d wants"),
        (KAF2d(5), torch.randn(5, 3, 3), ValueError, r"KAF2d wants x of shape \[N, C, H, W\], got 3 dimensions"),
        (KAF2d(1), torch.randn(2, 5), ValueError, "KAF2d wants"),
        (KAF3d(5), torch.randn(2, 5, 3, 3), ValueError, r"KAF3d wants x of shape \[N, C, D, H, W\], got 4"),
        (KAF2d(5), torch.randn(2, 4, 3, 3), ValueError, r"x \[2, 4, 3, 3\] has 4 channels, alpha \[5, 20\] has 5 rows"),
        (KAF(5), torch.randn(5), ValueError, r"x must have shape \[N, C, \*\]"),
        (KAF(5), torch.ones(2, 5, dtype=torch.int64), TypeError, "x must have one of the dtypes .*torch.int64"),
        (KAF(5), [1.0], TypeError, "x must be a torch.Tensor, got list"),
        (KAF(5), torch.ones(2, 5, device="meta"), ValueError, "alpha is on cpu but x is on meta"),
    ],
)
def test_bad_input(layer, x, error, message):
    with pytest.raises(error, match=message):
        layer(x)


# ---------------------------------------------------------------------------------------- base, and the curve's buffer


@pytest.mark.parametrize("base", ["identity", "relu", "silu", "gelu"])
def test_a_layer_starts_as_its_base(base):
    layer = KAF2d(3, base=base)
    x = 4 * torch.randn(2, 3, 4, 4)
    assert not layer.alpha.any()
    error = (layer(x).double() - kafops.bases.value(base, x.double())).abs()
    assert (error <= 2 * 2**-24 * x.abs()).all()
    assert f"base={base}" in repr(layer)
    assert "init=zeros" in repr(layer)
    fitted = KAF(3, base=base, init=base)  # a fit of nothing
    assert not fitted.alpha.any()


def test_the_curve_is_a_buffer_that_loading_checks():
    layer = KAF(3, 7, 2.0, base="relu", kernel="bspline")
    assert layer.curve.tolist() == [2, 3, 2]
    assert layer.curve.dtype == F64
    assert set(layer.state_dict()) == {"alpha", "gamma", "curve"}
    with pytest.raises(
        ValueError, match="base in the state_dict is relu but this layer was built with base=None; build"
    ):
        KAF(3, 7, 2.0, kernel="bspline").load_state_dict(layer.state_dict())
    with pytest.raises(ValueError, match=r"curve in the state_dict must have shape \[3\], got \[2\]"):
        layer.load_state_dict(layer.state_dict() | {"curve": torch.ones(2)})
    with pytest.raises(RuntimeError, match=r"Missing key.*curve"):
        layer.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "curve"})


def test_a_state_that_was_cast_loads_exactly():
    source, target = KAF(3, boundary=1.1), KAF(3, boundary=1.1)
    target.load_state_dict({k: v.bfloat16() for k, v in source.state_dict().items()})
    assert target.curve.tolist() == [1.1, 0, 0]
    target.load_state_dict({k: v.bfloat16() for k, v in source.state_dict().items()}, assign=True)
    assert target.curve.tolist() == [1.1, 0, 0]


def test_functional_call_with_all_of_the_state():
    layer = KAF(3, learn_gamma=True, base="gelu")
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.randn(4, 3)
    assert torch.equal(torch.func.functional_call(layer, state, (x,), strict=True), layer(x))


def test_averaging_weights_and_buffers_leaves_the_curve():
    layer = KAF(3, boundary=1.1)
    average = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    for _ in range(3):
        average.update_parameters(layer)
    assert average.module.curve.tolist() == [1.1, 0, 0]
    layer.load_state_dict(average.module.state_dict())


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.to(torch.bfloat16)], ids=["half", "bfloat16"])
def test_conversions_treat_what_is_not_the_layers_own_as_any_module(convert):
    """A subclass with a child, and buffers of every kind; of its own state nothing goes below float32."""

    def with_more(module):
        module.child = nn.Linear(3, 3)
        module.extra = nn.Parameter(torch.ones(3))
        for name, dtype in (("count", torch.int64), ("mask", torch.bool), ("phase", torch.complex64)):
            module.register_buffer(name, torch.ones(3).to(dtype))
        return module

    layer, other = with_more(type("Mixed", (KAF,), {})(3, learn_gamma=True)), convert(with_more(nn.Module()))
    layer.alpha.grad = torch.ones_like(layer.alpha)
    convert(layer)
    assert layer.alpha.dtype == layer.alpha.grad.dtype == layer.log_gamma.dtype == torch.float32
    state = layer.state_dict()
    assert {name: state[name].dtype for name in other.state_dict()} == {
        n: t.dtype for n, t in other.state_dict().items()
    }
    layer.to("meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}


def test_lazy_gamma_is_made_where_alpha_is():
    layer = kafops.LazyKAF1d(device="meta")
    layer(torch.empty(4, 3, device="meta"))
    assert layer.gamma.device == layer.alpha.device == layer.curve.device == torch.device("meta")


def test_reset_restores_all_of_the_state_after_to_empty():
    layer = KAF(3, boundary=1.1, base="silu", device="meta")
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.curve.tolist() == [1.1, 0, 3]
    assert torch.equal(layer.gamma, KAF(3, boundary=1.1).gamma)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: kafops.KAF(3), lambda g: g),
        (lambda: kafops.KAF2d(3, base="silu"), lambda g: g[:, :, None, None]),
        (lambda: kafops.KAF3d(3, learn_dictionary=True), lambda g: g[:, :, None, None, None]),
        (lambda: kafops.KAF(3, channel_dim=-1), lambda g: g),
        (lambda: kafops.KAF(3, base="same", old=nn.Hardswish), lambda g: g),
    ],
)
def test_curves_are_what_the_layer_computes(layer, x):
    torch.manual_seed(0)
    layer, grid = layer(), torch.linspace(-4, 4, 9)
    nn.init.normal_(layer.alpha)
    points = grid[:, None].repeat(1, 3)
    assert torch.equal(layer.curves(grid), layer(x(points)).reshape(9, 3))
    assert torch.equal(layer.curves(points), layer.curves(grid))
    layer.curves(grid).sum().backward()
    assert layer.alpha.grad.abs().sum() > 0


def test_curves_of_a_shared_layer_and_wrong_grids():
    assert kafops.KAF(1).curves(torch.zeros(4)).shape == (4, 1)
    with pytest.raises(TypeError, match=r"grid must be a floating tensor \[n\] or \[n, C\] = \[n, 3\], got list"):
        kafops.KAF(3).curves([0.0])
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        kafops.KAF(3).curves(torch.arange(3))
    with pytest.raises(ValueError, match=r"got shape \[4, 2\]"):
        kafops.KAF(3).curves(torch.zeros(4, 2))
    with pytest.raises(RuntimeError, match="LazyKAF has no curves before its first call"):
        kafops.LazyKAF().curves(torch.zeros(3))


def test_the_package_shows_what_is_public():
    shown = [name for name in dir(kafops) if not name.startswith("__")]
    assert sorted(shown) == sorted(kafops.__all__)
    assert all(hasattr(kafops, name) for name in shown)


@pytest.mark.parametrize("name", ["learn_gamma", "learn_dictionary", "fit"])
@pytest.mark.parametrize("value", ["no", 0.5, None, 1])
def test_flags_are_true_or_false(name, value):
    """KAF(4, 20, 3.0, "elu", None, 0.5) trained the bandwidth."""
    with pytest.raises(TypeError, match=f"{name} must be True or False, got {type(value).__name__}"):
        KAF(4, **{name: value})


def test_values_want_floating_tensors():
    for function, name in (
        (kafops.kernels.value, "gaussian"),
        (kafops.bases.value, "relu"),
        (kafops.bases.value, None),
    ):
        for wrong in (3.0, "u", torch.ones(3, dtype=torch.int64)):
            with pytest.raises(TypeError, match="must be a floating tensor, got"):
                function(name, wrong)


def test_a_state_of_0_1_on_another_device_than_the_cpu():
    """Fake tensors, as there may be no GPU: what mixes devices raises."""
    layer = KAF(3)
    with FakeTensorMode():
        for values in (1, 2):
            state = {"alpha": torch.empty(3, 20, device="cuda"), "gamma": torch.empty(3, device="cuda")}
            state["_extra_state"] = torch.empty((2,) if values == 2 else (), device="cuda")
            layer._load_from_state_dict(state, "", {}, True, [], [], [])
            assert state["curve"].shape == (3,)
            assert state["curve"].device.type == "cuda"
