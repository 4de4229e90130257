"""Layers traced, scripted, faked, and built in half precision; docs/distributed.md in two gloo processes."""

import copy
import io
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forms import assert_equal_to_rounding
from processes import group
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import kafops

F64 = torch.float64
PAGE = Path(__file__).parents[2] / "docs/distributed.md"
LEARNED = {"learn_gamma": True, "learn_dictionary": True}
LAYERS = {
    "even": lambda: kafops.KAF2d(6),
    "learned": lambda: kafops.KAF2d(6, **LEARNED),
    "one curve": lambda: kafops.KAF(1),
    "last dimension": lambda: kafops.KAF(5, channel_dim=-1, base="gelu"),
    "matern32": lambda: kafops.KAF(6, kernel="matern32"),
    "Hardswish kept": lambda: kafops.KAF(6, base="same", old=nn.Hardswish()),
    "mish kept": lambda: kafops.KAF(6, base="same", old=F.mish),
}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def make_net(make):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 2), make(), nn.Dropout(0.0)).double()


def values_and_gradients(net, x):
    y = net(x)
    return y, *torch.autograd.grad(y.sin().sum(), list(net.parameters()))


# ------------------------------------------------------------------------------------------------------------ torch.fx


@layers
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_curve_is_one_function_call(make, training):
    net, x = make_net(make).train(training), torch.randn(2, 3, 6, 6, dtype=F64)
    traced = torch.fx.symbolic_trace(net)
    functions = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert len([f for f in functions if f in (kafops.kaf, kafops.kaf_free)]) == 1
    assert len(functions) == (1 if net[1].old is None else 3)  # the old one, and the sum
    want = values_and_gradients(net, x)
    for other in (traced, pickle.loads(pickle.dumps(traced)), copy.deepcopy(traced), torch.fx.symbolic_trace(traced)):
        assert {n: p.shape for n, p in other.named_parameters()} == {n: p.shape for n, p in net.named_parameters()}
        got = dict(zip(("", *(n for n, _ in other.named_parameters())), values_and_gradients(other, x), strict=True))
        assert_equal_to_rounding([got[n] for n in ("", *(n for n, _ in net.named_parameters()))], list(want))


def test_functions_are_traced_with_any_argument_a_proxy():
    x, alpha, gamma, points = torch.randn(4, 3), torch.randn(3, 5), torch.ones(3), torch.randn(3, 5)
    for f, tensors in (
        (lambda x, a, g: kafops.kaf(x, a, g, 2.0, channel_dim=-1), (x, alpha, gamma)),
        (lambda x, a, g, d: kafops.kaf_free(x, a, g, d, "matern32", "relu"), (x, alpha, gamma, points)),
        (lambda a: kafops.kaf(x, a, gamma), (alpha,)),
    ):
        traced = torch.fx.symbolic_trace(f)
        assert [n.op for n in traced.graph.nodes].count("call_function") == 1
        assert torch.equal(traced(*tensors), f(*tensors))


def test_a_lazy_layer_is_called_before_it_is_traced():
    with pytest.raises(RuntimeError, match="LazyKAF2d has no curves before its first call; call it once, then trace"):
        torch.fx.symbolic_trace(nn.Sequential(kafops.LazyKAF2d()))


@pytest.mark.parametrize("same", [False, True], ids=["KAF2d", "base=same"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_feature_extractors(name, same):
    torchvision = pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor

    x = torch.randn(2, 3, 64, 64)
    model, options = getattr(torchvision.models, name)(), {"base": "same"} if same else {}
    kafops.replace_activations(model.eval(), kafops.KAF, example_input=x, **options)
    node = "layer1" if name == "resnet18" else "features.3"
    want = []
    model.get_submodule(node).register_forward_hook(lambda module, inputs, y: want.append(y))
    model(x)
    (got,) = create_feature_extractor(model, [node])(x).values()
    torch.testing.assert_close(got, want[0])


def test_feature_extractors_of_timm():
    timm = pytest.importorskip("timm")
    from timm.models import FeatureGraphNet, create_feature_extractor

    x = torch.randn(2, 3, 64, 64)
    model = timm.create_model("resnet18").eval()
    kafops.replace_activations(model, kafops.KAF2d, example_input=x)
    want = [model.forward_features(x)]
    model.fc = nn.Identity()
    got = create_feature_extractor(model, ["layer1", "layer4"])(x)
    torch.testing.assert_close(got["layer4"], want[0])
    torch.testing.assert_close(FeatureGraphNet(model, (1, 4))(x), list(got.values()))
    lists = timm.create_model("resnet18", features_only=True).eval()
    kafops.replace_activations(lists, kafops.KAF2d, example_input=x)
    assert [y.shape[1] for y in lists(x)] == [64, 64, 128, 256, 512]


# --------------------------------------------------------------------------------------------------------- TorchScript


@pytest.mark.parametrize("make", [lambda: kafops.KAF2d(6), lambda: nn.Sequential(kafops.LazyKAF2d())])
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_script_says_what_to_do(make):
    with pytest.raises(RuntimeError, match=r"cannot compile (Lazy)?KAF2d, .* torch\.jit\.trace.* torch\.export"):
        torch.jit.script(make())


@layers
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of shapes that are checked
def test_trace(make):
    net, x = make_net(make).eval(), torch.randn(2, 3, 6, 6, dtype=F64)
    traced = torch.jit.trace(net, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert torch.equal(loaded(x[:1]), net(x[:1]))


# --------------------------------------------------------------------------------------------------------- fake tensors

FAKED = {
    **{f"init {i}": lambda i=i: kafops.KAF2d(6, init=i) for i in ("normal", "isometric", "elu", "zeros")},
    "init torch.sin": lambda: kafops.KAF2d(6, init=torch.sin),
    "one curve": lambda: kafops.KAF2d(1),
    "gamma": lambda: kafops.KAF2d(6, gamma=torch.ones(6)),
    "gamma, one": lambda: kafops.KAF2d(6, gamma=torch.ones(1)),
    "learned": lambda: kafops.KAF2d(6, **LEARNED),
    "lazy": kafops.LazyKAF2d,
    "lazy, learned": lambda: kafops.LazyKAF2d(init="isometric", **LEARNED),
    "base": lambda: kafops.KAF2d(6, base="silu", dtype=torch.bfloat16),
    "kernel": lambda: kafops.KAF2d(6, kernel="bspline"),
    "kept": lambda: kafops.KAF2d(6, base="same", old=nn.Mish),
    "fitted": lambda: kafops.KAF2d(6, base="same", old=nn.Mish, fit=True),
}


@pytest.mark.parametrize("make", FAKED.values(), ids=FAKED)
def test_fake_layers(make):
    state = torch.get_rng_state()
    with FakeTensorMode():
        layer = make()
        x = torch.empty(2, 6, 4, 4, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        layer.reset_parameters()
        layer.load_state_dict(layer.state_dict())
        repr(layer)
    assert y.shape == x.grad.shape == x.shape
    for p in layer.parameters():
        assert isinstance(p, FakeTensor)
        assert p.grad.shape == p.shape
    assert {type(t) for t in layer.buffers()} == {FakeTensor}
    assert torch.equal(torch.get_rng_state(), state)
    kafops.KAF2d(6, base="same", old=nn.Mish)(torch.randn(1, 6, 2, 2))  # nothing fake was kept


@pytest.mark.parametrize("base", [None, "silu"])
def test_every_tensor_lies_on_the_layer_s_device(base):
    with FakeTensorMode():
        named = kafops.KAF(6, base=base, device="cuda")
        with torch.device("cuda"):
            by_default = kafops.KAF(6, base=base)
    for layer in named, by_default:
        assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"cuda"}


def test_wrong_arguments_are_told_under_fake_tensors_and_on_meta():
    with FakeTensorMode(), pytest.raises(ValueError, match=r"gamma must be a positive finite number, .* got -1\.0"):
        kafops.KAF(6, gamma=-1.0)
    with torch.device("meta"), pytest.raises(ValueError, match=r"gamma must be .* got one on meta"):
        kafops.KAF(6, gamma=torch.ones(6))


def test_a_real_layer_is_reset_under_a_mode():
    layer = kafops.KAF(3, **LEARNED)
    alpha = layer.alpha.detach().clone()
    layer.alpha.data.zero_()
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer.reset_parameters()
    assert torch.equal(layer.alpha.detach(), alpha)


# ------------------------------------------------------------------------------------------- buffers and half precision


class Mixed(kafops.KAF2d):
    """A layer with what others have: a normalisation, a convolution, integer and boolean buffers."""

    def __init__(self):
        super().__init__(6, **LEARNED)
        self.norm, self.mix = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("keep", torch.ones(6, dtype=torch.bool))

    def forward(self, x):
        return super().forward(self.mix(self.norm(x)))


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16])
def test_what_a_subclass_adds_is_converted_as_in_any_module(dtype):
    layer = nn.Sequential(Mixed())
    layer(torch.randn(2, 6, 3, 3)).sum().backward()
    layer = layer.to(dtype).share_memory().to(memory_format=torch.channels_last)[0]
    assert layer.alpha.dtype == layer.alpha.grad.dtype == (dtype if dtype == F64 else torch.float32)
    assert {p.dtype for p in (*layer.norm.parameters(), *layer.mix.parameters())} == {dtype}
    assert (layer.steps.dtype, layer.keep.dtype) == (torch.int64, torch.bool)
    assert layer.norm.num_batches_tracked.dtype == torch.int64
    assert layer(torch.randn(2, 6, 3, 3).to(dtype)).dtype == dtype
    assert layer.to_empty(device="cpu").keep.dtype == torch.bool


def test_a_parametrized_layer_is_moved_without_a_warning():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("keep", torch.ones(6, 20, dtype=torch.bool))

        def forward(self, alpha):
            return alpha * self.keep

    layer = kafops.KAF2d(6)
    nn.utils.parametrize.register_parametrization(layer, "alpha", Masked())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.cpu().double()
    assert layer.alpha.dtype == F64
    assert layer.parametrizations.alpha[0].keep.dtype == torch.bool


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, LEARNED], ids=["fixed", "learned"])
def test_a_half_state_is_assigned_and_trains(dtype, options):
    torch.manual_seed(0)
    source, layer = (kafops.KAF2d(6, init="normal", **options) for _ in range(2))
    layer.load_state_dict({k: v.to(dtype) for k, v in source.state_dict().items()}, assign=True)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer.curve.dtype == F64
    x = torch.randn(2, 6, 4, 4)
    y = layer(x)
    y.sum().backward()
    tensors = [t.detach().float() for t in (layer.alpha, layer.bandwidths(), layer.points())]
    want = kafops.reference.kaf_free(x, *tensors)
    summed = layer.alpha.detach().float().abs().sum(1).max().item()
    torch.testing.assert_close(y.detach(), want, rtol=0, atol=64 * torch.finfo(torch.float32).eps * summed)
    assert {p.grad.dtype for p in layer.parameters()} == {dtype}


# ------------------------------------------------------------------------------------------- what importing kafops does

_USE = """
import kafops
assert "torch.distributed.tensor" not in sys.modules
{before}
layer = kafops.KAF(4)
layer(torch.randn(2, 4)).sum().backward()
layer.bfloat16()(torch.randn(2, 4))
kafops.KAF(4, dtype=torch.bfloat16)(torch.randn(2, 4))
try:
    layer(torch.randn(2, 5))
except ValueError as error:
    assert "one row per channel" in str(error)
else:
    raise AssertionError
assert not {before!r} or sys.modules["torch.distributed.tensor"] is None
"""


@pytest.mark.parametrize("before", ["", "sys.modules['torch.distributed.tensor'] = None"], ids=["there", "missing"])
def test_distributed_is_not_imported_nor_needed(before):
    program = "import sys, torch\n" + _USE.format(before=before)
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


# ----------------------------------------------------------------------------------------------------- docs/distributed


def examples(section):
    """The blocks of code under a heading of the page."""
    text = PAGE.read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    return "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def worker(rank, directory):
    with group(rank, 2, directory):
        run_page(rank, directory)


def run_page(rank, directory):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    names = {"torch": torch, "nn": nn, "kafops": kafops, "mesh": mesh}
    names |= {f.__name__: f for f in (distribute_module, distribute_tensor, fully_shard, Shard)}

    # FSDP: near the same in one process, and the gradients in float32.
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for options in ({}, LEARNED):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Conv2d(3, 8, 3), kafops.KAF2d(8, init="normal", **options))
        model = copy.deepcopy(plain)
        exec(examples("FSDP"), names | {"model": model, "images": images})
        plain(images).sum().backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert p.dtype == p.grad.dtype == torch.float32
            error = (p.grad.full_tensor() - q.grad).norm() / q.grad.norm()
            assert error < 0.1, error  # some roundings of bfloat16, 4e-3 each, where terms cancel

        for net, of in (
            (copy.deepcopy(plain), {"mixed_precision": MixedPrecision(param_dtype=torch.bfloat16)}),
            (copy.deepcopy(plain).bfloat16(), {"auto_wrap_policy": ModuleWrapPolicy({kafops.KAF2d})}),
        ):
            wrapped = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True, **of)
            y = wrapped(images if "mixed_precision" in of else images.bfloat16())
            y.float().sum().backward()
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y.float(), plain(images), rtol=0.05, atol=0.2)

    # Meta: as an ordinary construction with the first process's seed; processes may have different ones.
    for options in ({}, {"init": "normal"}, {"init": "isometric", **LEARNED}):
        text = examples("From meta").replace("kafops.KAF2d(8)", "kafops.KAF2d(8, **options)")
        torch.manual_seed(rank)
        model = nn.ModuleList()
        names["options"] = options
        exec(text, names)
        layer = names["model"][1]
        torch.manual_seed(7 * (rank + 1))
        layer.reset_parameters()
        torch.manual_seed(7)
        want = kafops.KAF2d(8, **options).state_dict()
        assert isinstance(layer.alpha, DTensor)
        for name, t in layer.state_dict().items():
            assert torch.equal(t.full_tensor() if isinstance(t, DTensor) else t, want[name]), name

    # DTensor
    torch.manual_seed(0)
    exec(examples("DTensor"), names)
    layer, x, y = names["layer"], names["x"], names["y"]
    assert layer.alpha.grad.placements == (Partial(),)
    assert y.placements == (Shard(0),)
    layer.load_state_dict(layer.state_dict())
    plain = kafops.KAF(8)
    plain(x.full_tensor()).sum().backward()
    torch.testing.assert_close(layer.alpha.grad.full_tensor(), plain.alpha.grad)
    (rank == 0) and Path(directory, "done").touch()


def test_the_pages_examples_in_two_processes(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "done").exists()


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_the_pages_example_of_tracing():
    torchvision = pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor

    images = torch.randn(2, 3, 64, 64)
    model = torchvision.models.resnet18().eval()
    kafops.replace_activations(model, kafops.KAF2d, example_input=images)
    names = {"torch": torch, "model": model, "images": images, "create_feature_extractor": create_feature_extractor}
    exec(examples("torch.fx and TorchScript"), names)
    torch.testing.assert_close(names["traced"](images), model(images))
    torch.testing.assert_close(names["scripted"](images), model(images))
    assert names["features"](images)["layer1"].shape == (2, 64, 16, 16)
