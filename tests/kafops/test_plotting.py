"""kafops.plot and kafops.watch: what is drawn, and what is said."""

import copy
import sys
from io import BytesIO

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import kafops


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), kafops.KAF(8, init="normal"), kafops.KAF(8, base="silu", learn_gamma=True))


def x():
    return 2 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0))


def panels(figure):
    return [a for a in figure.axes if a.get_visible() and a.get_title(loc="left")]


def test_a_layers_curves_are_drawn():
    layer = kafops.KAF2d(4, base="gelu", learn_dictionary=True)
    with torch.no_grad():
        layer.alpha.normal_()
        layer.dictionary[:, 0] = -3.5
    figure = kafops.plot(layer)
    assert isinstance(figure, Figure)
    (axes,) = panels(figure)
    assert axes.get_title(loc="left") == "KAF2d\n4 channels"
    lines = {line.get_label(): line for line in axes.lines}
    drawn = [line for line in lines.values() if len(line.get_xdata()) > 2]
    assert len(drawn) == 5  # and the base
    grid = torch.as_tensor(drawn[0].get_xdata())
    for c in range(4):
        torch.testing.assert_close(torch.as_tensor(drawn[c].get_ydata()), layer.curves(grid)[:, c].double().detach())
    torch.testing.assert_close(torch.as_tensor(drawn[4].get_ydata()), kafops.bases.value("gelu", grid))
    upright = [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1]
    assert upright == [-3.5, 3.0]
    words = [t.get_text() for t in figure.legends[0].get_texts()]
    assert words == ["channel 0", "channel 1", "channel 2", "channel 3", "base", "end of the dictionary"]


def test_many_channels_have_a_mean():
    layer = kafops.KAF(300, init="normal")
    (axes,) = panels(kafops.plot(layer))
    curves = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert len(curves) == 129
    grid = torch.as_tensor(curves[0].get_xdata())
    assert torch.equal(torch.as_tensor(curves[0].get_ydata()), layer.curves(grid)[:, 0].double().detach())
    assert torch.equal(torch.as_tensor(curves[127].get_ydata()), layer.curves(grid)[:, 299].double().detach())
    torch.testing.assert_close(torch.as_tensor(curves[128].get_ydata()), layer.curves(grid).double().mean(1).detach())


def test_a_model_has_panels_with_the_density_and_the_share_outside():
    model = network()
    before = copy.deepcopy(model.state_dict())
    figure = kafops.plot(model.train(), [x()])
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    titles = [a.get_title(loc="left").split("\n") for a in panels(figure)]
    assert [t[0] for t in titles] == ["1", "2"]
    inputs = model[0](x())
    share = (inputs.abs() > 3).double().mean().item()
    assert titles[0][1] == f"8 channels, {100 * share:.2g} % of inputs outside"
    assert titles[1][1] == "8 channels, none of inputs outside"
    patches = [p for a in figure.axes for p in a.patches]
    assert len(patches) == 2
    heights, places, _ = patches[0].get_data()
    inside = (inputs >= places[0]) & (inputs <= places[-1])
    assert sum(heights) == pytest.approx(inside.sum().item(), rel=2e-2)  # a bin's inputs are spread evenly over it
    half = torch.as_tensor(heights)[: len(heights) // 2].sum()
    assert half == pytest.approx(((inputs < 0) & inside).sum().item(), rel=2e-2)
    figure.savefig(BytesIO())


def test_of_many_layers_some_are_drawn():
    model = nn.Sequential(*(kafops.KAF(2) for _ in range(30)))
    figure = kafops.plot(model, limit=5)
    assert [a.get_title(loc="left").split("\n")[0] for a in panels(figure)] == ["0", "7", "14", "22", "29"]
    assert figure.get_suptitle() == "5 of 30 layers"


def test_layers_of_every_kind_are_drawn():
    for layer in (
        kafops.KAF(1),
        kafops.KAF3d(7, init="zeros"),
        kafops.KAF(3, channel_dim=-1, kernel="bspline", base="same", old=nn.Mish),
        kafops.KAF(2, dictionary_size=1, gamma=1.0, learn_dictionary=True),
        kafops.KAF(2, dtype=torch.float64),
    ):
        kafops.plot(layer).savefig(BytesIO())


def test_without_matplotlib(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "kafops\[plot\]" brings it'):
        kafops.plot(kafops.KAF(2))


def test_no_window_and_no_state_of_pyplot():
    before = dict(matplotlib.rcParams)
    kafops.plot(kafops.KAF(2))
    assert dict(matplotlib.rcParams) == before


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="limit must be an integer ≥ 1, got 0"):
        kafops.plot(kafops.KAF(2), limit=0)
    for function in (kafops.plot, kafops.watch):
        with pytest.raises(ValueError, match="Linear has no KAF layer"):
            function(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="the model fails on batch 1, a Tensor with"):
            function(network(), torch.zeros(2, 5))


def test_watch_tells_numbers_of_each_layer():
    model = network()
    with torch.no_grad():
        model[2].log_gamma[0] = 1.0
    found = kafops.watch(model, x())
    inputs = model[0](x()).detach()
    assert found["kaf/1/alpha"] == model[1].alpha.abs().max().item()
    assert found["kaf/1/outside"] == pytest.approx((inputs.abs() > 3).double().mean().item())
    assert found["kaf/1/outside_worst"] == pytest.approx((inputs.abs() > 3).double().mean(0).max().item())
    bound = model[1].bounds(-3.0, 3.0).lipschitz.max().item()
    assert bound * 0.99 < found["kaf/1/slope"] <= bound
    assert found["kaf/2/gamma_max"] == pytest.approx(torch.e)
    assert found["kaf/2/slope"] == pytest.approx(1.1, abs=1e-2)  # SiLU's
    assert found["kaf/slope"] == found["kaf/1/slope"]
    assert found["kaf/outside"] == found["kaf/1/outside"]
    assert all(type(v) is float for v in found.values())
    assert {k for k in kafops.watch(model) if "outside" in k} == set()
    with torch.no_grad():
        assert kafops.watch(model, x()) == found


def test_watch_gives_a_figure_where_asked():
    found = kafops.watch(network(), x(), figure=True)
    assert isinstance(found.pop("kaf/curves"), Figure)
    assert found == kafops.watch(network(), x())


def test_tensorboard_takes_it(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        found = kafops.watch(network(), x(), figure=True)
        writer.add_figure("kaf/curves", found.pop("kaf/curves"), 1)
        for name, value in found.items():
            writer.add_scalar(name, value, 1)
    assert list(tmp_path.iterdir())


def test_a_layer_that_diverged_is_drawn_and_told():
    model = network()
    with torch.no_grad():
        model[1].alpha[0, 3] = torch.nan
    numbers = kafops.watch(model, x(), figure=True)
    assert isinstance(numbers["kaf/curves"], Figure)
    for key in ("alpha", "slope"):
        assert numbers[f"kaf/1/{key}"] != numbers[f"kaf/1/{key}"]
        assert numbers[f"kaf/{key}"] != numbers[f"kaf/{key}"]
        assert numbers[f"kaf/2/{key}"] < 100
    with torch.no_grad():
        model[1].alpha.fill_(torch.nan)
    kafops.plot(model[1]).savefig(BytesIO())


def test_watch_works_in_inference_mode():
    model = network()
    want = kafops.watch(model, x())
    with torch.inference_mode():
        assert kafops.watch(model, x()) == want
