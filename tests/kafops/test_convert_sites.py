"""replace_activations at sites that are calls: functions, modules called at several widths, and what is refused."""

import copy
import pickle
import random
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kafops
from kafops.rewriting import ByWidth

same = partial(kafops.replace_activations, factory=kafops.KAF, base="same")


def names(report: kafops.ReplacementReport) -> list[tuple[str, int]]:
    return [(r.names[0], r.channels) for r in report]


class Block(nn.Module):
    """A block of convolutions, with one activation module for all, and a forward of the caller's."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1)
        self.relu = nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        return F.elu(self.relu(self.conv2(x)), 0.5)


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 5, 6)


# ---------------------------------------------------------------------------------------- what a rewritten block keeps


def converted() -> tuple[nn.Module, nn.Module, kafops.ReplacementReport]:
    torch.manual_seed(0)
    before = nn.Sequential(Block(), nn.Flatten())
    after = copy.deepcopy(before)
    return before, after, same(after, example_input=images())


def test_a_rewritten_block_is_the_same_object_with_the_same_children() -> None:
    before, seen = nn.Sequential(Block(), nn.Flatten()), []
    block = before[0]
    before.register_forward_hook(lambda *_: seen.append("outer"))
    block.register_forward_hook(lambda *_: seen.append("block"))
    block.conv2.register_forward_pre_hook(lambda *_: seen.append("child"))
    children, tensors, text = dict(block.named_children()), dict(before.named_parameters()), repr(Block())
    report = same(before, example_input=images())
    assert names(report) == [("0.relu", 4), ("0.relu_2", 6), ("0.elu", 6)]
    assert before[0] is block
    assert isinstance(block, Block)
    assert type(block).__name__ == "Block"
    assert (type(block).__module__, type(block).__qualname__) == (Block.__module__, Block.__qualname__)
    assert [c for n, c in block.named_children() if n in ("conv1", "conv2")] == [children["conv1"], children["conv2"]]
    assert {n: p for n, p in before.named_parameters() if n in tensors} == tensors
    assert repr(block).splitlines()[:3] == text.splitlines()[:3]
    seen.clear()
    before(images())
    assert seen == ["child", "block", "outer"]


def test_it_pickles_copies_and_saves(tmp_path: Any) -> None:
    _, model, _ = converted()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = images()
    torch.save(model, tmp_path / "model.pt")
    others = [copy.deepcopy(model), copy.copy(model), torch.load(tmp_path / "model.pt", weights_only=False)]
    others += [pickle.loads(pickle.dumps(model, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in others:
        assert torch.equal(other(x), model(x))
        assert type(other[0]) is type(model[0])
        assert isinstance(other[0], Block)
    assert others[0][0].relu_2 is not model[0].relu_2
    _, fresh, _ = converted()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    again = pickle.loads(pickle.dumps(others[0]))  # what came out of a pickle goes into one
    assert torch.equal(again(x), model(x))


def test_it_can_be_converted_again() -> None:
    before, model, _ = converted()
    report = same(
        model, targets=(kafops.KAF,), factory=lambda channels: nn.Identity(), base=None, example_input=images()
    )
    assert names(report) == [("0.relu", 4), ("0.relu_2", 6), ("0.elu", 6)]
    other = pickle.loads(pickle.dumps(model))
    x = images()
    expected = before[1](before[0].conv2(before[0].conv1(x)))
    torch.testing.assert_close(other(x), expected)
    assert type(other[0]).__mro__[1] is Block


def test_it_compiles_and_exports() -> None:
    before, model, _ = converted()
    x = images()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), before(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), before(x))


def test_tracebacks_show_the_generated_lines() -> None:
    _, model, _ = converted()
    try:
        model[0](torch.ones(2, 7, 1, 1))
    except RuntimeError as e:
        text = "".join(traceback.format_exception(e))
    assert "conv1 = self.conv1(x)" in text


# ------------------------------------------------------------------------------------------------ which calls are sites


class Moody(nn.Module):
    """Forward differs between training and evaluation, not in its activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = F.dropout(F.gelu(self.first(x)), 0.5, self.training)
        return F.silu(self.second(x)) * scale


def test_both_modes_of_a_forward_are_kept() -> None:
    before = Moody()
    after, x = copy.deepcopy(before), torch.randn(64, 3)
    assert names(same(after, example_input=x)) == [("gelu", 8), ("silu", 8)]
    after = pickle.loads(pickle.dumps(after))
    for training in (True, False, True):
        before.train(training), after.train(training)
        for options in ({}, {"scale": 3.0}):
            torch.manual_seed(1)
            expected = before(x, **options)
            torch.manual_seed(1)
            torch.testing.assert_close(after(x, **options), expected)


class Auxiliary(nn.Module):
    """A head that only training reaches."""

    def __init__(self, features: int = 4) -> None:
        super().__init__()
        self.body, self.act = nn.Linear(3, 4), nn.ReLU()
        self.head = nn.Sequential(nn.Linear(4, features), nn.BatchNorm1d(features), nn.ReLU())

    def forward(self, x: Tensor) -> Any:
        x = self.act(self.body(x))
        return (x, self.head(x)) if self.training else x


def test_what_only_training_reaches_is_found_there() -> None:
    model = Auxiliary(5)
    assert names(same(model, example_input=torch.randn(4, 3))) == [("act", 4), ("head.2", 5)]
    message = (
        r"does not call these modules:\n  head.2\nin training mode it fails: ValueError: Expected more than 1 value"
    )
    with pytest.raises(ValueError, match=message):
        same(Auxiliary(), example_input=torch.randn(1, 3))
    assert names(same(Auxiliary(), example_input=torch.randn(1, 3), skip="head")) == [("act", 4)]


def test_one_object_under_two_names_at_two_widths_becomes_two() -> None:
    for example in (None, torch.randn(2, 3)):
        relu = nn.ReLU()
        model = nn.Sequential(nn.Linear(3, 5), relu, nn.Linear(5, 7), relu, nn.Linear(7, 7), relu)
        report = same(model, example_input=example)
        assert names(report) == [("1", 5), ("3", 7), ("5", 7)]
        assert model[1].num_parameters == 5


class Untraced(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        return self.relu(self.conv2(x)) if x.shape[0] > 0 else x


def test_calls_that_cannot_be_told_apart_share_a_curve_of_their_width() -> None:
    before = Untraced()
    model, x = copy.deepcopy(before), images()
    report = same(model, example_input=x)
    assert names(report) == [("relu.4", 4), ("relu.6", 6)]
    assert "relu: a curve for each width, not for each call" in str(report)
    assert type(model) is Untraced
    assert isinstance(model.relu, ByWidth)
    torch.testing.assert_close(model(x), before(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), before(x))
    with pytest.raises(ValueError, match="x has 5 channels in dimension 1, where there are curves for 4, 6"):
        model.relu(torch.randn(2, 5, 3, 3))


class Activation(nn.Module):
    """Of the caller's own, and used at several widths."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


def test_a_function_that_is_called_at_several_widths_in_one_place() -> None:
    before = Block()
    before.relu = Activation()  # type: ignore[assignment]
    model, x = copy.deepcopy(before), images()
    report = same(model, example_input=x, skip="elu")
    assert names(report) == [("relu.relu.4", 4), ("relu.relu.6", 6)]
    assert type(model.relu.relu) is ByWidth
    for other in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        torch.testing.assert_close(other(x), before(x))


def test_modules_in_lists_keep_their_numbers() -> None:
    class Listed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ModuleList([nn.ReLU()])  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            return self.relu[0](self.conv2(self.relu[0](self.conv1(x))))

    before = Listed()
    model, x = copy.deepcopy(before), images()
    assert names(same(model, example_input=x)) == [("relu.0", 4), ("relu_2", 6)]
    assert len(model.relu) == 1
    torch.testing.assert_close(model(x), before(x))


class UntracedFunction(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv1(x)) if x.shape[0] > 0 else x


class Optional(Block):
    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return F.relu(self.conv1(x if shift is None else x + shift))


class WithoutGradients(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.conv1(x)
        return F.relu(x)


class OtherInTraining(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv1(x)) if self.training else F.elu(self.conv1(x))


class ConstantTensor(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv1(x) + torch.tensor([1.0]))


class Counting(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = 1
        return F.relu(self.conv1(x))


class CountingInAChild(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.conv1.calls = 1  # type: ignore[assignment]
        return F.relu(self.conv1(x))


class Random(Block):
    """Mixes two branches by chance in training, as shake-shake does."""

    def draw(self) -> float:
        return torch.rand(1).item()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return F.relu(x * self.draw() if self.training else x)


class RandomOfPython(Random):
    def draw(self) -> float:
        return random.random()


class RandomOfNumPy(Random):
    def draw(self) -> float:
        return float(np.random.random())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (UntracedFunction, "torch.fx cannot trace it"),
        (Optional, "what it does depends on whether shift"),
        (WithoutGradients, "it sets a mode, such as no_grad"),
        (OtherInTraining, "other activations in training than in evaluation"),
        (Counting, "it sets calls"),
        (CountingInAChild, "it sets conv1.calls"),
        (Random, "it draws random numbers in Python"),
        (RandomOfPython, "it draws random numbers in Python"),
        (RandomOfNumPy, "it draws random numbers in Python"),
        (ConstantTensor, "it makes a tensor of numbers"),
    ],
)
def test_functions_in_a_forward_that_cannot_be_rewritten_are_refused(kind: type[Block], reason: str) -> None:
    model = nn.Sequential(kind(), nn.Conv2d(4, 5, 1), nn.ReLU())
    state, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    message = (
        rf"elu\(\) in 0 \(test_convert_sites.py:\d+\) is the call of a function, .*cannot be rewritten: .*{reason}"
    )
    with pytest.raises(ValueError, match=message):
        kafops.replace_activations(model, kafops.KAF, example_input=images(), skip="0.relu")
    assert list(model.modules()) == modules
    assert [type(m) for m in model.modules()][1] is kind
    torch.testing.assert_close(model.state_dict(), state)
    assert names(same(model, example_input=images(), skip=["0"])) == [("2", 5)]


def test_forwards_on_the_object_are_refused() -> None:
    model = Block()
    model.forward = lambda x: F.relu(model.conv1(x))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="its forward is an attribute of the object"):
        same(model, example_input=images(), skip="relu")


def test_settings_that_are_read_are_fixed() -> None:
    class Switched(Block):
        twice = False

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.conv1(x))
            return x + x if self.twice else x

    model = Switched()
    same(model, example_input=images(), skip="relu")
    model.twice, model.other = False, True
    with pytest.raises(AttributeError, match="twice of this Switched stays False: its forward was generated with that"):
        model.twice = True
    assert copy.deepcopy(model).other


def test_tuples_are_fixed_and_what_is_not_is_said() -> None:
    class Config:
        scale = 2.0

    class Set(Block):
        def __init__(self) -> None:
            super().__init__()
            self.size, self.scales, self.config = (2, 2), [1.0], Config()
            self.drop = nn.Dropout(0.25)

        def forward(self, x: Tensor) -> Tensor:
            x = F.avg_pool2d(self.conv1(x), self.size) * self.scales[0] * self.config.scale
            return F.relu(F.dropout(x, self.drop.p, self.training))

    model = Set()
    report = same(model, example_input=images(), skip="relu")
    assert "Set: its new forward has taken over config, drop.p, scales; a later change has no effect" in str(report)
    with pytest.raises(AttributeError, match=r"size of this Set stays \(2, 2\)"):
        model.size = (3, 3)
    assert not [r for r in same(Block(), example_input=images()).remarks if "taken over" in r]


def test_buffers_are_worked_with_at_every_call() -> None:
    class Normed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("mean", torch.randn(4))
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            x = self.conv1(x)
            if self.training:
                self.mean.lerp_(x.detach().mean((0, 2, 3)), 0.1)
            return F.relu(x - self.mean[:, None, None]) * self.scale.item()

    torch.manual_seed(0)
    before, x = Normed(), images()
    after = copy.deepcopy(before)
    same(after, example_input=images(), skip="relu")
    for scale in (1.0, 7.0):
        for model in (before, after):
            model.scale.fill_(scale)
        torch.testing.assert_close(after(x), before(x))
    torch.testing.assert_close(after.eval()(x), before.eval()(x))
    assert (before.calls, after.calls) == (3, 3)
    torch.testing.assert_close(after.mean, before.mean)


# ------------------------------------------------------------------------------------------ in place, and what reads on


class DropsTheResult(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        self.relu(x)
        return self.conv2(x)


class ReadsTheInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.conv2(self.relu(x)).mean() + x


class ReturnsTheInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        self.relu(x)
        return x


class ReadsAView(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        view = x.flatten(1)
        return self.relu(x).sum() + view


@pytest.mark.parametrize("kind", [DropsTheResult, ReadsTheInput, ReturnsTheInput, ReadsAView])
def test_what_an_activation_overwrites_must_not_be_read_again(kind: type[Block]) -> None:
    message = r"cannot be replaced:\n  0.relu works in place, and what it has overwritten is read again"
    for example in (images(), None):
        if example is None and kind is ReadsAView:
            continue  # a graph does not tell what is a view
        with pytest.raises(ValueError, match=message):
            same(nn.Sequential(kind(inplace=True)), example_input=example)
    model = nn.Sequential(kind(inplace=False))
    before = copy.deepcopy(model)
    same(model, example_input=images())
    x = images()
    torch.testing.assert_close(model(x), before(x))


@pytest.mark.parametrize("call", [lambda x: F.relu(x, inplace=True), torch.relu_, lambda x: x.relu_()])
def test_functions_in_place_are_watched_too(call: Callable[[Tensor], Tensor]) -> None:
    class Reads(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x)
            return call(x).sum() + x

    for example in (images(), None):
        with pytest.raises(ValueError, match="relu_2 works in place, and what it has overwritten is read again"):
            same(Reads(), example_input=example, skip="relu")


def test_half_of_a_tensor_may_be_overwritten() -> None:
    class Half(Block):
        def forward(self, x: Tensor) -> Tensor:
            a, b = self.conv1(x).chunk(2, 1)
            return torch.cat([self.relu(a), b], 1)

    before = Half(inplace=True).requires_grad_(False)
    after, x = copy.deepcopy(before), images()
    assert names(same(after, example_input=x)) == [("relu", 2)]
    torch.testing.assert_close(after(x), before(x))


# ------------------------------------------------------------------------------------------------- where channels are


class Scaled(nn.Module):
    """Nothing says which dimension of [2, 4, 5] holds channels."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.gelu = nn.ReLU(), nn.GELU()
        self.scale = nn.Parameter(torch.ones(1, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.gelu(self.relu(x * self.scale))


def test_ambiguous_channels_are_refused_by_name() -> None:
    x = torch.randn(2, 4, 5)
    message = (
        r"relu gets shape \[2, 4, 5\], of which it is not known which dimension holds the channels, in the model "
        r"itself \(test_convert_sites.py:\d+\)\nsay so by channel_dim={'relu': ...}, let the factory .*kafops.KAF\(1\)"
    )
    for factory in (kafops.KAF, lambda c: kafops.LazyKAF1d(), kafops.KAF1d):
        with pytest.raises(ValueError, match=message):
            kafops.replace_activations(Scaled(), factory, example_input=x)

    def shapes(**options: Any) -> list[tuple[int, int, tuple[int, ...]]]:
        report = kafops.replace_activations(Scaled(), kafops.KAF, example_input=x, **options)
        return [(r.channels, r.channel_dim, tuple(r.new.alpha.shape)) for r in report]

    assert shapes(channel_dim=-1) == [(5, -1, (5, 20))] * 2
    assert shapes(channel_dim=1) == [(4, 1, (4, 20))] * 2
    assert shapes(channel_dim={"relu": 2, "gelu": -2}) == [(5, -1, (5, 20)), (4, 1, (4, 20))]
    with pytest.raises(ValueError, match="gelu gets shape"):
        shapes(channel_dim={"relu": 2})
    with pytest.raises(ValueError, match="channel_dim must name a site, got elu; the sites are gelu, relu"):
        shapes(channel_dim={"elu": 2})
    with pytest.raises(ValueError, match=r"channel_dim of relu: 3 is no dimension of an input of 3, shape \[2, 4, 5\]"):
        shapes(channel_dim=3)


@pytest.mark.parametrize("wrong", ["1", [1], 1.0, True, {"relu": "1"}, {1: 1}])
def test_channel_dim_is_an_integer_or_a_mapping(wrong: Any) -> None:
    with pytest.raises(TypeError, match="channel_dim must be an integer, a mapping from names of sites to integers"):
        kafops.replace_activations(Scaled(), kafops.KAF, example_input=torch.randn(2, 4, 5), channel_dim=wrong)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["attention", "lstm", "gru", "rnn"])
def test_attention_and_recurrent_layers_have_channels_last(kind: str, batch_first: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kinds = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
            layer = nn.MultiheadAttention(8, 2) if kind == "attention" else kinds[kind](8, 6)
            layer.batch_first = batch_first
            self.layer, self.act = layer, nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x, x, x) if kind == "attention" else self.layer(x)
            return self.act(y[0])

    before, x = Net().eval(), torch.randn(2, 5, 8)
    after = copy.deepcopy(before)
    (r,) = same(after, example_input=x)
    assert (r.channels, r.channel_dim) == (8 if kind == "attention" else 6, -1)
    torch.testing.assert_close(after(x), before(x))


def test_a_shared_curve_needs_no_channel_dimension() -> None:
    model = Scaled()
    report = kafops.replace_activations(model, lambda channels: kafops.KAF(1), example_input=torch.randn(2, 4, 5))
    assert [(r.channels, r.new.num_parameters) for r in report] == [(0, 1), (0, 1)]
    assert model(torch.randn(3, 4, 5)).shape == (3, 4, 5)


def test_one_number_is_for_what_cannot_be_told() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU())
    (r,) = kafops.replace_activations(model, kafops.KAF, example_input=torch.randn(2, 4, 5), channel_dim=1)
    assert (r.channels, r.channel_dim) == (6, -1)


def test_a_curve_for_each_token_is_never_made() -> None:
    x = torch.randn(2, 9, 5)
    for factory in (lambda c: kafops.LazyKAF1d(), kafops.KAF1d, nn.PReLU):
        model = nn.Sequential(nn.Linear(5, 9), nn.ReLU())
        if factory is kafops.KAF1d:  # which takes channel_dim
            (r,) = kafops.replace_activations(model, factory, example_input=x)
            assert r.new.channel_dim == -1
        else:
            with pytest.raises(ValueError, match=r"that fails at 1, .* input of 9 channels in dimension -1"):
                kafops.replace_activations(model, factory, example_input=x)


def attention(x: Tensor, heads: int) -> Tensor:
    """[N, C, H, W] to [N, H W, C], by hand."""
    q = k = v = x.flatten(2).view(len(x), heads, -1, x[0, 0].numel()).transpose(2, 3)
    attention = (q @ k.transpose(-2, -1)).softmax(-1)
    return (attention @ v).transpose(1, 2).reshape(len(x), -1, x.shape[1])


MOVES: dict[str, tuple[Callable[[Tensor], Tensor], int | None]] = {
    "permute": (lambda x: x.permute(0, 2, 3, 1), -1),
    "reshape": (lambda x: x.reshape(2, 4, 30), 1),
    "flatten, transpose": (lambda x: x.flatten(2).transpose(1, 2), -1),
    "groups and back": (lambda x: x.view(2, 2, 2, 5, 6).transpose(1, 2).reshape(2, 4, 5, 6), 1),
    "heads": (lambda x: attention(x, 2), -1),
    "keys": (lambda x: x.flatten(2) @ x.flatten(2).transpose(1, 2).softmax(-1) @ torch.ones(2, 4, 30), None),
    "roll": (lambda x: x.roll((1, 1), (1, 2)), 1),
    "windows": (lambda x: x.permute(0, 2, 3, 1).reshape(2, 5, 2, 3, 4).permute(0, 2, 1, 3, 4).reshape(4, 15, 4), -1),
    "unsqueeze": (lambda x: x.unsqueeze(1), -3),
    "index": (lambda x: x[:, :, 0], 1),
    "first of batch": (lambda x: x[0], -3),
    "unbind": (lambda x: x.unbind(3)[0], 1),
    "chunk": (lambda x: x.chunk(2, 1)[1], 1),
    "cat": (lambda x: torch.cat([x, x], 1), 1),
    "einops": (lambda x: x.movedim(1, -1).flatten(1, 2) @ torch.ones(4, 7), -1),
    "pool": (lambda x: F.adaptive_avg_pool2d(x, 1), 1),
    "tokens": (lambda x: F.linear(x.flatten(2), torch.ones(8, 30)), -1),
}


@pytest.mark.parametrize("name", MOVES)
def test_channels_are_followed(name: str) -> None:
    move, dim = MOVES[name]

    class Moving(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.relu(move(self.conv1(x)))

    if dim is None:
        with pytest.raises(ValueError, match="it is not known which dimension holds the channels"):
            kafops.replace_activations(Moving(), kafops.KAF, example_input=images())
        return
    (r,) = kafops.replace_activations(Moving(), kafops.KAF, example_input=images())
    assert (r.channel_dim, r.channels) == (dim, move(torch.zeros(2, 4, 5, 6)).shape[dim])


# --------------------------------------------------------------------------------------------- factories, names, report


def test_what_a_factory_asks_for() -> None:
    asked: list[dict[str, Any]] = []

    def factory(channels: int, *, site: str, old: Any, rank: int, channel_dim: int) -> nn.Module:
        asked.append({"channels": channels, "site": site, "old": old, "rank": rank, "channel_dim": channel_dim})
        return kafops.KAF(channels, channel_dim=channel_dim)

    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(5, 6), relu, nn.Sequential(nn.Conv1d(4, 3, 1), nn.GELU()))
    kafops.replace_activations(model, factory, example_input=torch.randn(2, 4, 5))
    assert asked[0] == {"channels": 6, "site": "1", "old": relu, "rank": 3, "channel_dim": -1}
    assert asked[1] == asked[1] | {"channels": 3, "site": "2.1", "rank": 3, "channel_dim": 1}
    bound = partial(kafops.KAF, channel_dim=-1)  # what is bound stays bound
    (r,) = kafops.replace_activations(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), bound)
    assert r.new.channel_dim == -1
    with pytest.raises(TypeError, match="factory must have a parameter named base to be given one"):
        kafops.replace_activations(model, nn.PReLU, base="same")


def test_bases_in_the_report() -> None:
    model, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.Hardswish(True), nn.Hardsigmoid()), None
    x = torch.randn(8, 3, 5)
    report = same(copy.deepcopy(model), example_input=x)
    assert [r.new.base for r in report] == ["relu", "same"]
    assert "kept beneath the curves, exact but not fused, so slower: 1 Hardswish" in str(report)
    assert report.moved.by == 0
    assert report.moved.of > 0
    assert report.left == [("4", "Hardsigmoid")]
    report = same(copy.deepcopy(model), example_input=x, fit=True)
    (fitted,) = [r.new for r in report if r.new.fit_error is not None]
    assert f"fitted: Hardswish on {fitted.base}, off by {fitted.fit_error:.2g} at most" in str(report)
    assert 0 < report.moved.by < 6 * fitted.fit_error  # a hard sigmoid's slope is 1/6
    assert str(report).endswith(f"moved by {report.moved.by:.2g}, where the largest is {report.moved.of:.3g}")


def test_channel_dims_in_the_report() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    lines = str(kafops.replace_activations(model, kafops.KAF, example_input=torch.randn(2, 3, 4))).splitlines()
    assert lines[:2] == [
        "site  old → new   channels  rank  uses  channel_dim",
        "1     ReLU → KAF         8     3     1           -1",
    ]


def named(module: str, name: str) -> type[nn.Module]:
    """A class as timm or transformers has it, without either."""
    return type(name, (nn.Module,), {"__module__": module, "forward": lambda self, x: F.gelu(x)})


@pytest.mark.parametrize(
    ("module", "name", "known"),
    [
        ("timm.layers.activations", "GELU", True),
        ("timm.layers.activations", "Sigmoid", False),
        ("transformers.activations", "NewGELUActivation", True),
        ("mine.activations", "FancyAct", False),
    ],
)
def test_classes_are_known_by_name(module: str, name: str, known: bool) -> None:
    kind = named(module, name)
    kind.forward = lambda self, x: x.sigmoid() * x
    model = nn.Sequential(nn.Linear(3, 4), kind())
    if known:
        assert names(same(model)) == [("1", 4)]
        return
    with pytest.raises(ValueError, match=rf"; it has 1 {module}.{name}$"):
        same(model)
    assert names(same(model, targets=f"{module}.{name}")) == [("1", 4)]


def test_skip() -> None:
    def model() -> nn.Module:
        return nn.Sequential(Block(), nn.Conv2d(6, 5, 1), nn.ReLU())

    assert names(same(model(), example_input=images(), skip="0")) == [("2", 5)]
    assert names(same(model(), example_input=images(), skip=["0.relu", "2"])) == [("0.elu", 6)]
    assert names(same(model(), example_input=images(), skip={"0.elu"})) == [("0.relu", 4), ("0.relu_2", 6), ("2", 5)]
    with pytest.raises(ValueError, match=r"skip must name a module or site, got 0\.gelu; the sites are"):
        same(model(), example_input=images(), skip="0.gelu")
    for wrong in (None, 5, [1]):
        with pytest.raises(TypeError, match=r"skip must be a qualified name, .*, got"):
            same(model(), example_input=images(), skip=wrong)
    with pytest.raises(ValueError, match="skip leaves no activation of this Sequential to replace"):
        same(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), example_input=images(), skip="1")


def test_a_model_that_fails_afterwards_is_as_before() -> None:
    class Picky(Block):
        def forward(self, x: Tensor) -> Tensor:
            assert type(self.relu) is nn.ReLU
            return F.relu(self.relu(self.conv1(x)))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.last = Block(), Picky()

        def forward(self, x: Tensor) -> Tensor:
            assert type(self.last.relu) is nn.ReLU
            return self.last(x) + self.block(x).mean()

    model = Outer()
    before = [(id(m), type(m), list(m._modules)) for m in model.modules()]
    with pytest.raises(AssertionError):
        same(model, example_input=images())
    assert [(id(m), type(m), list(m._modules)) for m in model.modules()] == before
