import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import kafops
from kafops.convert import DEFAULT_TARGETS

relu_kaf = partial(kafops.KAF, init="relu")
exact_relu = partial(nn.PReLU, init=0.0)  # the very function of nn.ReLU, with a parameter per channel


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.SiLU(), nn.Linear(8, 3))


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


def vgg11_bn() -> nn.Module:
    """The features at full width, and the classifier's layers at a width that does not fill the memory."""
    model = torchvision.models.vgg11_bn(num_classes=10, init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(
        nn.Linear(512, 40), nn.ReLU(True), nn.Dropout(), nn.Linear(40, 24), nn.ReLU(True), nn.Linear(24, 10)
    )
    return model


def mobilenet_v3_small() -> nn.Module:
    return torchvision.models.mobilenet_v3_small(num_classes=10)


RESNET18_SITES = [("relu", 64, 4, 1)] + [
    (f"layer{i + 1}.{block}.relu", 64 * 2**i, 4, 2) for i in range(4) for block in range(2)
]
VGG11_SITES = [
    (f"features.{i}", c, 4, 1)
    for i, c in ((2, 64), (6, 128), (10, 256), (13, 256), (17, 512), (20, 512), (24, 512), (27, 512))
] + [("classifier.1", 40, 2, 1), ("classifier.4", 24, 2, 1)]
MLP_SITES = [("1", 10, 2, 1), ("3", 8, 2, 1)]


def mobilenet_sites() -> list[tuple[str, int, int, int]]:
    """From the paper's table: (expanded width, squeezed width or 0), expansion absent in the first block."""
    blocks = [(16, 8), (72, 0), (88, 0), (96, 24), (240, 64), (240, 64), (120, 32), (144, 40)]
    blocks += [(288, 72), (576, 144), (576, 144)]
    sites = [("features.0.2", 16, 4, 1)]
    for i, (width, squeezed) in enumerate(blocks, start=1):
        convolutions = ["0"] if i == 1 else ["0", "1"]
        sites += [(f"features.{i}.block.{j}.2", width, 4, 1) for j in convolutions]
        if squeezed:
            sites.append((f"features.{i}.block.{len(convolutions)}.activation", squeezed, 4, 1))
    return [*sites, ("features.12.2", 576, 4, 1), ("classifier.1", 1024, 2, 1)]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[tuple[str, int, int, int]]]] = {
    "resnet18": (resnet18, (2, 3, 64, 64), RESNET18_SITES),
    "vgg11_bn": (vgg11_bn, (2, 3, 32, 32), VGG11_SITES),
    "mobilenet_v3_small": (mobilenet_v3_small, (2, 3, 64, 64), mobilenet_sites()),
    "mlp": (mlp, (5, 6), MLP_SITES),
}


def sites(report: kafops.ReplacementReport) -> list[tuple[str, int, int, int]]:
    return [(r.names[0], r.channels, r.rank, r.uses) for r in report]


def state(model: nn.Module) -> dict[str, Any]:
    """Everything by which a model can be told from what it was: objects, values, flags, hooks, attributes."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "modules": {n: id(m) for n, m in modules.items()},
        "tensors": {k: (id(t), t._version) for k, t in model.state_dict(keep_vars=True).items() if torch.is_tensor(t)},
        "values": {k: t.clone() for k, t in model.state_dict().items() if torch.is_tensor(t)},
        "attributes": {
            n: {k: len(v) if isinstance(v, (dict, list)) else v for k, v in vars(m).items()} for n, m in modules.items()
        },
        "random": (torch.get_rng_state(), random.getstate()),
    }


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert {k: v for k, v in a.items() if k not in ("values", "random")} == {
        k: v for k, v in b.items() if k not in ("values", "random")
    }
    torch.testing.assert_close(a["values"], b["values"], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(a["random"][0], b["random"][0])
    assert a["random"][1] == b["random"][1]


def assert_refused(
    model: nn.Module, factory: Any, message: str, error: type[Exception] = ValueError, **options: Any
) -> None:
    before = state(model)
    with pytest.raises(error, match=message):
        kafops.replace_activations(model, factory, **options)
    after = state(model)
    if factory is not nn.PReLU:  # other factories draw random numbers before they turn out not to fit
        after["random"] = before["random"]
    assert_same_state(before, after)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("with_example", [False, True], ids=["by_graph", "by_example"])
def test_finds_every_site_with_its_width_rank_and_uses(name: str, with_example: bool) -> None:
    build, shape, expected = MODELS[name]
    with torch.device("meta"):
        model = build()
    example = torch.empty(shape, device="meta") if with_example else None
    report = kafops.replace_activations(model, kafops.KAF, example_input=example)
    assert sites(report) == expected
    assert not [m for m in model.modules() if type(m) in DEFAULT_TARGETS]
    for r in report:
        assert r.new is model.get_submodule(r.names[0])
        assert isinstance(r.new, kafops.KAF)
        assert r.new.alpha.shape == (r.channels, 20)
        assert r.new.alpha.device.type == "meta"
        assert r.new.alpha.dtype == torch.float32


@pytest.mark.parametrize("example", [None, torch.empty(1, 3, 224, 224, device="meta")], ids=["by_graph", "by_example"])
def test_finds_the_sites_of_vgg11_bn_as_torchvision_builds_it(example: Tensor | None) -> None:
    with torch.device("meta"):
        model = torchvision.models.vgg11_bn()
    report = kafops.replace_activations(model, kafops.KAF, example_input=example)
    assert sites(report) == [*VGG11_SITES[:-2], ("classifier.1", 4096, 2, 1), ("classifier.4", 4096, 2, 1)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("with_example", [False, True], ids=["by_graph", "by_example"])
def test_touches_nothing_but_the_sites(name: str, with_example: bool) -> None:
    build, shape, expected = MODELS[name]
    model = build()
    model.train()
    next(m for m in model.modules() if type(m) in DEFAULT_TARGETS).eval()
    replaced = {s[0] for s in expected}
    before = state(model)
    modes = {n: m.training for n, m in model.named_modules()}
    example = torch.randn(shape) if with_example else None
    original = None if example is None else example.clone()
    before["random"] = (torch.get_rng_state(), random.getstate())
    kafops.replace_activations(model, nn.PReLU, example_input=example)
    after = state(model)
    for key in ("modules", "attributes"):
        before[key] = {n: v for n, v in before[key].items() if n not in replaced}
        after[key] = {n: v for n, v in after[key].items() if n not in replaced}
    for key in ("tensors", "values"):
        after[key] = {k: v for k, v in after[key].items() if k.rpartition(".")[0] not in replaced}
    assert_same_state(before, after)
    assert {n: m.training for n, m in model.named_modules()} == modes
    if example is not None:
        assert torch.equal(example, original)


@pytest.mark.parametrize("name", MODELS)
def test_an_equal_function_gives_equal_outputs(name: str) -> None:
    build, shape, _ = MODELS[name]
    model, x = build().eval(), torch.randn(shape)
    with torch.no_grad():
        expected = model(x)
        kafops.replace_activations(model, exact_relu, targets=nn.ReLU)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_trains_after_the_swap(name: str) -> None:
    build, shape, _ = MODELS[name]
    torch.manual_seed(0)
    model = build()
    report = kafops.replace_activations(model, relu_kaf, example_input=torch.randn(shape))
    out = model.train()(torch.randn(shape))
    assert out.shape == (shape[0], 3 if name == "mlp" else 10)
    assert out.isfinite().all()
    out.square().sum().backward()
    for r in report:
        assert r.new.alpha.grad is not None, r.names
        assert r.new.alpha.grad.isfinite().all(), r.names
        assert r.new.alpha.grad.abs().sum() > 0, r.names


@pytest.mark.parametrize(("init", "old"), [("relu", nn.ReLU), ("silu", nn.SiLU)])
def test_outputs_move_by_no_more_than_the_error_of_the_fit(init: str, old: type[nn.Module]) -> None:
    """With h in the range of the dictionary, |out' - out| ≤ Σ|W2| max|fit(h) - act(h)|, plus rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), old(), nn.Linear(64, 4))
    x = torch.randn(256, 16)
    with torch.no_grad():
        x *= 2.5 / model[0](x).abs().max()
        assert model[0](x).abs().max() < 2.7
        expected = model(x)
        grid = torch.linspace(-2.7, 2.7, 5401)
        fit_error = (kafops.KAF(1, init=init)(grid) - old()(grid)).abs().max()
        bound = model[2].weight.abs().sum(1).max() * fit_error + 1e-5
        assert bound < (expected - model[2].bias).abs().max() / 2  # a wrong curve would not pass
        kafops.replace_activations(model, partial(kafops.KAF, init=init))
        assert (model(x) - expected).abs().max() <= bound


def test_report_is_a_table() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.SiLU(), nn.Sigmoid())
    report = kafops.replace_activations(model, kafops.KAF)
    assert str(report).splitlines() == [
        "site  old → new   channels  rank  uses",
        "1     ReLU → KAF         8     2     1",
        "3     SiLU → KAF        16     2     1",
        "activation modules replaced: 2",
        "left as they were: 1 Sigmoid",
    ]
    assert report.left == [("4", "Sigmoid")]
    assert repr(report) == str(report)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        return self.relu(x + self.conv2(x))


def test_one_object_used_twice_becomes_one_new_object() -> None:
    model = Residual()
    (r,) = kafops.replace_activations(model, kafops.KAF2d)
    assert (r.names, r.channels, r.rank, r.uses) == (("relu",), 8, 4, 2)
    assert "uses > 1" in str(kafops.replace_activations(Residual(), kafops.KAF2d))


@pytest.mark.parametrize("with_example", [False, True], ids=["by_graph", "by_example"])
def test_one_object_under_two_names_stays_one_object(with_example: bool) -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 5), relu, nn.Sequential(nn.Linear(5, 5), relu))
    report = kafops.replace_activations(model, kafops.KAF, example_input=torch.randn(2, 3) if with_example else None)
    assert [(r.names, r.uses) for r in report] == [(("1", "2.1"), 2)]
    assert model[1] is model[2][1]


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv1d(2, 4, 3), nn.Conv1d(4, 6, 3)])
        self.acts = nn.ModuleList([nn.GELU(), nn.ELU()])
        self.heads = nn.ModuleDict({"a": nn.Sequential(nn.Flatten(), nn.Linear(24, 7), nn.BatchNorm1d(7), nn.Mish())})

    def forward(self, x: Tensor) -> Tensor:
        for layer, act in zip(self.layers, self.acts, strict=True):
            x = act(layer(x))
        return self.heads["a"](x)


@pytest.mark.parametrize("with_example", [False, True], ids=["by_graph", "by_example"])
def test_containers_and_rank_aware_factory(with_example: bool) -> None:
    by_rank = {2: kafops.KAF1d, 3: kafops.KAF1d, 4: kafops.KAF2d}
    example = torch.randn(2, 2, 8) if with_example else None
    model = Containers()
    report = kafops.replace_activations(model, lambda c, rank: by_rank[rank](c), example_input=example)
    assert sites(report) == [("acts.0", 4, 3, 1), ("acts.1", 6, 3, 1), ("heads.a.3", 7, 2, 1)]
    assert model(torch.randn(2, 2, 8)).shape == (2, 7)


def test_lazy_factory_takes_its_size_from_the_site() -> None:
    model = Residual()
    kafops.replace_activations(model, lambda channels: kafops.LazyKAF2d())
    assert type(model.relu) is kafops.KAF2d
    assert model.relu.num_parameters == 8
    assert model(torch.randn(1, 3, 6, 6)).shape == (1, 8, 6, 6)


class ReLUWithCounter(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


def test_targets_are_matched_exactly() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU6(), nn.Linear(4, 5), ReLUWithCounter(), nn.Linear(5, 6), nn.ReLU())
    report = kafops.replace_activations(
        model, kafops.KAF, targets=(nn.ReLU, nn.Hardtanh), example_input=torch.ones(1, 3)
    )
    assert sites(report) == [("5", 6, 2, 1)]
    assert report.left == [("1", "ReLU6"), ("3", "ReLUWithCounter")]
    report = kafops.replace_activations(model, kafops.KAF, targets=[ReLUWithCounter, nn.ReLU6])
    assert sites(report) == [("1", 4, 2, 1), ("3", 5, 2, 1)]


class Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.gate(x))


def test_a_target_of_your_own_may_be_made_of_activations() -> None:
    for example in (None, torch.randn(2, 3)):
        model = nn.Sequential(nn.Linear(3, 4), Swish())
        targets = (Swish, nn.SiLU, nn.ReLU)
        report = kafops.replace_activations(model, kafops.KAF, targets=targets, example_input=example)
        assert sites(report) == [("1", 4, 2, 1)]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 1), nn.ReLU()

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return self.act(self.conv(x if shift is None else x + shift))


@pytest.mark.parametrize(
    "example",
    [
        None,
        torch.randn(1, 3, 4, 4),
        (torch.randn(1, 3, 4, 4), torch.randn(3, 1, 1)),
        {"x": torch.randn(1, 3, 4, 4), "shift": torch.randn(3, 1, 1)},
    ],
    ids=["none", "tensor", "tuple", "mapping"],
)
def test_forms_of_example_input(example: Any) -> None:
    assert sites(kafops.replace_activations(TwoInputs(), kafops.KAF2d, example_input=example)) == [("act", 4, 4, 1)]


class Meddler(nn.Module):
    """A forward that changes all it can reach."""

    def __init__(self, fail: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", None, persistent=False)
        self.count, self.history, self.fail = 0, [], fail

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        self.calls += 1
        self.cache = torch.ones(1)
        self.count += 1
        self.history.append(self.count)
        self.added = nn.Linear(1, 1)
        self.train()
        random.random()
        if self.fail:
            raise RuntimeError("meddled enough")
        return self.act(F.dropout(self.norm(self.conv(x))))


@pytest.mark.parametrize("fail", [False, True])
def test_the_look_changes_nothing(fail: bool) -> None:
    model = Meddler(fail).eval()
    example, before = torch.ones(2, 3, 5, 5), state(model)
    before["random"] = (torch.get_rng_state(), random.getstate())
    if fail:
        with pytest.raises(RuntimeError, match="meddled enough"):
            kafops.replace_activations(model, nn.PReLU, example_input=example)
        assert_same_state(before, state(model))
    else:
        kafops.replace_activations(model, nn.PReLU, targets=nn.ReLU, example_input=example)
        model.act = nn.ReLU(inplace=True).eval()
        after = state(model)
        after["modules"]["act"] = before["modules"]["act"]
        assert_same_state(before, after)
    assert torch.equal(example, torch.ones(2, 3, 5, 5))


def test_half_precision_models_get_float32_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).bfloat16()
    for r in kafops.replace_activations(model, kafops.KAF, example_input=torch.ones(1, 3, dtype=torch.bfloat16)):
        assert r.new.alpha.dtype == torch.float32
    assert model(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_dict_goes_to_a_model_converted_alike() -> None:
    first, second = Residual(), Residual()
    for m in (first, second):
        kafops.replace_activations(m, kafops.KAF2d)
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 3, 6, 6)
    assert torch.equal(first(x), second(x))


class Functional(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.body(x))


CALLS: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (lambda x: F.relu(x), "relu"),
    (lambda x: F.relu(x, inplace=True), "relu"),
    (lambda x: torch.relu(x), "relu"),
    (lambda x: torch.relu_(x), "relu"),
    (lambda x: x.relu(), "relu"),
    (lambda x: x.relu_(), "relu"),
    (lambda x: F.relu6(x), "relu6"),
    (lambda x: F.leaky_relu(x, 0.1), "leaky_relu"),
    (lambda x: F.leaky_relu(input=x, negative_slope=0.2, inplace=True), "leaky_relu"),
    (lambda x: F.leaky_relu_(x, 0.3), "leaky_relu"),
    (lambda x: F.elu(x, 2.0), "elu"),
    (lambda x: F.celu(x, alpha=0.5), "celu"),
    (lambda x: F.selu(x), "selu"),
    (lambda x: F.gelu(x), "gelu"),
    (lambda x: F.gelu(x, approximate="tanh"), "gelu"),
    (lambda x: F.silu(x), "silu"),
    (lambda x: F.mish(x), "mish"),
    (lambda x: F.hardswish(x), "hardswish"),
]


@pytest.mark.parametrize("with_example", [False, True], ids=["by_graph", "by_example"])
@pytest.mark.parametrize(("call", "name"), CALLS)
def test_functional_calls_become_children(call: Callable[[Tensor], Tensor], name: str, with_example: bool) -> None:
    model, x = nn.Sequential(Functional(call)), 4 * torch.randn(9, 3)
    before = model(x)
    keys = list(model.state_dict())
    report = kafops.replace_activations(model, kafops.KAF, example_input=x if with_example else None, base="same")
    assert sites(report) == [("0.body.1", 4, 2, 1), (f"0.{name}", 4, 2, 1)]
    assert report[1].new is model.get_submodule(f"0.{name}")
    assert isinstance(model[0], Functional)
    assert [k for k in model.state_dict() if k in keys] == keys
    torch.testing.assert_close(model(x), before)  # as kafops.KAF(base="same") is: to the rounding of a base


def test_functional_calls_that_are_not_targeted_are_no_obstacle() -> None:
    for example in (None, torch.ones(2, 3)):
        model = nn.Sequential(Functional(F.gelu))
        report = kafops.replace_activations(model, kafops.KAF, targets=nn.ReLU, example_input=example)
        assert sites(report) == [("0.body.1", 4, 2, 1)]


def test_refuses_functional_calls_in_compiled_functions() -> None:
    model = Functional(torch.compile(lambda x: F.relu(x), backend="eager"))
    assert_refused(model, nn.PReLU, r"relu\(\) in the model itself", example_input=torch.ones(2, 3))


def test_refuses_transformer_encoder_layers() -> None:
    body = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(body, nn.Flatten(), nn.ReLU())
    assert_refused(model, nn.PReLU, r"relu\(\) in 0 \(transformer.py", example_input=torch.ones(1, 2, 8))
    assert_refused(model, nn.PReLU, "pass example_input")
    body.activation = nn.ReLU()
    assert_refused(model, nn.PReLU, "0.activation belongs to an nn.TransformerEncoderLayer")


class DifferentWidths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        return self.relu(self.conv2(x))


@pytest.mark.parametrize("example", [None, torch.randn(1, 3, 4, 4)], ids=["by_graph", "by_example"])
def test_one_object_at_different_widths_becomes_one_for_each_call(example: Tensor | None) -> None:
    model = nn.Sequential(DifferentWidths())
    report = kafops.replace_activations(model, kafops.KAF, example_input=example)
    assert sites(report) == [("0.relu", 4, 4, 1), ("0.relu_2", 6, 4, 1)]
    assert [r.new for r in report] == [model[0].relu, model[0].relu_2]


@pytest.mark.parametrize("example", [None, torch.randn(1, 3)], ids=["by_graph", "by_example"])
def test_refuses_sites_that_are_not_reached(example: Tensor | None) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    model[0].spare = nn.ReLU()
    assert_refused(model, nn.PReLU, r"does not call these modules:\n  0.spare\n", example_input=example)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > 0 else x


def test_refuses_what_it_cannot_trace_unless_given_an_example() -> None:
    assert_refused(Branching(), nn.PReLU, r"cannot be read off its code \(TraceError.*pass example_input")
    assert_refused(Branching(), nn.PReLU, "does not call", example_input=-torch.ones(1, 3, 2, 2))
    report = kafops.replace_activations(Branching(), kafops.KAF2d, example_input=torch.ones(1, 3, 2, 2))
    assert sites(report) == [("body.1", 4, 4, 1)]


class Flat(nn.Module):
    """All dimensions in one, the batch among them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(x)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.ReLU()],
        [nn.BatchNorm1d(4), nn.ReLU()],
        [nn.AvgPool2d(2), nn.Linear(4, 4), nn.ReLU()],
        [nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU()],
        [nn.Conv2d(3, 4, 1), nn.PixelShuffle(2), nn.ReLU()],
        [nn.Conv2d(3, 4, 1), nn.Flatten(), nn.ReLU()],
        [nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.ReLU()],
        [nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.ReLU()],
        [nn.Conv2d(3, 4, 1), nn.Flatten(0), nn.Linear(4, 4), nn.ReLU()],
        [nn.Conv2d(3, 4, 1), Flat(), nn.Linear(4, 4), nn.ReLU()],
    ],
    ids=lambda layers: "-".join(type(m).__name__ for m in layers),
)
def test_refuses_to_guess_widths(layers: list[nn.Module]) -> None:
    assert_refused(nn.Sequential(*layers), nn.PReLU, r"cannot be told without running(.|\n)*pass example_input")


class Permuted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 1), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.dropout(self.conv(x).permute(0, 2, 3, 1)))


@pytest.mark.parametrize(
    ("model", "example", "channels", "rank", "channel_dim"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.ReLU()), torch.ones(2, 5, 3), 4, 3, -1),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.ones(2, 5, 5, 3), 4, 4, -1),
        (nn.Sequential(nn.LayerNorm(3), nn.ReLU()), torch.ones(2, 5, 3), 3, 3, -1),
        (nn.Sequential(nn.Embedding(3, 4), nn.ReLU()), torch.ones(2, 5, dtype=torch.int64), 4, 3, -1),
        (Permuted(), torch.ones(2, 3, 5, 6), 4, 4, -1),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), torch.ones(3, 5, 6), 4, 3, -3),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.ones(3), 4, 1, -1),
        (nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (5, 6)), nn.ReLU()), torch.ones(2, 30, 3), 4, 4, -1),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.ReLU()), torch.ones(2, 3, 5, 6), 4, 3, 1),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.ReLU()), torch.ones(2, 3, 5, 6), 120, 2, 1),
        (nn.Sequential(nn.ReLU()), torch.ones(2, 3, 5, 6), 3, 4, 1),
    ],
)
def test_channels_are_where_the_layer_before_has_them(
    model: nn.Module, example: Tensor, channels: int, rank: int, channel_dim: int
) -> None:
    torch.manual_seed(0)  # of dropout
    expected = model(example)
    (r,) = kafops.replace_activations(model, kafops.KAF, example_input=example, base="same")
    assert (r.channels, r.rank, r.channel_dim) == (channels, rank, channel_dim)
    assert r.new.alpha.shape == (channels, 20)
    torch.manual_seed(0)
    torch.testing.assert_close(model(example), expected)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.act = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x).transpose(1, 2))


def test_follows_channels_that_move_to_dimension_1() -> None:
    report = kafops.replace_activations(Tokens(), kafops.KAF1d, example_input=torch.ones(2, 5, 3))
    assert sites(report) == [("act", 4, 3, 1)]


def test_a_norm_over_several_dimensions_does_not_tell_which_has_the_channels() -> None:
    model = nn.Sequential(nn.LayerNorm([4, 5]), nn.ReLU())
    x = torch.ones(2, 4, 5)
    assert_refused(model, kafops.KAF, "not known which dimension holds the channels", example_input=x)
    for dims, rank in (([3, 5, 6], 4), ([5, 6], 4), ([6], 4)):  # images have them in dimension 1, whatever norm comes
        model = nn.Sequential(nn.LayerNorm(dims), nn.ReLU())
        report = kafops.replace_activations(model, kafops.KAF, example_input=torch.ones(2, 3, 5, 6))
        assert sites(report) == [("1", 3, rank, 1)]


def test_trying_a_factory_out_leaves_no_trace() -> None:
    """What it makes is called once or twice, by which a norm counts batches and a dropout draws."""

    class Counting(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.norm, self.dropout = nn.BatchNorm1d(channels), nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(self.norm(x + 1).relu())

    for example in (None, torch.randn(4, 6)):
        model, before = mlp(), torch.get_rng_state()
        kafops.replace_activations(model, Counting, example_input=example)
        assert torch.equal(torch.get_rng_state(), before)
        for name in ("1", "3"):
            norm = model.get_submodule(name).norm
            assert norm.num_batches_tracked == norm.running_mean.abs().max() == 0


def test_refuses_a_factory_that_does_not_fit() -> None:
    message = (
        r"KAF2d that fails at 1, .* 2-dimensional input of 10 channels: KAF2d wants(.|\n)*kafops.KAF takes any rank"
    )
    assert_refused(mlp(), kafops.KAF2d, message)
    assert_refused(mlp(), lambda c: kafops.KAF(c + 1), r"KAF that fails at 1, .* 10 channels")
    assert_refused(mlp(), lambda c: nn.Linear(c, 3), r"Linear that turns shape \[2, 10\] into \[2, 3\] at 1")
    assert_refused(mlp(), lambda c: F.relu, r"factory\(10\) must return an nn.Module, got function", TypeError)
    assert_refused(mlp(), nn.PReLU(), r"factory must be a callable that makes .* got a PReLU module", TypeError)
    assert_refused(mlp(), "relu", "factory must be callable, got str", TypeError)


def test_refuses_when_the_factory_fails_late() -> None:
    assert_refused(mlp(), lambda c: {10: nn.PReLU(10)}[c], "8", KeyError)


def test_refuses_models_without_anything_to_replace() -> None:
    assert_refused(
        nn.Sequential(nn.Linear(1, 1), nn.Tanh()),
        nn.PReLU,
        r"no module .* targets(.|\n)*: ReLU, ReLU6, LeakyReLU(.|\n)*; it has 1 torch.nn.modules.activation.Tanh",
    )
    assert_refused(mlp(), nn.PReLU, "calls none of their functions: Tanh; it has 1 torch", targets=nn.Tanh)
    assert_refused(nn.ReLU(), nn.PReLU, "model is itself a ReLU")
    assert_refused(mlp(), nn.PReLU, "targets must be module classes", TypeError, targets=(nn.ReLU(),))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        kafops.replace_activations(F.relu, nn.PReLU)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")  # deprecated, though models in the wild still use it
def test_refuses_models_that_are_already_compiled_wrapped_or_lazy() -> None:
    compiled = mlp()
    compiled.compile(backend="eager")
    assert_refused(compiled, nn.PReLU, "model has class Sequential: .* before torch.compile, not after")
    assert_refused(torch.compile(mlp(), backend="eager"), nn.PReLU, "OptimizedModule: .* before torch.compile")
    assert_refused(nn.Sequential(torch.compile(mlp(), backend="eager")), nn.PReLU, "0 has class OptimizedModule")
    assert_refused(torch.jit.trace(mlp(), torch.ones(1, 6)), nn.PReLU, "before torch.jit.script")
    assert_refused(nn.DataParallel(mlp()), nn.PReLU, "before wrapping in DataParallel")
    lazy = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
    with pytest.raises(ValueError, match="0 is a LazyLinear whose size is not known yet; run the model once"):
        kafops.replace_activations(lazy, nn.PReLU)
    lazy(torch.ones(1, 3))
    assert sites(kafops.replace_activations(lazy, nn.PReLU)) == [("1", 4, 2, 1)]


class _Broadcast(nn.Module):
    """An activation behind a sum of [N, C] and [N, C, H, W], which is no sum of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.conv, self.act = nn.Linear(3, 8), nn.Conv2d(3, 8, 1), nn.ReLU()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.act(self.gate(y) + self.conv(x))


def test_sums_of_different_ranks_are_not_told_without_running() -> None:
    assert_refused(_Broadcast(), relu_kaf, "cannot be told without running(.|\n)*pass example_input")


class _Sum(nn.Module):
    """An activation behind a sum or product of two convolutions, written with keywords."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor], left: int, right: int) -> None:
        super().__init__()
        self.left, self.right, self.act = nn.Conv2d(3, left, 1), nn.Conv2d(3, right, 1), nn.ReLU()
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.combine(self.left(x), self.right(x)))


KEYWORDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch.mul(a, other=b)": lambda a, b: torch.mul(a, other=b),
    "a.mul(other=b)": lambda a, b: a.mul(other=b),
    "torch.add(input=a, other=b)": lambda a, b: torch.add(input=a, other=b),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_operands_given_by_keyword(name: str) -> None:
    (site,) = kafops.replace_activations(_Sum(KEYWORDS[name], 8, 8), relu_kaf)
    assert site.channels == 8
    # One of the operands is broadcast, so that the graph does not tell the width.
    assert_refused(_Sum(KEYWORDS[name], 1, 8), relu_kaf, "example_input")
    (site,) = kafops.replace_activations(_Sum(KEYWORDS[name], 1, 8), relu_kaf, example_input=torch.randn(1, 3, 4, 4))
    assert site.channels == 8


def test_what_moved_is_told_of_outputs_that_are_not_finite():
    nan, inf = torch.nan, torch.inf

    def moved(*pair):
        return kafops.replacements.Moved.between(*([torch.zeros(1), torch.tensor(values)] for values in pair))

    assert moved([-inf, 2.0, nan], [-inf, 2.5, nan]) == (0.5, 2.0)
    assert moved([1.0, 2.0], [1.0, inf]) == (inf, 2.0)
    for before, after in (([1.0, 2.0], [1.0, nan]), ([nan, 2.0], [1.0, 2.0])):
        by, of = moved(before, after)
        assert by != by
        assert of == 2
