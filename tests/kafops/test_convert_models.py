"""Networks that people have, of torchvision, timm and transformers, narrow where they can be: all convert.

With base="same" nothing moves, in any mode, and all curves learn. `docs/convert.md` has the sweep over many more names.
"""

import copy
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.swin_transformer import SwinTransformer

import kafops
from kafops.channels import tensors

Example = Tensor | Mapping[str, Tensor]


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(50, (2, 7))}


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size)


def huggingface(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config, kind = getattr(transformers, name + "Config"), getattr(transformers, name + "Model")
        return kind(config(**options))

    return build


BERT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
GPT2 = {
    "vocab_size": 50,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


class Siren(nn.Module):
    """An MLP whose activation is a function of our own, in a module."""

    class Sine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(30 * x)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 16), nn.Linear(16, 16), nn.Linear(16, 3)])
        self.sine = Siren.Sine()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.sine(layer(x))
        return self.layers[-1](x)


class FunctionalMLP(nn.Module):
    """As in PyTorch's own examples: functions, and one that looks at self.training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.relu(self.conv(x), inplace=True)
        x = torch.nn.functional.max_pool2d(x, 2).mean((2, 3))
        x = torch.nn.functional.dropout(self.hidden(x).relu_(), training=self.training)
        return torch.log_softmax(self.last(x), 1)


vision = torchvision.models
CONVNEXT = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)]
NARROW = {"num_classes": 10}
# Name: what builds it, an example, the number of curves, where the channels are.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Example], int, set[int]]] = {
    "torchvision resnet50": (
        lambda: ResNet(Bottleneck, [3, 4, 6, 3], num_classes=10, width_per_group=8), partial(images, 32), 49, {1}),
    "torchvision resnext50": (
        lambda: ResNet(Bottleneck, [2, 1, 1, 1], num_classes=10, groups=4, width_per_group=2), partial(images, 32), 16,
        {1}),
    "torchvision densenet121": (
        lambda: DenseNet(8, (2, 3, 2, 2), 16, num_classes=10), partial(images, 32), 23, {1}),
    "torchvision googlenet": (
        lambda: vision.googlenet(init_weights=False, num_classes=10), partial(images, 64), 61, {1}),
    "torchvision inception_v3": (
        lambda: vision.inception_v3(init_weights=False, aux_logits=False, **NARROW), partial(images, 96), 94, {1}),
    "torchvision convnext": (lambda: ConvNeXt(CONVNEXT, num_classes=10), partial(images, 32), 4, {-1}),
    "torchvision swin": (
        lambda: SwinTransformer([4, 4], 12, [2, 2], [1, 2], [4, 4], num_classes=10), partial(images, 32), 4, {-1}),
    "torchvision vit": (lambda: VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=10), partial(images, 32), 2, {-1}),
    "torchvision efficientnet_b0": (
        lambda: vision.efficientnet_b0(num_classes=10, stochastic_depth_prob=0.0), partial(images, 32), 49, {1}),
    "torchvision mobilenet_v3_small": (lambda: vision.mobilenet_v3_small(**NARROW), partial(images, 64), 33, {1}),
    "torchvision regnet": (
        lambda: RegNet(BlockParams([1, 2], [16, 24], [8, 8], [1, 1], [2, 2], se_ratio=0.25), num_classes=10),
        partial(images, 32), 13, {1}),
    "torchvision squeezenet": (lambda: vision.squeezenet1_1(**NARROW), partial(images, 64), 26, {1}),
    "timm resnet50": (lambda: timm.create_model("resnet50", **NARROW), partial(images, 32), 49, {1}),
    "timm vit_tiny": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, **NARROW), partial(images, 32), 2,
        {-1}),
    "timm convnext_atto": (lambda: timm.create_model("convnext_atto", **NARROW), partial(images, 32), 12, {1}),
    "timm convnext, channels last": (
        lambda: timm.create_model("convnext_atto", conv_mlp=False, depths=(1, 1, 1, 1), **NARROW),
        partial(images, 32), 4, {-1}),
    "timm nfnet_l0": (
        lambda: timm.create_model("nfnet_l0", depths=(1, 1, 1, 1), channels=(256,) * 4, **NARROW),
        partial(images, 32), 24, {1}),
    "timm efficientnet_b0": (lambda: timm.create_model("efficientnet_b0", **NARROW), partial(images, 32), 49, {1}),
    "timm mixer": (
        lambda: timm.create_model("mixer_s32_224", img_size=64, **NARROW), partial(images, 64), 16, {-1}),
    "timm swin_tiny": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(1, 2), num_heads=(1, 2), **NARROW),
        partial(images, 56), 3, {-1}),
    "transformers BERT": (huggingface("Bert", **BERT), tokens, 2, {-1}),
    "transformers GPT-2": (huggingface("GPT2", **GPT2), tokens, 2, {-1}),
    "transformers Llama": (huggingface("Llama", **BERT), tokens, 2, {-1}),
    "transformers ViT": (
        huggingface("ViT", **BERT | {"image_size": 32, "patch_size": 8}), lambda: {"pixel_values": images(32)}, 2,
        {-1}),
    "functions": (FunctionalMLP, partial(images, 16), 2, {1}),
}  # fmt: skip


def run(model: nn.Module, example: Example) -> list[Tensor]:
    """The floating outputs, with the same random numbers each time."""
    torch.manual_seed(0)
    output = model(**example) if isinstance(example, Mapping) else model(example)
    return [y for y in tensors(output) if y.is_floating_point()]


def awake(model: nn.Module) -> nn.Module:
    """Without zeros in heads and at the ends of branches, which let no gradient through at the start."""
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.1)
    for m in model.modules():
        if type(m).__name__ in ("StochasticDepth", "DropPath"):
            m.p = m.drop_prob = 0.0
    return model


def convert(model: nn.Module, example: Example) -> kafops.ReplacementReport:
    return kafops.replace_activations(model, kafops.KAF, example_input=example, base="same")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_models_that_people_have(name: str) -> None:
    build, example_of, curves, dims = MODELS[name]
    torch.manual_seed(0)
    before, example = awake(build()), example_of()
    after = copy.deepcopy(before)
    keys = list(before.state_dict())
    report = convert(after, example)
    assert len(report) == curves
    assert {r.channel_dim for r in report} == dims
    assert {r.new.alpha.shape[0] for r in report} == {r.channels for r in report}
    curves_of = tuple(f"{name}." for r in report for name in r.names)
    assert [k for k in after.state_dict() if not k.startswith(curves_of)] == keys
    assert isinstance(after, type(before))

    def compare(a: nn.Module, b: nn.Module, roundings: float) -> None:
        """A base differs from PyTorch's function by some roundings, which all layers after it see."""
        for x, y in zip(run(a, example), run(b, example), strict=True):
            slack = roundings * torch.finfo(x.dtype).eps * x.abs().max().item()
            torch.testing.assert_close(y, x, rtol=0, atol=slack)

    with torch.no_grad():
        for training in (False, True, False):
            for model in (before, after):
                model.train(training)
                for m in model.modules():  # norms over two images amplify roundings without bound
                    m.training &= not isinstance(m, nn.BatchNorm2d)
            compare(before, after, 256)
        with torch.autocast("cpu", torch.bfloat16):
            compare(before, after, 8)
        compare(after, copy.deepcopy(after), 0)
        compare(after, pickle.loads(pickle.dumps(after)), 0)

    after.train()
    optimizer = torch.optim.SGD(after.parameters(), 1e-3)
    sum(y.square().mean() for y in run(after, example)).backward()
    without = [r.names[0] for r in report if r.new.alpha.grad is None or not r.new.alpha.grad.any()]
    assert not without
    nn.utils.clip_grad_norm_(after.parameters(), 1.0)
    optimizer.step()
    assert all(r.new.alpha.any() for r in report)

    again = copy.deepcopy(before)
    convert(again, example)
    again.load_state_dict(after.state_dict())
    with torch.no_grad():
        compare(after.eval(), again.eval(), 0)


def test_a_siren() -> None:
    torch.manual_seed(0)
    before, x = Siren(), 2 * torch.rand(64, 2) - 1
    after = copy.deepcopy(before)
    report = kafops.replace_activations(
        after, partial(kafops.KAF, boundary=1.0), targets=Siren.Sine, example_input=x, base="same"
    )
    assert [(r.names, r.channels, r.uses) for r in report] == [(("sine",), 16, 2)]
    torch.testing.assert_close(after(x), before(x), rtol=0, atol=0)
    after(x).square().sum().backward()
    assert after.sine.alpha.grad.any()


@pytest.mark.parametrize("with_example", [False, True], ids=["by_graph", "by_example"])
def test_resnet50_has_49_curves(with_example: bool) -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet50()
        example = torch.empty(2, 3, 64, 64) if with_example else None
    report = kafops.replace_activations(model, kafops.KAF, example_input=example)
    assert len(report) == 49
    assert [(r.names, r.channels) for r in report[:4]] == [
        (("relu",), 64), (("layer1.0.relu",), 64), (("layer1.0.relu_2",), 64), (("layer1.0.relu_3",), 256)
    ]  # fmt: skip
    assert sum(isinstance(m, kafops.KAF) for m in model.modules()) == 49
    assert not [m for m in model.modules() if isinstance(m, nn.ReLU)]
