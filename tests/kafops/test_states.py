"""kafops.load_state_dict: states of calibrated networks, of plain ones, of the authors' own layer."""

import copy

import pytest
import torch
from torch import nn

import kafops


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))


def converted(**arguments):
    model = plain()
    kafops.replace_activations(model, lambda c: kafops.KAF(c, **arguments), example_input=x())
    return model.eval()


def x():
    return 4 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "arguments", [{}, {"base": "silu"}, {"learn_gamma": True, "learn_dictionary": True}, {"kernel": "bspline"}]
)
def test_a_calibrated_state_loads_into_a_fresh_network(arguments):
    trained = converted(init="relu", **arguments)
    calibrated = kafops.calibrate(trained, x())
    with torch.no_grad():
        for p in trained.parameters():
            p += 0.01
    state = trained.state_dict()
    fresh = converted(init="relu", **arguments)
    if "learn_dictionary" not in arguments:  # whose points say where they are
        with pytest.raises(ValueError, match=r"boundary in .*, or load the state by kafops\.load_state_dict, which"):
            fresh.load_state_dict(state)
    loaded = kafops.load_state_dict(fresh, state)
    assert loaded.boundaries == {name: c.boundary for name, c in calibrated.items()}
    assert (loaded.missing_keys, loaded.unexpected_keys, loaded.without_curves) == ([], [], [])
    assert "boundaries taken from the state_dict: 1 (3 → " in str(loaded)
    assert torch.equal(fresh(x()), trained(x()))
    for a, b in zip(fresh, trained, strict=True):
        if isinstance(a, kafops.KAF):
            assert a.boundary == b.boundary
            a.reset_parameters()
            b.reset_parameters()
            torch.testing.assert_close(a.alpha, b.alpha)
    copy.deepcopy(fresh).load_state_dict(fresh.state_dict())
    if "learn_dictionary" in arguments:
        return
    with pytest.raises(ValueError, match="boundary in the state_dict"):  # only within the call
        fresh.load_state_dict(converted(init="relu", boundary=9.0, **arguments).state_dict())


def test_a_lazy_layer_takes_the_boundary_too():
    layer = kafops.KAF(4, boundary=7.0, init="relu")
    fresh = kafops.LazyKAF()
    assert kafops.load_state_dict(fresh, layer.state_dict()).boundaries == {"": (3.0, 7.0)}
    grid = torch.linspace(-8, 8, 100)
    assert torch.equal(fresh.curves(grid), layer.curves(grid))


def test_a_plain_state_loads_all_but_the_curves():
    state = plain().state_dict()
    for p in state.values():
        p += 1
    model = converted(init="relu")
    curves = [p.clone() for p in kafops.curve_parameters(model)]
    loaded = kafops.load_state_dict(model, state)
    assert (loaded.missing_keys, loaded.unexpected_keys) == ([], [])
    assert loaded.without_curves == ["1", "4"]
    assert str(loaded) == "the state_dict has no curves, as one from before a conversion; these stay as they were: 1, 4"
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert all(map(torch.equal, kafops.curve_parameters(model), curves))


def test_strict_finds_what_does_not_fit():
    model, state = converted(), converted().state_dict()
    assert str(kafops.load_state_dict(model, state)) == "all keys match"
    for change, words in (
        (lambda s: s.pop("0.weight"), r"does not fit Sequential:\nmissing in the state_dict: 0\.weight$"),
        (lambda s: s.pop("1.alpha"), r"missing in the state_dict: 1\.alpha$"),
        (
            lambda s: [s.pop(k) for k in list(s) if k.startswith("1.")],
            r"missing in .*: 1\.alpha, 1\.gamma, 1\.curve$",
        ),
        (lambda s: s.update({"9.weight": torch.zeros(1)}), r"not in the model: 9\.weight$"),
        (lambda s: s.update({"1.alpha": torch.zeros(8, 4)}), "size mismatch for 1.alpha"),
    ):
        changed = copy.copy(state)
        change(changed)
        with pytest.raises(RuntimeError, match=words):
            kafops.load_state_dict(model, changed)
    with pytest.raises(ValueError, match="base in the state_dict is None but"):
        kafops.load_state_dict(converted(base="silu"), state)
    state = plain().state_dict()
    del state["3.bias"]
    with pytest.raises(RuntimeError, match=r"missing in the state_dict: 3\.bias$"):
        kafops.load_state_dict(model, state)
    loaded = kafops.load_state_dict(model, state | {"y": torch.ones(1)}, strict=False)
    assert (loaded.missing_keys, loaded.unexpected_keys, loaded.without_curves) == (["3.bias"], ["y"], ["1", "4"])
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
        kafops.load_state_dict({}, {})
    with pytest.raises(TypeError, match=r"state_dict must be a mapping of names to tensors, .* got list"):
        kafops.load_state_dict(model, [])


def authors(shape, boundary=4.0, size=20, gamma="each"):
    """A state as the authors' layer has it, and its curves at x [N, C] by their formula."""
    alpha = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.8
    points = torch.linspace(-boundary, boundary, size)
    value = 1 / (8 * (points[1] - points[0]) ** 2)
    dictionary = points.view(*[1] * (alpha.dim() - 1), size)
    state = {"alpha": alpha, "dict": dictionary}
    if gamma == "each":
        state["gamma"] = value.repeat(size)
    if gamma == "2017":
        state["dict"] = points

    def curves(x):
        return (torch.exp(-value * (x[:, :, None] - points) ** 2) * alpha.reshape(1, -1, size)).sum(2)

    return state, curves


@pytest.mark.parametrize("shape", [(1, 5, 1, 1, 20), (1, 5, 20), (1, 5, 1, 1, 8)])
@pytest.mark.parametrize("gamma", ["each", "2017"])
@pytest.mark.parametrize("boundary", [4.0, 2.7])
def test_the_authors_own_layer_loads(shape, gamma, boundary):
    state, curves = authors(shape, boundary, shape[-1], gamma)
    for learned in (False, True):
        net = nn.ModuleDict({"act": kafops.KAF(5, shape[-1], learn_gamma=learned, learn_dictionary=learned)})
        loaded = kafops.load_state_dict(net, {"act." + k: v for k, v in state.items()})
        assert loaded.boundaries == {"act": (3.0, boundary)}
        inputs = 2 * torch.randn(200, 5, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(net["act"](inputs), curves(inputs), rtol=1e-5, atol=1e-5)  # of 20 terms of 2.5
    assert sorted(state) == sorted(authors(shape, boundary, shape[-1], gamma)[0])  # unchanged


def test_what_the_authors_layer_may_not_be():
    state, _ = authors((1, 5, 20), gamma=None)
    with pytest.raises(ValueError, match="comes without gamma, so its kernel is not the Gaussian"):
        kafops.load_state_dict(kafops.KAF(5), state)
    state, _ = authors((1, 5, 20))
    state["dict"] = state["dict"] ** 3
    with pytest.raises(
        ValueError, match=r"dict in the state_dict, of the authors' own layer, must be even on \[-b, b\]"
    ):
        kafops.load_state_dict(kafops.KAF(5), state)
    kafops.load_state_dict(kafops.KAF(5, learn_dictionary=True), state)
    state, _ = authors((1, 5, 20))
    state["gamma"][3] *= 2
    with pytest.raises(ValueError, match="gamma in the state_dict must be one value for all points"):
        kafops.load_state_dict(kafops.KAF(5), state)


def test_assign():
    model, state = converted(), converted().state_dict()
    kafops.load_state_dict(model, state, assign=True)
    assert model[0].weight.data_ptr() == state["0.weight"].data_ptr()
