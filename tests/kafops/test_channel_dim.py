"""Channels in any dimension: the same as moving the dimension by hand, to the bit, without a copy."""

import pytest
import torch

import kafops

SHAPES = [
    ((4, 6, 5), 1),
    ((4, 5, 6), -1),
    ((6, 4), 0),
    ((6, 4, 5), 0),
    ((4, 5, 6, 3), 2),
    ((4, 5, 6, 3), -2),
    ((0, 5, 6), -1),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dims = pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)


def parameters(rows=6, dtype=torch.float32):
    torch.manual_seed(0)
    tensors = torch.randn(rows, 7), torch.rand(rows) + 0.5, torch.randn(rows, 7)
    return [t.to(dtype).requires_grad_() for t in tensors]


def both(x, alpha, gamma, dictionary, **options):
    """kaf and kaf_free, and the gradients of a sum of them."""
    y = kafops.kaf(x, alpha, gamma, 2.0, **options), kafops.kaf_free(x, alpha, gamma, dictionary, **options)
    loss = sum((t * torch.linspace(-1, 1, max(t.numel(), 1))[: t.numel()].view(t.shape).to(t)).sum() for t in y)
    return (*y, *torch.autograd.grad(loss, (x, alpha, gamma, dictionary)))


@dims
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"base": "gelu"}, {"kernel": "matern32", "base": "relu"}], ids=str)
def test_equals_moving_the_dimension(shape, dim, dtype, options):
    x = torch.randn(shape).to(dtype).requires_grad_()
    p = parameters()
    got = both(x, *p, channel_dim=dim, **options)

    def moved(function, *rest):
        return function(x.movedim(dim, 1), *rest, **options).movedim(1, dim)

    want = moved(kafops.kaf, *p[:2], 2.0), moved(kafops.kaf_free, *p)
    for a, b in zip(got, want, strict=False):
        assert torch.equal(a, b)
        assert a.shape == x.shape
        assert a.stride() == torch.empty_like(x).stride()
    for name, function in (("kaf", kafops.reference.kaf), ("kaf_free", kafops.reference.kaf_free)):
        exact = function(
            x.detach().double(),
            *(t.double() for t in p[:2]),
            *([2.0] if name == "kaf" else [p[2].double()]),
            channel_dim=dim,
            **options,
        )
        tolerance = 2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5
        torch.testing.assert_close(got[name == "kaf_free"].double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dim", [0, -1])
def test_one_sample(dim):
    """x [C], as a network of points has it under vmap."""
    x = torch.randn(6, requires_grad=True)
    p = parameters()
    y = kafops.kaf(x, *p[:2], channel_dim=dim)
    assert torch.equal(y, kafops.kaf(x[None], *p[:2])[0])
    assert torch.equal(kafops.reference.kaf(x, *p[:2], channel_dim=dim), kafops.reference.kaf(x[None], *p[:2])[0])
    layer = kafops.KAF(6, channel_dim=dim)
    assert torch.equal(layer(x), kafops.kaf(x[None], layer.alpha, layer.gamma)[0])


def test_of_no_account_where_the_curve_is_shared():
    x = torch.randn(3, 4)
    p = [t[:1] for t in parameters()]
    want = kafops.kaf(x, *p[:2])
    for dim in (0, 1, -1, 7):
        assert torch.equal(kafops.kaf(x, *p[:2], channel_dim=dim), want)
    assert kafops.KAF(1, channel_dim=-1)(torch.tensor(0.5)).shape == ()


@pytest.mark.parametrize("cls", [kafops.KAF, kafops.KAF1d])
def test_layers_take_it(cls):
    layer = cls(64, channel_dim=-1, init="silu")
    x = torch.randn(2, 5, 64)
    assert torch.equal(layer(x), kafops.kaf(x.movedim(-1, 1), layer.alpha, layer.gamma).movedim(1, -1))
    assert "channel_dim=-1" in repr(layer)
    lazy = kafops.LazyKAF(channel_dim=-1, init="silu")
    assert torch.equal(lazy(x), layer(x))
    assert type(lazy) is kafops.KAF
    assert lazy.num_parameters == 64
    with pytest.raises(ValueError, match=r"channel_dim must be a dimension of x, got channel_dim=2 for x \[4, 3\]"):
        kafops.LazyKAF(channel_dim=2)(torch.randn(4, 3))
    with pytest.raises(TypeError, match="channel_dim must be an integer, got float"):
        kafops.KAF(3, channel_dim=1.0)
    with pytest.raises(TypeError):
        kafops.KAF(3, 20, 3.0, "elu", None, False, False, None, None, "gaussian", None)  # base by position


def test_nothing_is_copied():
    """Of a call with channels last, the memory is that of its output."""
    x, (alpha, gamma, _) = torch.randn(32, 50, 64), parameters(64)

    def call():
        with torch.no_grad():
            return kafops.kaf(x, alpha, gamma, channel_dim=-1)

    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    changes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sum(change for change in changes if change > 0) < 1.01 * x.nbytes


@pytest.mark.parametrize("name", ["alpha", "gamma", "dictionary"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_parameters_are_computed_with_in_float32(name, dtype):
    x = torch.randn(4, 6)
    p = dict(zip(("alpha", "gamma", "dictionary"), (t.detach() for t in parameters()), strict=True))
    p[name] = p[name].to(dtype).requires_grad_()
    y = kafops.kaf_free(x, **p)
    assert torch.equal(y, kafops.kaf_free(x, **(p | {name: p[name].float()})))
    (g,) = torch.autograd.grad(y.sum(), p[name])
    assert g.dtype == dtype
    layer = kafops.KAF(6, dtype=dtype, learn_gamma=True, learn_dictionary=True)
    assert {t.dtype for t in layer.parameters()} == {dtype}
    layer(x).sum().backward()
    assert layer.alpha.grad.abs().sum() > 0


def test_gradients_of_single_points_are_those_of_the_batch():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(2, 8), kafops.KAF(8, channel_dim=-1, base="silu", init="tanh"), torch.nn.Linear(8, 1)
    )
    points = torch.randn(16, 2, requires_grad=True)
    (want,) = torch.autograd.grad(net(points).sum(), points)
    got = torch.func.vmap(torch.func.grad(lambda t: net(t).squeeze(0)))(points.detach())
    torch.testing.assert_close(got, want)
