"""What kafops 0.1 left on disk loads, and whatever could be called in 0.1 can be called: see tests/fixtures/v0_1."""

import inspect
import json
import math
import operator
from collections import OrderedDict
from functools import partial
from pathlib import Path

import other_kernels
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kafops
from kafops import accuracy, backends, bounds, init, kernels, reference

FIXTURES = Path(__file__).parents[1] / "fixtures/v0_1"
STATES = sorted((FIXTURES / "states").glob("*.pt"))
SIGNATURES = json.loads((FIXTURES / "signatures.json").read_text())
F64 = torch.float64
KERNELS = ("gaussian", *other_kernels.KERNELS)

compiled = pytest.mark.skipif("cpu" not in backends.available("cpu"), reason="the CPU kernels are not built")
of_kernels = pytest.mark.parametrize("kernel", KERNELS)


def assert_same(y, want, alpha, machines=2):
    """Each machine's y is within 32 roundings of the largest Σ|α| from the truth, as kafops.accuracy derives."""
    assert (y.shape, y.dtype) == (want.shape, want.dtype)
    slack = machines * 32 * torch.finfo(y.dtype).eps / 2 * alpha.abs().sum(1).max()
    assert (y - want).abs().max() <= slack


# ------------------------------------------------------------------------------------------------------------ on disk


def test_the_files_are_there():
    assert len(STATES) == 17
    assert {path.suffix for path in FIXTURES.iterdir() if path.is_file()} == {".py", ".json", ".pt", ".pt2"}


@pytest.mark.parametrize("path", STATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("within", [False, True], ids=["layer", "in a model"])
def test_a_state(path, within):
    saved = torch.load(path, weights_only=True)
    layer, state = getattr(kafops, saved["layer"])(**saved["arguments"]), saved["state"]
    if within:
        metadata = {"": {"version": 1}, "0": state._metadata[""]}
        state = OrderedDict((f"0.{name}", t) for name, t in state.items())
        state._metadata = metadata
    result = (nn.Sequential(layer) if within else layer).load_state_dict(state, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same(layer(saved["x"]), saved["y"], layer.alpha)


@pytest.mark.parametrize("path", STATES, ids=lambda path: path.stem)
def test_a_state_of_another_boundary_or_kernel_is_refused(path):
    saved = torch.load(path, weights_only=True)
    others = [{"kernel": "matern32" if saved["arguments"].get("kernel") != "matern32" else "gaussian"}]
    if not saved["arguments"].get("learn_dictionary"):
        others.append({"boundary": 2.5})
    for other in others:
        layer = getattr(kafops, saved["layer"])(**saved["arguments"] | other)
        with pytest.raises((ValueError, RuntimeError), match=next(iter(other))):
            layer.load_state_dict(saved["state"])


def test_pickled_layers():
    saved = torch.load(FIXTURES / "pickled.pt", weights_only=False)
    assert [type(layer).__name__ for layer in saved["layers"]] == ["KAF2d", "KAF2d", "KAF", "KAF2d"]
    for layer, y in zip(saved["layers"], saved["y"], strict=True):
        assert_same(layer(saved["x"]), y, layer.alpha)
        layer.reset_parameters()
        assert layer(saved["x"]).shape == y.shape


def program(name):
    saved = torch.load(FIXTURES / f"{name}.pt", weights_only=True)
    version = torch.torch_version.TorchVersion
    if version(torch.__version__) < version(saved["torch"]):
        pytest.skip(f"torch {torch.__version__} need not load what torch {saved['torch']} exported")
    return torch.export.load(FIXTURES / f"{name}.pt2"), saved["inputs"], saved["outputs"]


@compiled
def test_an_exported_program():
    exported, (x,), outputs = program("program")
    module = exported.module()
    for y, want, layer in zip(module(x), outputs, ("even", "free"), strict=True):
        assert_same(y, want, exported.state_dict[f"{layer}.alpha"])
    y = module(torch.cat([x, x, x]))[1]  # another batch
    assert_same(y, torch.cat([outputs[1]] * 3), exported.state_dict["free.alpha"])


@compiled
def test_an_exported_program_that_calls_an_operator_of_derivatives():
    exported, inputs, outputs = program("program_backward")
    grad, x, alpha, gamma = inputs
    problem = accuracy.Problem(x, alpha, gamma, None, 3.0, grad, (torch.ones_like(x), None, None))
    names = ("backward x", "backward alpha", "backward gamma")
    for found in (outputs, exported.module()(*inputs)):
        errors = accuracy.excess(problem, dict(zip(names, found, strict=True)))
        assert all(error <= 1 for error in errors.values()), errors


# ---------------------------------------------------------------------------------------------------------- as called


@pytest.mark.parametrize("path", SIGNATURES)
def test_parameters_have_their_names_and_places(path):
    """New ones follow after the old, or go by name, and none of them must be given."""
    now = [p for p in inspect.signature(operator.attrgetter(path)(kafops)).parameters.values() if p.name != "self"]
    old = SIGNATURES[path]
    by_place = [p for p in now if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in by_place[: len(old)]] == [name for name, _ in old]
    required = {name for name, must_be_given in old if must_be_given}
    assert {p.name for p in now if p.default is p.empty and p.kind is not p.VAR_KEYWORD} <= required


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=F64)


X = 2 * drawn(4, 3, 5)
ALPHA = drawn(3, 6)
GAMMA = torch.tensor([0.4, 1.0, 2.5], dtype=F64)
DICTIONARY = drawn(3, 6).roll(1, 1)
EVEN = torch.linspace(-2, 2, 6, dtype=F64)[None]


def curve(x, alpha, gamma, points, kernel="gaussian"):
    """The definition, written down once more: x [N, C, L], points [C, D] or [1, D]."""
    u = gamma.sqrt()[:, None, None] * (x.unsqueeze(-1) - points[:, None])
    values = torch.exp(-u * u) if kernel == "gaussian" else other_kernels.definition(kernel, u)
    return (alpha[:, None] * values).sum(-1)


@of_kernels
def test_functions(kernel):
    even, free = curve(X, ALPHA, GAMMA, EVEN, kernel), curve(X, ALPHA, GAMMA, DICTIONARY, kernel)
    named = {"x": X, "alpha": ALPHA, "gamma": GAMMA, "kernel": kernel}
    for module in (kafops, reference):
        assert_same(module.kaf(X, ALPHA, GAMMA, 2.0, kernel), even, ALPHA)
        assert_same(module.kaf(**named, boundary=2.0), even, ALPHA)
        assert_same(module.kaf_free(X, ALPHA, GAMMA, DICTIONARY, kernel), free, ALPHA)
        assert_same(module.kaf_free(**named, dictionary=DICTIONARY), free, ALPHA)


def test_functions_by_default():
    three = 1.5 * EVEN
    for y in (kafops.kaf(X, ALPHA, GAMMA), kafops.kaf(X, ALPHA, GAMMA, 3.0), reference.kaf(X, ALPHA, GAMMA, 3.0)):
        assert_same(y, curve(X, ALPHA, GAMMA, three), ALPHA)
    for module in (kafops, reference):
        assert_same(module.kaf_free(X, ALPHA, GAMMA, three), curve(X, ALPHA, GAMMA, three), ALPHA)
    assert torch.equal(reference.uniform_dictionary(6, 2.0, X), EVEN)
    assert torch.equal(reference.uniform_dictionary(dictionary_size=1, boundary=2.0, like=X), torch.zeros(1, 1).to(F64))


ARGUMENTS = {
    "dictionary_size": 6,
    "boundary": 2.0,
    "init": "silu",
    "gamma": 0.9,
    "learn_gamma": True,
    "learn_dictionary": True,
    "device": "cpu",
    "dtype": F64,
    "kernel": "matern32",
}
INPUTS = {"KAF": X, "KAF1d": X, "KAF2d": X[..., None], "KAF3d": X[..., None, None]}


@pytest.mark.parametrize("name", [*INPUTS, "LazyKAF1d", "LazyKAF2d", "LazyKAF3d"])
def test_layers(name):
    kind, lazy = getattr(kafops, name), name.startswith("Lazy")
    x = INPUTS[name.removeprefix("Lazy")]
    first = {} if lazy else {"num_parameters": 3}
    for layer in (kind(*first.values(), *ARGUMENTS.values()), kind(**first, **ARGUMENTS)):
        y = layer(x)
        gamma = torch.full((3,), 0.9, dtype=F64)
        alpha = init.ridge(F.silu, EVEN[0], gamma, kernel="matern32")
        assert_same(layer.alpha.detach(), alpha, alpha)
        assert_same(y.flatten(2), curve(X, alpha, gamma, EVEN, "matern32"), alpha)
        assert torch.equal(layer.forward(x), y)
        assert layer.alpha.dtype == layer.log_gamma.dtype == layer.dictionary.dtype == F64
        assert layer.gamma is None
        kept = (layer.num_parameters, layer.dictionary_size, layer.boundary, layer.kernel)
        assert kept == (3, 6, 2.0, "matern32")
        assert (layer.learn_gamma, layer.learn_dictionary) == (True, True)


def test_layers_by_default():
    layer = kafops.KAF(3)
    step = 6 / 19
    assert (layer.dictionary_size, layer.boundary, layer.kernel) == (20, 3.0, "gaussian")
    assert (layer.log_gamma, layer.dictionary) == (None, None)
    assert torch.equal(layer.alpha, kafops.KAF(3, init="elu").alpha)
    assert torch.equal(layer.gamma, layer.bandwidths())
    torch.testing.assert_close(layer.gamma, torch.full((3,), 1 / (6 * step**2)))
    assert torch.equal(layer.points(), reference.uniform_dictionary(20, 3.0, layer.alpha))
    assert_same(layer(X), reference.kaf(X, layer.alpha, layer.gamma, 3.0), layer.alpha)
    torch.testing.assert_close(kafops.KAF(3, kernel="bspline").gamma, torch.full((3,), 3 / (2 * step**2)))
    gamma = torch.tensor([0.5, 1.0, 2.0])
    assert torch.equal(kafops.KAF(3, gamma=gamma).gamma, gamma)
    with torch.no_grad():
        layer.alpha.zero_()
    layer.reset_parameters()
    assert torch.equal(layer.alpha, kafops.KAF(3).alpha)
    assert torch.equal(layer.bounds(-1.0, 1.0).lipschitz, layer.bounds(lower=-1.0, upper=1.0).lipschitz)
    assert torch.equal(layer.bounds().value.maximum, bounds.value_bounds(layer.alpha, layer.gamma, 3.0).maximum)


TARGETS = {"relu": F.relu, "elu": F.elu, "silu": F.silu, "tanh": torch.tanh, "identity": torch.clone}


@pytest.mark.parametrize("start", [*TARGETS, torch.sin], ids=[*TARGETS, "torch.sin"])
def test_starts_that_fit(start):
    layer = kafops.KAF(3, init=start, dtype=F64)
    alpha = init.ridge(TARGETS.get(start, start), layer.points()[0], layer.gamma)
    assert_same(layer.alpha.detach(), alpha, alpha)


class Ones(init.Initializer):
    def __call__(self, dictionary, gamma):
        return torch.ones(len(gamma), len(dictionary), dtype=F64)


@of_kernels
def test_init(kernel):
    points, eps = EVEN[0], 1e-3
    apart = points[:, None] - points
    for alpha in (
        init.ridge(torch.sin, points, GAMMA, eps, kernel),
        init.ridge(target=torch.sin, dictionary=points, gamma=GAMMA, eps=eps, kernel=kernel),
    ):
        for a, gamma in zip(alpha, GAMMA, strict=True):
            u = gamma.sqrt() * apart
            system = torch.exp(-u * u) if kernel == "gaussian" else other_kernels.definition(kernel, u)
            torch.testing.assert_close(system @ a + eps * a, torch.sin(points))  # the condition number is at most D/eps
    x = torch.linspace(-12, 12, 24001, dtype=F64, requires_grad=True)  # the trapezoid rule of a smooth integrand
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi) * 1e-3
    y = curve(x.expand(1, 3, -1), ALPHA, GAMMA, DICTIONARY, kernel)[0]
    for c, factor in enumerate(init.gradient_factor(ALPHA, GAMMA, DICTIONARY, kernel)):
        (slope,) = torch.autograd.grad(y[c].sum(), x, retain_graph=True)
        variance = (y[c] ** 2 * density).sum() - (y[c] * density).sum() ** 2
        # Where a third derivative jumps the rule errs by its step squared, 1e-6.
        torch.testing.assert_close(factor, ((slope**2 * density).sum() / variance).sqrt(), rtol=1e-5, atol=0)
    by_name = init.gradient_factor(alpha=ALPHA, gamma=GAMMA, dictionary=DICTIONARY, kernel=kernel)
    assert torch.equal(by_name, init.gradient_factor(ALPHA, GAMMA, DICTIONARY, kernel))


def test_initializers():
    points, gamma = torch.linspace(-3, 3, 20, dtype=F64), torch.full((500,), 1.67, dtype=F64)
    for normal in (init.Normal(0.8), init.Normal(std=0.8)):
        alpha = normal(points, gamma)
        assert 0.76 < alpha.std() < 0.84  # 0.8 within seven of its standard deviations, of 10,000 numbers
        assert normal(dictionary=points, gamma=gamma).shape == (500, 20)
    assert init.Normal() == init.Normal(0.3)
    for isometric in (init.Isometric(1.2, 0.5, "bspline"), init.Isometric(ratio=1.2, std=0.5, kernel="bspline")):
        factor = init.gradient_factor(isometric(points, gamma), gamma, points[None], "bspline")
        assert (factor <= math.sqrt(1.2) + 1e-6).all()
    assert init.Isometric().for_kernel("matern32") == init.Isometric(kernel="matern32")
    assert init.Isometric().for_kernel(kernel="gaussian") == init.Isometric(1.1, math.sqrt(0.5))
    for resolved in (
        init.resolve("normal", points, "gaussian"),
        init.resolve(init="normal", dictionary=points, kernel="gaussian"),
        init.resolve(init.Normal(0.3), points),
    ):
        assert resolved == init.Normal(0.3)
    for start in ("normal", "isometric", init.Normal(std=0.8), init.Isometric(ratio=1.3)):
        torch.manual_seed(0)
        layer = kafops.KAF(3, init=start, dtype=F64)
        torch.manual_seed(0)
        want = init.resolve(start, layer.points()[0])(layer.points()[0], layer.gamma)
        assert torch.equal(layer.alpha.detach(), want)
    assert torch.equal(kafops.KAF(3, init=Ones()).alpha, torch.ones(3, 20))


@of_kernels
@pytest.mark.parametrize("points", [2.0, DICTIONARY], ids=["even", "free"])
def test_bounds(kernel, points):
    x = torch.linspace(-1, 2, 5000, dtype=F64).expand(1, 3, -1).clone().requires_grad_()
    y = curve(x, ALPHA, GAMMA, EVEN if points is not DICTIONARY else points, kernel)
    (slope,) = torch.autograd.grad(y.sum(), x)
    y, slope = y[0].detach(), slope[0]
    lower, upper = torch.full((3,), -1.0), torch.full((3,), 2.0)
    named = {"alpha": ALPHA, "gamma": GAMMA, "boundary": points, "kernel": kernel}
    for arguments, keywords in (
        ((ALPHA, GAMMA, points, -1.0, 2.0, kernel), {}),
        ((), named | {"lower": lower, "upper": upper}),
    ):
        found = bounds.curve_bounds(*arguments, **keywords)
        for of, got in ((y, found.value), (slope, found.slope)):
            # On the grid, of step 6e-4, an extremum is missed by its square times |f‴|: 1e-5 for these curves.
            assert isinstance(got, bounds.Range)
            assert ((got.minimum <= of.amin(1)) & (got.minimum > of.amin(1) - 1e-4)).all()
            assert ((got.maximum >= of.amax(1)) & (got.maximum < of.amax(1) + 1e-4)).all()
        assert torch.equal(found.lipschitz, torch.maximum(-found.slope.minimum, found.slope.maximum))
        for f, got in ((bounds.value_bounds, found.value), (bounds.slope_bounds, found.slope)):
            torch.testing.assert_close(f(*arguments, **keywords), got)
    for ranges in (bounds.CurveRanges(ALPHA, GAMMA, points, kernel), bounds.CurveRanges(**named)):
        ends = torch.full((1, 3, 1), -1.0, dtype=F64), torch.full((1, 3, 1), 2.0, dtype=F64)
        for f, of in ((ranges.values, y), (ranges.slopes, slope)):
            minimum, maximum = f(*ends)
            assert (minimum[0, :, 0] <= of.amin(1)).all()
            assert (maximum[0, :, 0] >= of.amax(1)).all()
            assert torch.equal(f(lower=ends[0], upper=ends[1]).minimum, minimum)
    everywhere = bounds.curve_bounds(ALPHA, GAMMA, points, kernel=kernel)
    assert (everywhere.lipschitz >= slope.abs().amax(1)).all()


@of_kernels
def test_kernels(kernel):
    assert kernels.named(kernel) is kernels.named(kernel=kernel) is kernels.KERNELS[kernel]
    assert kernels.named(kernel).name == kernel
    assert kernels.named(kernel).code == KERNELS.index(kernel)
    u = torch.linspace(-3, 3, 1000, dtype=F64, requires_grad=True)  # no knot is among them
    value = torch.exp(-u * u) if kernel == "gaussian" else other_kernels.definition(kernel, u)
    (first,) = torch.autograd.grad(value.sum(), u, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), u)
    assert torch.equal(kernels.value(kernel, u), kernels.value(kernel, u, 0))
    for order, want in enumerate((value, first, second)):
        torch.testing.assert_close(kernels.value(kernel, u, order), want, rtol=0, atol=1e-14)
        torch.testing.assert_close(kernels.value(kernel=kernel, u=u, order=order), want, rtol=0, atol=1e-14)


def test_backends():
    x = torch.empty(1)
    names = backends.available("cpu")
    assert names == backends.available(device_type="cpu")
    assert names[-1] == "reference"
    for made in (kafops.backend("reference"), kafops.backend(name="reference"), backends.backend("reference")):
        with made:
            assert backends.choose(x) == backends.choose(x=x) == "reference"
            assert backends.explain(x).startswith("reference: ")
            assert backends.explain(x=x) == backends.explain(x)
            assert_same(kafops.kaf(X, ALPHA, GAMMA, 2.0), curve(X, ALPHA, GAMMA, EVEN), ALPHA)
    assert backends.explain(x).startswith(f"{backends.choose(x)}: ")
    with pytest.raises(ValueError, match="there is no backend 'gpu'"), kafops.backend("gpu"):
        pass


def small_network():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.GELU(), nn.Sigmoid())


def test_replace_activations():
    x = torch.randn(2, 1, 5, 5)
    model = small_network()
    old = model[1]
    report = kafops.replace_activations(model, partial(kafops.KAF2d, init="relu"), nn.ReLU, x)
    (made,) = report
    assert isinstance(report, kafops.ReplacementReport)
    assert made == kafops.Replacement(names=("1",), old=old, new=model[1], channels=3, rank=4, uses=1)
    assert isinstance(model[1], kafops.KAF2d)
    assert report.left == [("3", "GELU"), ("4", "Sigmoid")]
    model = small_network()
    report = kafops.replace_activations(model=model, factory=kafops.KAF, targets=(nn.ReLU, nn.GELU), example_input=(x,))
    assert [(r.names, r.channels) for r in report] == [(("1",), 3), (("3",), 2)]
    assert "activation modules replaced: 2" in str(report)
    model = small_network()
    assert len(kafops.replace_activations(model, lambda channels, rank: kafops.KAF2d(channels))) == 2
    assert model(x).shape == (2, 2, 3, 3)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("free", [False, True], ids=["even", "free"])
def test_operators(free, dtype):
    problem = accuracy.random_problem((4, 3, 5), 6, 1 / 6, 3, free)
    cast = {name: t.to(dtype) for name, t in problem.arguments.items()}
    v = tuple(t.to(dtype) for t in problem.v)
    problem = accuracy.Problem(
        cast["x"], cast["alpha"], cast["gamma"], cast.get("dictionary"), 3.0, problem.grad.to(dtype), v
    )
    arguments = (problem.x, problem.alpha, problem.gamma, problem.dictionary, 3.0)
    names = list(problem.arguments)
    ops = torch.ops.kafops
    every = 1 + 2 + 4 + 8 * free
    got = {"y": ops.kaf(*arguments)}
    first = ops.kaf_backward(problem.grad, *arguments, every)
    got |= {f"backward {name}": t for name, t in zip(names, first[: len(names)], strict=True)}
    v = (*problem.v, None)[:4]
    second = ops.kaf_double_backward(*v, problem.grad, *arguments, every + 16)
    named = zip(("grad", *names), second[: 1 + len(names)], strict=True)
    got |= {f"double backward {name}": t for name, t in named}
    assert len(got) == (10 if free else 8)
    errors = accuracy.excess(problem, got)
    assert all(error <= 1 for error in errors.values()), errors
    for needs in range(16):
        asked = ops.kaf_backward.default(problem.grad, *arguments, needs)
        for bit, (t, whole) in enumerate(zip(asked, first, strict=True)):
            assert torch.equal(t, whole) if needs >> bit & 1 else t.shape == (0,)
    assert torch.equal(ops.kaf.default(*arguments), got["y"])
    alone = ops.kaf_double_backward.default(v[0], None, None, None, problem.grad, *arguments, 16)
    assert [t.numel() for t in alone] == [problem.x.numel(), 0, 0, 0, 0]
