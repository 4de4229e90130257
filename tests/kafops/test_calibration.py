"""kafops.calibrate: dictionaries where the inputs are, and curves fitted anew on them."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import prune

import kafops
from kafops.inputs import edges

F64 = torch.float64


def wide(n=4000, channels=3, scale=5.0, seed=0):
    return scale * torch.randn(n, channels, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def digits():
    """A ReLU network without norms, trained on scikit-learn's digits, and the images it is calibrated and tested on."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        order = torch.randperm(len(x))
        x, y = x[order], y[order]
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 48), nn.ReLU(), nn.Linear(48, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(10):
            for i in torch.randperm(1200).split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(x[i]), y[i]).backward()
                optimizer.step()
    return model.eval(), x[:1200], x[1200:], y[1200:]


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def converted(model, x, **arguments):
    model = copy.deepcopy(model)
    report = kafops.replace_activations(model, partial(kafops.KAF, **arguments), example_input=x)
    return model, report


@pytest.mark.parametrize("arguments", [{"init": "relu"}, {"init": "same"}, {"init": "same", "learn_dictionary": True}])
def test_a_network_without_norms_falls_when_it_is_converted_and_is_kept_when_calibrated(digits, arguments):
    model, x, test_x, test_y = digits
    before = accuracy(model, test_x, test_y)
    assert before > 0.95
    curved, report = converted(model, x[:100], **arguments)
    assert max(report.outside.values()) > 0.2  # which the report says, too
    assert "% at 7; kafops.calibrate puts dictionaries where the inputs are" in str(report)
    assert accuracy(curved, test_x, test_y) < before - 0.15
    calibrations = kafops.calibrate(curved, x.split(200))
    assert list(calibrations) == ["1", "3", "7"]
    assert accuracy(curved, test_x, test_y) > before - 0.01
    for name, c in calibrations.items():
        assert curved.get_submodule(name).boundary == c.boundary[1]
        assert c.outside[1] <= 0.001
        assert c.restarted
    assert calibrations["7"].outside[0] > 0.2


def test_nothing_of_the_old_function_is_kept():
    layer = kafops.KAF(4, init="same", old=nn.Mish())
    assert layer.base is None
    assert layer.old is None
    assert list(layer.state_dict()) == list(kafops.KAF(4).state_dict())
    assert torch.equal(layer.alpha, kafops.KAF(4, init=F.mish).alpha)
    assert "init=same, old=Mish" in repr(layer)
    with pytest.raises(TypeError, match=r'init="same" needs old=.* got none'):
        kafops.KAF(4, init="same")


@pytest.mark.parametrize("kernel", ["gaussian", "rational_quadratic", "matern32", "bspline"])
@pytest.mark.parametrize("base", [None, "silu"])
def test_a_start_is_that_of_a_layer_made_for_the_range(kernel, base):
    layer = kafops.KAF(3, init="elu", kernel=kernel, base=base)
    report = kafops.calibrate(layer, wide())
    assert list(report) == ["KAF"]
    assert 15 < layer.boundary < 20  # 3.3 standard deviations of 5, and 6 % at most
    fresh = kafops.KAF(3, boundary=layer.boundary, init="elu", kernel=kernel, base=base)
    torch.testing.assert_close(layer.alpha, fresh.alpha)
    torch.testing.assert_close(layer.gamma, fresh.gamma)
    assert torch.equal(layer.curve, fresh.curve)
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.testing.assert_close(layer.alpha, fresh.alpha)


LAYERS = {
    "even": ({}, (4000, 3)),
    "maps": ({}, (50, 3, 8, 10)),
    "volumes": ({}, (20, 3, 2, 10, 10)),
    "tokens": ({"channel_dim": -1}, (40, 100, 3)),
    "free": ({"learn_dictionary": True, "learn_gamma": True}, (4000, 3)),
    "double": ({"dtype": F64}, (4000, 3)),
    "half": ({"dtype": torch.bfloat16}, (4000, 3)),
    "base": ({"base": "gelu"}, (4000, 3)),
    "kept": ({"base": "same", "old": nn.Mish}, (4000, 3)),
    "fitted": ({"base": "same", "old": nn.Mish, "fit": True}, (4000, 3)),
    "shared": ({"shared": True}, (40, 100, 3)),
    "bspline": ({"kernel": "bspline", "base": "identity"}, (4000, 3)),
    "matern": ({"kernel": "matern32"}, (4000, 3)),
    "one point": ({"dictionary_size": 1, "gamma": 0.5}, (4000, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_trained_curve_is_fitted_to_itself(name):
    arguments, shape = LAYERS[name]
    arguments = dict(arguments)
    torch.manual_seed(1)
    layer = kafops.KAF(1 if arguments.pop("shared", False) else 3, **arguments)
    with torch.no_grad():
        layer.alpha.copy_(torch.randn(layer.alpha.shape) / 4)
        if layer.dictionary is not None:
            layer.dictionary += 0.1 * torch.randn(layer.dictionary.shape)
            layer.log_gamma += 0.1 * torch.randn(layer.log_gamma.shape)
    x = 0.9 * torch.randn(shape)  # whose quantile is no further than the boundary, so that curves can be kept
    before = layer(x).detach()
    gamma, points = layer.bandwidths().detach().clone(), layer.points().detach().clone()
    (report,) = kafops.calibrate(layer, x).values()
    assert not report.restarted
    assert report.boundary == (3.0, layer.boundary)
    assert layer.boundary < 3.25
    moved = (layer(x) - before).double().square().mean().sqrt()
    if name == "one point":
        return  # a single kernel of another width is another curve
    assert moved < 0.03 * before.double().std()
    # Half-precision coefficients add what they round to; the histogram's bins are not quite where the inputs are.
    torch.testing.assert_close(report.error, moved.item(), rtol=0.3, atol=2e-2 if name == "half" else 2e-3)
    stretch = (layer.points() / points).nanmedian(dim=1).values
    kept = layer.bandwidths() * stretch**2  # float32 where γ is of half precision: so are the points of an even grid
    torch.testing.assert_close(kept, gamma.to(kept), rtol=1e-2 if name == "half" else 1e-5, atol=0)
    if name == "free":
        torch.testing.assert_close(layer.points().abs().amax(1), torch.full((3,), layer.boundary))


def test_the_share_outside_is_that_of_the_inputs():
    layer = kafops.KAF(2, boundary=2.0)
    x = torch.tensor([[0.0, 5.0], [-2.0, 6.0], [2.0, 7.0], [-2.5, 7.5]])
    (report,) = kafops.calibrate(layer, x, quantile=0.75).values()  # six of eight
    assert report.outside == (5 / 8, 2 / 8)
    assert report.boundary == (2.0, 6.25)  # the edge above 6
    assert report.worst == 0.5
    (report,) = kafops.calibrate(layer, x, quantile=1).values()
    assert report.boundary == (6.25, 7.75)  # the edge above 7.5
    assert report.outside == (0.25, 0.0)


def test_edges_are_where_inputs_are_counted():
    begins, stops = edges()
    assert torch.equal(begins[1:], stops[:-1])
    layer = kafops.KAF(1)
    inside = begins[(begins.abs() < 1e6) & (begins.abs() > 1e-3)]
    for x in (inside, torch.nextafter(inside.float(), torch.tensor(-torch.inf)).double()):
        with kafops.inputs.observed({"": layer}) as seen:
            layer(x)
        (at,) = seen[""].counts[:, :].bool()
        assert all(((begins <= v) & (v < stops))[at].any() or v < 0 for v in x)
        assert int(seen[""].counts.sum()) == len(x)


def test_calibrating_twice_changes_little():
    torch.manual_seed(0)
    layer, x = kafops.KAF(3, init="normal"), wide(scale=0.5)
    kafops.calibrate(layer, x)
    alpha = layer.alpha.clone()
    (report,) = kafops.calibrate(layer, x).values()
    assert report.boundary[0] == report.boundary[1]
    assert torch.equal(layer.alpha, alpha)
    assert report.error == 0


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout()
        self.act = kafops.KAF(4, init="relu")
        self.aux = kafops.KAF(4, init="relu")

    def forward(self, x, twice=None):
        y = self.act(self.drop(self.norm(self.inner(x))))
        return self.aux(y) if self.training else self.act(y) if twice is not None else y


def test_only_curves_change():
    torch.manual_seed(0)
    model = Model().train()
    model.drop.eval()
    model(wide()).sum().backward()
    parameters = {n: (p, p.grad, p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}
    flags = {n: m.training for n, m in model.named_modules()}
    buffers = {n: b.clone() for n, b in model.named_buffers() if "norm" in n}
    hooks = len(model.act._forward_hooks)
    state = torch.get_rng_state()
    report = kafops.calibrate(model, [wide()])
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert all(torch.equal(dict(model.named_buffers())[n], b) for n, b in buffers.items())
    for n, (p, grad, values) in parameters.items():
        assert dict(model.named_parameters())[n] is p
        assert p.grad is grad
        assert torch.equal(grad, values)
    assert len(model.act._forward_hooks) == hooks
    assert list(report) == ["act"]
    assert report.unreached == ["aux"]
    assert model.aux.boundary == 3
    assert "not reached by the inputs, and left as they were: aux" in str(report)


@pytest.mark.parametrize(
    "inputs",
    [
        lambda x: x,
        lambda x: {"x": x},
        lambda x: [x],
        lambda x: iter(x.split(1000)),
        lambda x: [(x, torch.zeros(len(x)))],
        lambda x: [[{"x": x}, 1]],
        lambda x: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, 0]), 1000),
    ],
    ids=["tensor", "mapping", "list", "generator", "pairs", "pair of mapping", "loader"],
)
def test_batches_of_any_kind(inputs):
    torch.manual_seed(0)
    model = Model()
    want = kafops.calibrate(copy.deepcopy(model), wide())
    assert kafops.calibrate(model, inputs(wide())) == want


def test_uses_of_one_layer_are_counted_together():
    model = Model()
    kafops.calibrate(model, {"x": wide(), "twice": True})
    with kafops.inputs.observed({"act": model.act}) as seen:
        model.eval()(wide(), True)
    assert seen["act"].total.tolist() == [8000] * 4


def test_compiled_models_are_looked_at_too():
    torch.manual_seed(0)
    layer = nn.Sequential(kafops.KAF(3, init="relu"))
    compiled = torch.compile(layer, backend="eager")
    compiled(wide())
    kafops.calibrate(compiled, wide())
    assert layer[0].boundary > 15
    torch.testing.assert_close(compiled(wide()), layer(wide()))


def test_a_start_survives_pickling():
    for init, error in ((F.relu, 0.2), (nn.ReLU, 0.2), (lambda x: x.clamp(min=0), 0.2)):  # of a lambda, straight lines
        layer = pickle.loads(pickle.dumps(kafops.KAF(3, init=init)))
        (report,) = kafops.calibrate(copy.deepcopy(layer), wide()).values()
        assert report.restarted
        assert report.error < error
    assert "lambda" in repr(kafops.KAF(3, init=lambda x: x))


def test_all_inputs_at_zero_leave_the_boundary():
    layer = kafops.KAF(2)
    (report,) = kafops.calibrate(layer, torch.zeros(4, 2)).values()
    assert report.boundary == (3.0, 3.0)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: kafops.calibrate([], wide()), TypeError, r"model must be an nn\.Module, got list"),
        (lambda: kafops.calibrate(nn.Linear(3, 3), wide()), ValueError, "Linear has no KAF layer; kafops.replace_act"),
        (lambda: kafops.calibrate(kafops.LazyKAF(), wide()), ValueError, "has no size yet; run the model once"),
        (lambda: kafops.calibrate(kafops.KAF(3), []), ValueError, "hold no batch: a loader that is empty"),
        (lambda: kafops.calibrate(kafops.KAF(3), 7), TypeError, "inputs must be a batch .* got int"),
        (lambda: kafops.calibrate(kafops.KAF(3), "x"), TypeError, "inputs must be a batch .* got str"),
        (lambda: kafops.calibrate(kafops.KAF(3), [()]), ValueError, "must not be an empty tuple"),
        (
            lambda: kafops.calibrate(kafops.KAF(3), (wide(), torch.zeros(4))),
            ValueError,
            r"fails on batch 2, a Tensor with \[4\] float32: .*\na batch must be .* a tuple or list given as inputs is",
        ),
        (lambda: kafops.calibrate(kafops.KAF(3), wide(), quantile=0), ValueError, r"in \(0, 1\], got 0"),
        (lambda: kafops.calibrate(kafops.KAF(3), wide(), quantile="a"), TypeError, r"in \(0, 1\], got str"),
        (lambda: kafops.calibrate(kafops.KAF(3), wide() / 0), ValueError, "inputs of KAF are not finite"),
        (lambda: kafops.calibrate(kafops.KAF(3), wide() * 1e9), ValueError, r"beyond 2\^20 where the quantile 0.999"),
    ],
)
def test_says_what_is_wrong(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_failure_leaves_the_model():
    model = nn.Sequential(kafops.KAF(3), kafops.KAF(3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="fails on batch 2"):
        kafops.calibrate(model, [wide(), wide(channels=5)])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not model[0]._forward_hooks
    layer = kafops.KAF(3)
    prune.random_unstructured(layer, "alpha", 0.5)
    with pytest.raises(ValueError, match="alpha of KAF is pruned or parametrized"):
        kafops.calibrate(layer, wide())


def test_the_report_is_a_table():
    layer = nn.Sequential(kafops.KAF(3, init="relu"))
    lines = str(kafops.calibrate(layer, wide())).splitlines()
    assert " ".join(lines[0].split()) == "layer boundary inputs outside worst channel error of the curve"
    assert lines[1].startswith("0        3 → 18  ")


@pytest.mark.parametrize("init", ["normal", "isometric", "elu"])
def test_the_random_generator_stays(init):
    layer, before = kafops.KAF(3, init=init), torch.get_rng_state()
    kafops.calibrate(layer, torch.ones(4, 3))
    assert torch.equal(torch.get_rng_state(), before)
