"""base="same": a layer starts as exactly the activation that it takes the place of."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kafops
from kafops import KAF, bases, same

FUSED = {
    "relu": [
        nn.ReLU,
        nn.ReLU(inplace=True),
        F.relu,
        torch.relu,
        Tensor.relu,
        partial(F.leaky_relu, negative_slope=0.0),
    ],
    "silu": [nn.SiLU, F.silu, lambda x: x * torch.sigmoid(x), nn.SiLU(inplace=True)],
    "gelu": [nn.GELU, F.gelu, lambda x: x * (1 + torch.erf(x * 0.5**0.5)) / 2],
    "identity": [nn.Identity, lambda x: x],
}
KEPT: dict[str, Any] = {
    "Hardswish": nn.Hardswish(inplace=True),
    "relu6": F.relu6,
    "Mish": nn.Mish,
    "GELU": nn.GELU("tanh"),
    "LeakyReLU": nn.LeakyReLU(0.1),
    "elu": F.elu,
    "tanh": torch.tanh,
    "gelu": partial(F.gelu, approximate="tanh"),
    "leaky_relu": partial(F.leaky_relu, negative_slope=0.2),
}


def called(old: Any) -> Callable[[Tensor], Tensor]:
    return old() if isinstance(old, type) else old


def points() -> Tensor:
    return torch.cat([torch.linspace(-9, 9, 400), torch.tensor([0.0, -0.0, 1e-8, -1e-8, 3e3, -3e3])]).view(-1, 1)


@pytest.mark.parametrize(("base", "old"), [(base, old) for base, olds in FUSED.items() for old in olds])
def test_a_base_is_found_by_its_values(base: str, old: Any) -> None:
    layer = KAF(3, base="same", old=old)
    assert (layer.base, layer.old, layer.fit_error) == (base, None, None)
    assert not layer.alpha.any()
    assert KAF(3, base="same", old=old, init="tanh", fit=True).fit_error is None  # there is nothing to fit


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("options", [{}, {"learn_dictionary": True, "learn_gamma": True}, {"channel_dim": -1}], ids=str)
def test_what_is_no_base_is_kept(name: str, options: dict[str, Any]) -> None:
    old, x = KEPT[name], points().expand(-1, 3).clone()
    layer = KAF(3, base="same", old=old, **options)
    assert layer.base == "same"
    before = x.clone()
    assert torch.equal(layer(x), called(old)(x.clone()))
    assert torch.equal(x, before)
    plain = KAF(3, init="zeros", **options)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert not list(layer.children())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        layer.alpha.normal_()
    other = KAF(3, base="same", old=old, **options)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    torch.testing.assert_close(layer(x) - called(old)(x.clone()), _curves(layer, x), rtol=0, atol=1e-3)
    x.requires_grad_()
    torch.testing.assert_close(layer(x), layer(x.double()).float())
    layer(x).sum().backward()
    assert layer.alpha.grad.abs().sum() > 0


def _curves(layer: KAF, x: Tensor) -> Tensor:
    return kafops.kaf_free(x, layer.alpha, layer.bandwidths(), layer.points(), channel_dim=layer.channel_dim)


def test_names_in_the_repr() -> None:
    assert "base=same, old=Hardswish" in repr(KAF(3, base="same", old=nn.Hardswish))
    assert "init=nearest, gamma=1.671, base=silu" in repr(KAF(3, base="same", old=nn.Mish, fit=True))
    assert "base=relu" in repr(KAF(3, base="same", old=nn.ReLU))


def test_states_tell_an_old_function_from_none() -> None:
    state = KAF(3, base="same", old=nn.Mish).state_dict()
    with pytest.raises(ValueError, match="base in the state_dict is same but this layer was built with base=None"):
        KAF(3).load_state_dict(state)
    with pytest.raises(ValueError, match="base in the state_dict is None but this layer was built with base='same'"):
        KAF(3, base="same", old=nn.Mish).load_state_dict(KAF(3).state_dict())


@pytest.mark.parametrize(("name", "error"), [("Hardswish", 0.03), ("Mish", 0.05), ("GELU", 1e-5), ("LeakyReLU", 0.8)])
def test_a_fit_takes_the_nearest_base(name: str, error: float) -> None:
    old = KEPT[name]
    layer, x = KAF(1, base="same", old=old, fit=True), torch.linspace(-8, 8, 6401)
    assert layer.base in bases.BASES
    assert layer.old is None
    assert layer.fit_error < error
    found = (layer(x) - called(old)(x.clone())).abs().max().item()
    assert found == pytest.approx(layer.fit_error, rel=1e-2, abs=1e-5)
    for base in bases.BASES:
        other = KAF(1, base=base, init=called(same.function_of(old)))
        assert (other(x) - called(old)(x.clone())).abs().max() > 0.99 * layer.fit_error - 1e-5


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * self.scale


def test_an_old_activation_within_a_module_leaves_the_input_as_it_is() -> None:
    x = torch.linspace(-2, 2, 5)[:, None]
    layer, before = KAF(1, base="same", old=nn.Sequential(nn.ELU(inplace=True), nn.Tanh())), x.clone()
    assert torch.equal(layer(x), F.elu(before).tanh())
    assert torch.equal(x, before)


def test_an_old_activation_trains_and_rests_with_its_layer() -> None:
    x = -torch.rand(64, 4)
    layer = KAF(4, base="same", old=nn.RReLU())
    assert not torch.equal(layer(x), layer(x))
    model = nn.Sequential(layer).eval()
    assert torch.equal(model(x), F.rrelu(x))
    assert not torch.equal(model.train()(x), layer(x))
    report = kafops.calibrate(model, x)  # looks in eval mode
    assert list(report) == ["0"]
    assert layer.old.training
    copied = kafops.replace_activations(
        nn.Sequential(nn.RReLU()).eval(), KAF, targets=nn.RReLU, base="same", example_input=x
    )
    assert torch.equal(copied.model(x), F.rrelu(x))


def test_calibrating_fits_anew_and_says_how_far_off() -> None:
    layer, x = KAF(1, base="same", old=nn.Mish, fit=True), torch.linspace(-40, 40, 801)[:, None]
    error = layer.fit_error
    (calibration,) = kafops.calibrate(layer, 20 * torch.randn(4000, 1)).values()
    assert calibration.restarted
    assert layer.boundary > 40
    assert layer.fit_error != error
    assert (layer(x) - F.mish(x)).abs().max() <= 1.02 * layer.fit_error  # which is seen on a grid
    other = pickle.loads(pickle.dumps(layer))
    assert torch.equal(other(x), layer(x))


def test_a_fit_to_a_function_of_ones_own_survives_a_pickle() -> None:
    layer = KAF(1, base="same", old=lambda x: F.mish(x), fit=True)
    other = pickle.loads(pickle.dumps(layer))
    (calibration,) = kafops.calibrate(other, torch.randn(4000, 1)).values()
    assert calibration.restarted
    assert calibration.error < 0.1


def test_layers_of_every_kind_take_it() -> None:
    x = torch.randn(2, 3, 4)
    for layer in (kafops.KAF1d(3, base="same", old=F.mish), kafops.LazyKAF1d(base="same", old=F.mish)):
        assert torch.equal(layer(x), F.mish(x))


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r'base="same" needs old=, the activation'):
        KAF(3, base="same")
    for old in (3, "relu", Tensor):
        with pytest.raises(TypeError, match="old must be a module, a module class or a function, got"):
            KAF(3, base="same", old=old)
    with pytest.raises(TypeError, match="old must be a module, a module class or a function, got 3"):
        KAF(3, old=3)
    for old in (nn.PReLU(), _Scaled()):
        with pytest.raises(ValueError, match=f"no room for the parameters or buffers of {type(old).__name__}"):
            KAF(3, base="same", old=old)
    for old in (F.hardtanh_, lambda x: F.elu(x, inplace=True)):
        with pytest.raises(ValueError, match=r"old must leave its input as it is, and .* works in place"):
            KAF(3, base="same", old=old)
    with pytest.raises(ValueError, match=r"old must be finite on \[-8, 8\] where fit=True, and sqrt gives nan at -8"):
        KAF(3, base="same", old=torch.sqrt, fit=True)
    with pytest.raises(ValueError, match='fit=True goes with base="same", got base=None'):
        KAF(3, fit=True)
    with pytest.raises(ValueError, match="init must be None where base=\"same\" keeps or fits Mish, got 'silu'"):
        KAF(3, base="same", old=nn.Mish, init="silu")
    with pytest.raises(ValueError, match="no bounds of a curve on Mish"):
        KAF(3, base="same", old=nn.Mish).bounds()


@pytest.mark.parametrize("old", [nn.Hardswish, F.mish])
def test_compiles_in_one_graph(old: Any) -> None:
    layer, x = KAF(3, base="same", old=old), torch.randn(8, 3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    torch.export.export(layer, (x,))


@pytest.mark.parametrize(
    ("old", "does"),
    [
        (nn.GLU(), "has another shape"),
        (nn.Softmax(1), "depends on other elements"),
        (lambda x: x - x.mean(), "depends on other elements"),
        (lambda x: None, "has another shape"),
    ],
)
def test_what_is_no_function_of_each_element_is_refused(old, does):
    with pytest.raises(ValueError, match=f"old must be applied to each element by itself, and what .* returns {does}"):
        kafops.KAF(4, base="same", old=old)


def test_a_function_that_fails_is_named():
    with pytest.raises(ValueError, match=r"GLU fails on shape \[3, 4\] or \[2, 2\] with IndexError: ") as told:
        kafops.KAF(4, base="same", old=nn.GLU(dim=5))
    assert isinstance(told.value.__cause__, IndexError)


def test_random_activations_are_kept():
    layer = kafops.KAF(4, base="same", old=nn.RReLU())
    assert layer.old.training
