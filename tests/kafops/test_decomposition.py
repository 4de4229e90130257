"""Curves in operators that every runtime has: ONNX by both exporters, and decompositions of exported programs."""

import io
import typing
import warnings

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import kafops
from kafops import bases, init, kernels, ops

F32, F64 = torch.float32, torch.float64
C = 4
# Layers with graphs of their own, small ones, and starts, which differ in values alone.
LAYERS = [
    {"init": "elu"},
    *({"dictionary_size": 5, "kernel": name, "init": "elu"} for name in kernels.KERNELS if name != "gaussian"),
    *({"dictionary_size": 3, "base": name, "init": "normal"} for name in bases.BASES),
    {"dictionary_size": 3, "base": "same", "old": nn.Hardswish},
    {"dictionary_size": 1, "gamma": 0.5, "init": "normal"},
    {"dictionary_size": 7, "boundary": 2.0, "gamma": torch.linspace(0.5, 3, C)},
    {"dictionary_size": 4, "learn_dictionary": True, "learn_gamma": True},
    {"dictionary_size": 3, "channel_dim": -1},
    {"dictionary_size": 3, "channel_dim": 2, "learn_dictionary": True, "kernel": "bspline", "base": "gelu"},
    {"dictionary_size": 3, "num_parameters": 1, "base": "silu", "init": "normal"},
]
STARTS = [{"init": name} for name in typing.get_args(init.InitName) if name != "same"]


class Layers(nn.Module):
    """Every layer on the same input."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return tuple(layer(x) for layer in self.layers)


def every_layer(table=LAYERS):
    """The layers of a table, with curves that differ where all of a dictionary's are learned."""
    torch.manual_seed(0)
    layers = Layers([kafops.KAF(**{"num_parameters": C} | options) for options in table])
    for layer, options in zip(layers.layers, table, strict=True):
        if "learn_dictionary" in options:
            layer.dictionary.data += 0.01 * torch.randn_like(layer.dictionary)
            layer.alpha.data += 0.1 * torch.randn_like(layer.alpha)
    return layers.eval()


def inputs(batch):
    x = torch.linspace(-4, 4, batch * C**3).reshape(batch, C, C, C)  # each dimension but the first may be the channels'
    x[0, 1, 2, 3], x[0, 2, 3, 1], x[0, 3, 1, 2] = torch.nan, torch.inf, -torch.inf
    return x


def run(data, x):
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (only,) = session.get_inputs()
    return [torch.from_numpy(y) for y in session.run(None, {only.name: x.numpy()})]


def exported(model, arguments, **options):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's, of its own exporter
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.onnx.export(model, arguments, file, verbose=False, **options)
    data = file.getvalue()
    opsets = {imported.domain: imported.version for imported in onnx.load_from_string(data).opset_import}
    assert opsets[""] >= 18
    assert set(opsets) <= {"", "pkg.onnxscript.torch_lib.common"}
    return data


def exact(model, x):
    """The definition in float64."""
    with kafops.backend("reference"), torch.no_grad():
        return model.double()(x.double())


def assert_close(got, want, roundings=4, table=LAYERS):
    """Within some float32 roundings of a number that is 1 or more, a few more of a runtime's own SiLU.

    The sum itself has one; exporters round constants, and runtimes have a γ = exp(log γ) of their own.
    """
    for options, y, exact in zip(table, got, want, strict=True):
        bound = (roundings + 8 * ("base" in options)) * 2**-24 * exact.abs().clamp(min=1)
        off = (y.double() - exact).abs() > bound
        assert not off[exact.isfinite()].any(), options
        assert torch.equal(y[~exact.isfinite()].double().nan_to_num(0), exact[~exact.isfinite()].nan_to_num(0)), options


EXPORTERS = {
    "dynamo": {"dynamo": True, "dynamic_shapes": ({0: torch.export.Dim("batch")},)},
    "legacy": {"dynamo": False, "opset_version": 18, "input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}},
}


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_onnx(exporter):
    model, x = every_layer(), inputs(7)
    data = exported(model, (inputs(3),), **EXPORTERS[exporter])
    assert_close(run(data, x), exact(model, x))


def test_every_start():
    model, x = every_layer(STARTS), inputs(7)
    data = exported(model, (inputs(3),), **EXPORTERS["legacy"])
    assert_close(run(data, x), exact(model, x), table=STARTS)


def program(model, x):
    return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def kafops_nodes(program):
    return [n.target for n in program.graph.nodes if "kafops" in str(n.target)]


def test_onnx_of_an_exported_program():
    some = LAYERS[::5]
    model, x = every_layer(some), inputs(7)
    before = program(model, inputs(3))
    assert len(kafops_nodes(before)) == len(some)
    assert_close(run(exported(before, (), dynamo=True), x), exact(model, x), table=some)


def test_decompositions():
    """A sum in float32 is off by some roundings of the sum of the terms' sizes: of an ELU's, about 200."""
    model, x = every_layer(), inputs(7)
    before = program(model, inputs(3))
    assert len(kafops_nodes(before.run_decompositions())) == len(LAYERS)
    want = exact(model, x)
    for dtype, roundings in ((F64, 4), (F32, 1000)):
        after = before.run_decompositions(kafops.decompositions(dtype))
        assert not kafops_nodes(after)
        assert_close(after.module()(x), want, roundings)


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"dtype must be torch\.float32 or torch\.float64, got torch\.float16"):
        kafops.decompositions(torch.float16)


@pytest.mark.parametrize("layout", ["channels_last", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float16, F32, F64], ids=str)
def test_it_takes_and_gives_what_the_operator_does(layout, dtype):
    x = inputs(3).to(dtype)
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x[:1].expand_as(x)
    alpha, gamma = torch.randn(C, 7), torch.ones(C)
    want = ops.kaf(x, alpha, gamma, None, 3.0)
    y = kafops.decompositions()[ops.kaf](x, alpha, gamma, None, 3.0)
    assert (y.dtype, y.shape, y.stride()) == (want.dtype, want.shape, want.stride())
    torch.testing.assert_close(y, want, equal_nan=True)


class Derivatives(nn.Module):
    """A slope, and the gradient of a function of it, as force fields have them."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 5),
            kafops.KAF(5, 3, init="normal", learn_gamma=True),
            nn.Linear(5, 5),
            kafops.KAF(5, 3, base="silu", init="normal", learn_dictionary=True),
            nn.Linear(5, 1),
        )

    def forward(self, x):
        def slope(x):
            return torch.func.grad(lambda x: self.net(x).sum())(x)

        return slope(x), torch.func.grad(lambda x: slope(x).sin().sum())(x)


def test_derivatives_are_decomposed_too():
    torch.manual_seed(0)
    model, x = Derivatives().double().requires_grad_(False), torch.randn(4, 3, dtype=F64)
    before = torch.export.export(make_fx(lambda x: model(x))(x), (x,))
    assert {ops.kaf, ops.kaf_backward} <= set(kafops_nodes(before))
    after = before.run_decompositions(kafops.decompositions())
    assert not kafops_nodes(after)
    for got, want in zip(after.module()(x), model(x), strict=True):
        torch.testing.assert_close(got, want)


def test_second_derivatives_in_one_operator_are_decomposed_too():
    draw = torch.Generator().manual_seed(0)
    x, grad, v_x = torch.randn(3, 5, C, dtype=F64, generator=draw)
    alpha, v_alpha = torch.randn(2, C, 6, dtype=F64, generator=draw)
    arguments = (v_x, v_alpha, None, None, grad, x, alpha, torch.ones(C, dtype=F64), None, 3.0, 23, 3)
    table = kafops.decompositions()
    graph = make_fx(lambda *t: ops.kaf_double_backward(*t, *arguments[2:]), decomposition_table=table)(*arguments[:2])
    assert not [n for n in graph.graph.nodes if "kafops" in str(n.target)]
    for got, want in zip(graph(*arguments[:2]), ops.kaf_double_backward(*arguments), strict=True):
        torch.testing.assert_close(got, want)


def test_nothing_else_is_told_of_them(monkeypatch):
    """Where the environment has CI, Inductor refuses operators of others that have a registered decomposition."""
    assert not set(torch._decomp.decomposition_table) & set(kafops.decompositions())
    monkeypatch.setenv("CI", "true")
    layer, x = kafops.KAF(C), inputs(3)
    torch.testing.assert_close(torch.compile(layer)(x), layer(x), equal_nan=True)
