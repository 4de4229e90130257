import copy
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kafops
from models.activations import ACTIVATIONS, KWinners, activation
from models.images import CIFAR10, CIFAR100, DIGITS, IMAGENET, MNIST, ImageFormat
from models.networks import NETWORKS, Normalise, build
from models.networks.blocks import Entry
from models.networks.resnet import FORMS
from models.support.errors import UserError

SMALL = (
    "vgg:width=2,dense=8",
    "vgg:width=2,dense=8,pool=average",
    "vgg:width=2,dense=8,pool=stride,dropout=no",
    "light:width=2,dense=8",
    "resnet:depth=8,width=2",
    "resnet:depth=8,width=2,form=post,shortcut=conv",
    "resnet:depth=8,width=2,form=post_norm,shortcut=conv3x3",
    "preactresnet18:width=2",
    "wideresnet:depth=10,width=1",
)


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def of_type(network: nn.Module, kind: type) -> list:
    return [module for module in network.modules() if isinstance(module, kind)]


def on_meta(network: str, images: ImageFormat = CIFAR10) -> nn.Module:
    """Build a network with ReLU and without memory."""
    with torch.device("meta"):
        return NETWORKS.create(network, activation("relu"), images)


def random_images(images: ImageFormat, count: int = 4) -> Tensor:
    shape = (count, images.channels, images.size, images.size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        ("resnet20", 269_722),  # He et al. 2015, table 6: 0.27 M; with zero-padded shortcuts
        ("resnet32", 464_154),  # 0.46 M
        ("resnet44", 658_586),  # 0.66 M
        ("resnet56", 853_018),  # 0.85 M
        ("resnet110", 1_727_962),  # 1.7 M
        ("preactresnet18", 11_171_146 + 2 * 512),  # the number without the last norm, which Wong et al. 2020 have
        ("wideresnet28_10", 36_479_194),  # Zagoruyko, Komodakis 2016, table 4: 36.5 M
        ("wideresnet:depth=34", 46_160_474),  # 46.2 M
        # Peconi's notebooks: 75,562 trainable, of them 32 + 32 + 64 + 64 biases of convolutions, which we leave out.
        ("light", 75_562 - 192),
    ],
)
def test_has_the_published_size_on_cifar10(network: str, parameters: int) -> None:
    assert count(on_meta(network)) == parameters


@pytest.mark.parametrize("depth", [20, 110])
@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_a_resnet_have_the_same_size(depth: int, form: str) -> None:
    assert count(on_meta(f"resnet:depth={depth},form={form}")) == {20: 269_722, 110: 1_727_962}[depth]


def test_kaf_vgg_has_the_size_of_the_thesis() -> None:
    """Its notebook: 562,986 trainable, of them 2 (32 + 64 + 128) biases of convolutions, which we leave out."""
    assert count(build("vgg", "kaf", CIFAR10, seed=0)) == 562_986 - 448


def test_resnet50_has_the_published_size() -> None:
    """torchvision's table: 25,557,032 parameters."""
    pytest.importorskip("torchvision")
    assert count(on_meta("resnet50", IMAGENET)) == 25_557_032


def test_kaf_adds_its_coefficients_and_nothing_else() -> None:
    relu, kaf = (build("resnet20:width=8", name, MNIST, seed=0) for name in ("relu", "kaf"))
    channels = 8 * 7 + 16 * 6 + 32 * 6  # the first activation of a stage still has the width before it
    assert count(kaf) - count(relu) == 20 * channels


@pytest.mark.parametrize(
    ("network", "activations", "layers"),
    [
        ("resnet:depth=8,width=2", 7, 8),
        ("resnet20:width=2", 19, 20),
        ("resnet20:width=2,form=post", 19, 20),
        ("resnet20:width=2,form=post_norm", 19, 20),
        ("resnet56:width=2", 55, 56),
        ("preactresnet18:width=2", 17, 18 + 3),  # three convolved shortcuts, one per change of shape
        ("wideresnet:depth=16,width=1", 13, 14 + 2),  # 16 counts the three shortcuts of wide stages; width 1 has two
        ("vgg:width=2", 7, 8),
        ("light:width=2", 5, 6),
    ],
)
def test_has_an_activation_per_layer_but_the_last(network: str, activations: int, layers: int) -> None:
    model = build(network, "kaf", CIFAR10, seed=0)
    assert len(of_type(model, kafops.KAF)) == activations
    assert len(of_type(model, nn.Conv2d)) + len(of_type(model, nn.Linear)) == layers


@pytest.mark.parametrize("images", [MNIST, CIFAR10], ids=["mnist", "cifar10"])
@pytest.mark.parametrize("network", SMALL)
@pytest.mark.parametrize("name", ACTIVATIONS.names)
def test_every_activation_trains_every_parameter_of_every_network(name: str, network: str, images: ImageFormat) -> None:
    # Among few channels some would never win.
    model = build(network, "kwta:ratio=0.6" if name == "kwta" else name, images, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of dropout
        logits = model(random_images(images))
    assert logits.shape == (4, 10)
    logits.square().sum().backward()
    for parameter, p in model.named_parameters():
        assert p.grad is not None, parameter
        assert p.grad.isfinite().all(), parameter
        assert p.grad.any(), parameter


def shared_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights, biases and norms: what a network has whatever the activation."""
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {f"{name}.{key}": t for name, layer in layers.items() for key, t in layer.state_dict().items()}


@pytest.mark.parametrize("network", SMALL)
def test_weights_do_not_depend_on_the_activation(network: str) -> None:
    relu = shared_tensors(build(network, "relu", MNIST, seed=3))
    for name in ACTIVATIONS.names:
        other = shared_tensors(build(network, name, MNIST, seed=3))
        assert relu.keys() == other.keys()
        assert all(torch.equal(relu[key], other[key]) for key in relu), name


def test_seed_decides_weights_and_curves_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (build("resnet20:width=4", "kaf", MNIST, seed=s).state_dict() for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.conv1.weight"], other["blocks.0.conv1.weight"])
    assert not torch.equal(first["activation.alpha"], other["activation.alpha"])


def test_weights_are_as_he_et_al_scale_them() -> None:
    """Deviation sqrt(2 / (outputs · 9)) in a 3 × 3 convolution; 36,864 draws are within 4 / sqrt(2 n) of it, 1.5 %."""
    weight = build("resnet20:width=16", "relu", CIFAR10, seed=0).blocks[8].conv2.weight
    assert weight.shape == (64, 64, 3, 3)
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.015)


def test_build_takes_a_factory_too() -> None:
    named, made = (build("light:width=2", a, MNIST, seed=1) for a in ("silu", lambda channels: nn.SiLU()))
    assert all(torch.equal(a, b) for a, b in zip(named.parameters(), made.parameters(), strict=True))


def test_normalisation_is_inside_and_not_trained() -> None:
    layer = Normalise((0.5, 0.2), (0.25, 0.1))
    x = torch.tensor([1.0, 0.3]).view(1, 2, 1, 1)
    torch.testing.assert_close(layer(x).flatten(), torch.tensor([2.0, 1.0]))
    assert not list(layer.parameters())
    assert set(layer.state_dict()) == {"mean", "std"}


@pytest.mark.parametrize("network", SMALL)
def test_every_network_normalises_its_images(network: str) -> None:
    """With mean m and deviation s a network sees at x what one with 0 and 1 sees at (x - m) / s."""
    plain = ImageFormat(3, 32, 10, (0.0,) * 3, (1.0,) * 3)
    inside, outside = (build(network, "silu", images, seed=0).eval().double() for images in (CIFAR10, plain))
    mean, std = (torch.tensor(t, dtype=torch.float64).view(3, 1, 1) for t in (CIFAR10.mean, CIFAR10.std))
    x = random_images(CIFAR10).double()
    # The buffers of mean and deviation are rounded to float32.
    torch.testing.assert_close(inside(x), outside((x - mean) / std), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", SMALL)
def test_logits_come_out_linear_and_unbounded(network: str) -> None:
    model = build(network, "relu", CIFAR100, seed=0).eval()
    x = random_images(CIFAR100)
    before = model(x)
    assert before.shape == (4, 100)
    with torch.no_grad():
        model.classifier.bias += 50
    torch.testing.assert_close(model(x), before + 50, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("network", "images"),
    [
        *((network, images) for network in ("vgg", "light", "resnet20", "wideresnet:depth=10") for images in (DIGITS,)),
        ("preactresnet18", DIGITS),
        ("vgg:patch=2", MNIST),
        ("light:patch=7", MNIST),
        ("resnet20:patch=7", MNIST),
        ("resnet20:patch=2", DIGITS),
        ("preactresnet18:patch=4", CIFAR10),
        ("vgg", IMAGENET),
        ("resnet110:patch=8", IMAGENET),
    ],
)
def test_fits_images_of_other_sizes(network: str, images: ImageFormat) -> None:
    separator = "," if ":" in network else ":"
    with torch.device("meta"):
        model = NETWORKS.create(f"{network}{separator}width=2", activation("relu"), images)
        logits = model(torch.empty(2, images.channels, images.size, images.size))
    assert logits.shape == (2, images.classes)


def test_a_patch_gives_the_network_every_pixel_at_a_lower_resolution() -> None:
    entry = Entry(ImageFormat(2, 6, 10, (0.0, 0.0), (1.0, 1.0)), patch=3, halvings=1)
    x = torch.arange(72.0).view(1, 2, 6, 6)
    y = entry(x)
    assert y.shape == (1, entry.channels, entry.size, entry.size) == (1, 18, 2, 2)
    assert sorted(y.flatten().tolist()) == sorted(x.flatten().tolist())
    assert y[0, :, 1, 0].tolist() == x[0, :, 3:, :3].flatten().tolist()


def test_patch_is_applied_after_normalisation() -> None:
    entry = Entry(ImageFormat(2, 2, 10, (1.0, 2.0), (1.0, 1.0)), patch=2, halvings=0)
    assert entry(torch.zeros(1, 2, 2, 2)).flatten().tolist() == [-1.0] * 4 + [-2.0] * 4


def silent(form: str, inputs: int, outputs: int, stride: int, shortcut: str = "pad") -> nn.Module:
    """Return a block whose branch is 0, in evaluation mode, in which its norms are all but the identity."""
    block = FORMS[form](inputs, outputs, stride, activation("relu"), shortcut)
    nn.init.zeros_(block.conv2.weight)
    return block.eval()


@pytest.mark.parametrize(("form", "trunk"), [("pre", nn.Identity()), ("post", nn.ReLU()), ("post_norm", nn.ReLU())])
def test_only_the_pre_activation_form_has_a_trunk_without_activation(form: str, trunk: nn.Module) -> None:
    x = torch.randn(3, 2, 4, 4)
    # An untrained norm divides by sqrt(1 + 1e-5).
    torch.testing.assert_close(silent(form, 2, 2, 1)(x), trunk(x), rtol=1e-5, atol=0)


def test_post_norm_form_norms_the_sum_and_post_form_the_branch() -> None:
    x = torch.randn(3, 2, 4, 4)
    for form, factor in (("post_norm", 3.0), ("post", 1.0)):
        block = silent(form, 2, 2, 1)
        nn.init.constant_(block.norm2.weight, 3.0)
        torch.testing.assert_close(block(x), factor * x.relu(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_padded_shortcut_takes_every_second_pixel_and_new_channels_are_0_on_both_sides(form: str) -> None:
    x = torch.rand(3, 2, 4, 4)
    y = silent(form, 2, 4, 2)(x)
    torch.testing.assert_close(y[:, 1:3], x[:, :, ::2, ::2], rtol=1e-5, atol=0)
    assert not y[:, [0, 3]].any()


@pytest.mark.parametrize(("shortcut", "kernel"), [("conv", 1), ("conv3x3", 3)])
def test_convolved_shortcuts(shortcut: str, kernel: int) -> None:
    """In pre-activation form it starts behind the activation, in post-activation form it ends in a norm of its own."""
    x = torch.randn(3, 2, 4, 4)
    pre, post, post_norm = (silent(form, 2, 4, 2, shortcut) for form in ("pre", "post", "post_norm"))
    assert pre.shortcut.kernel_size == post.shortcut[0].kernel_size == post_norm.shortcut.kernel_size == (kernel,) * 2
    torch.testing.assert_close(pre(x), pre.shortcut(pre.norm1(x).relu()))
    torch.testing.assert_close(post(x), post.shortcut[1](post.shortcut[0](x)).relu())
    torch.testing.assert_close(post_norm(x), post_norm.norm2(post_norm.shortcut(x)).relu())
    assert isinstance(silent("pre", 2, 2, 1, shortcut).shortcut, nn.Identity)


def maps_of(model: nn.Module, modules: list[nn.Module], images: ImageFormat) -> list[tuple[int, ...]]:
    """Return channels and size of the outputs of modules, in the order of the calls."""
    seen: list[tuple[int, ...]] = []
    for module in modules:
        module.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:])))
    with torch.no_grad():
        model.eval()(random_images(images, 1))
    return seen


@pytest.mark.parametrize(
    ("network", "maps"),
    [
        ("resnet:depth=8,width=2", [(2, 28, 28)] * 3 + [(4, 14, 14)] * 2 + [(8, 7, 7)] * 2),
        ("resnet:depth=8,width=2,patch=4", [(2, 7, 7)] * 3 + [(4, 4, 4)] * 2 + [(8, 2, 2)] * 2),
        ("wideresnet:depth=10,width=2", [(16, 28, 28)] + [(32, 28, 28)] * 2 + [(64, 14, 14)] * 2 + [(128, 7, 7)] * 2),
        ("vgg:width=2", [(2, 28, 28)] * 2 + [(4, 14, 14)] * 2 + [(8, 7, 7)] * 2),
        ("vgg:width=2,pool=stride", [(2, 28, 28), (2, 14, 14), (4, 14, 14), (4, 7, 7), (8, 7, 7), (8, 4, 4)]),
        ("light:width=2,pool=average", [(2, 28, 28)] * 2 + [(4, 14, 14)] * 2),
    ],
)
def test_maps_are_halved_where_the_papers_say(network: str, maps: list[tuple[int, ...]]) -> None:
    model = build(network, "relu", MNIST, seed=0)
    shortcuts = {id(block.shortcut) for block in of_type(model, tuple(FORMS.values()))}
    convolutions = [m for m in of_type(model, nn.Conv2d) if id(m) not in shortcuts]
    assert maps_of(model, convolutions, MNIST) == maps


@pytest.mark.parametrize(("pool", "kinds"), [("max", (nn.MaxPool2d,)), ("average", (nn.AvgPool2d,)), ("stride", ())])
def test_pool_decides_what_halves_the_map_of_plain_networks(pool: str, kinds: tuple[type, ...]) -> None:
    for network, halvings in (("vgg", 3), ("light", 2)):
        model = build(f"{network}:width=2,pool={pool}", "relu", MNIST, seed=0)
        found = [type(m) for m in model.modules() if isinstance(m, (nn.MaxPool2d, nn.AvgPool2d))]
        assert found == list(kinds) * halvings
        assert len([m for m in of_type(model, nn.Conv2d) if m.stride == (2, 2)]) == (0 if kinds else halvings)


def test_dropout_rates_of_plain_networks() -> None:
    def rates(network: str) -> list[float]:
        return [m.p for m in of_type(build(network, "relu", MNIST, seed=0), nn.Dropout)]

    assert rates("vgg:width=2") == [0.2, 0.25, 0.3, 0.4]
    assert rates("light:width=2") == [0.2, 0.3, 0.4]
    assert not any(rates("vgg:width=2,dropout=no") + rates("light:width=2,dropout=no"))


def test_pssilu_pair_is_one_in_a_whole_network() -> None:
    model = build("resnet20:width=2", "pssilu", MNIST, seed=0)
    assert len([p for p in model.parameters() if p.dim() == 0]) == 2
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.activation.a.fill_(3.0)
    assert twin.blocks[0].activation1.a == 3
    assert model.activation.a == 1


def test_kwta_of_a_whole_network_follows_progress() -> None:
    model = build("vgg:width=2", "kwta:ratio=0.5,end=0.1", MNIST, seed=0)
    layers = of_type(model, KWinners)
    for layer in layers:
        layer.set_progress(0.5)
    assert len(layers) == 7
    twin = build("vgg:width=2", "kwta:ratio=0.5,end=0.1", MNIST, seed=1)
    twin.load_state_dict(model.state_dict())
    assert all(layer.winners(10) == 3 for layer in of_type(twin, KWinners))


def test_resnet50_computes_what_torchvision_computes() -> None:
    models = pytest.importorskip("torchvision.models")
    images = ImageFormat(3, 64, 7, (0.0,) * 3, (1.0,) * 3)
    ours = build("resnet50", "relu", images, seed=0).eval()
    theirs = models.resnet50(num_classes=7).eval()
    theirs.load_state_dict(ours.body.state_dict())
    x = random_images(images, 2)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_resnet50_has_every_activation_replaced_by_one_of_its_own() -> None:
    pytest.importorskip("torchvision")
    model = build("resnet50", "prelu", CIFAR10, seed=0)
    assert not of_type(model, nn.ReLU)
    widths = [layer.num_parameters for layer in of_type(model, nn.PReLU)]
    stages = [([w, w, 4 * w], blocks) for w, blocks in ((64, 3), (128, 4), (256, 6), (512, 3))]
    assert widths == [64, *(w for stage, blocks in stages for w in stage * blocks)]
    model(random_images(CIFAR10, 2)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIVATIONS.names)
def test_every_activation_trains_every_parameter_of_resnet50(name: str) -> None:
    pytest.importorskip("torchvision")
    model = build("resnet50", name, CIFAR10, seed=0)
    model(random_images(CIFAR10)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_resnet50_without_torchvision_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "models.networks.imagenet", raising=False)
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="network 'resnet50' is torchvision's; run `pip install torchvision`"):
        build("resnet50", "relu", IMAGENET, seed=0)


@pytest.mark.parametrize(
    ("network", "images", "message"),
    [
        ("resnet21", MNIST, "unknown network 'resnet21', there are vgg, light, .*did you mean .*resnet20"),
        ("resnet20:widht=4", MNIST, "network 'resnet20' has no option 'widht'.*did you mean width"),
        ("resnet20:depth=32", MNIST, "network 'resnet20' has no option 'depth'"),
        ("resnet:depth=21", MNIST, r"depth must be 6n \+ 2 .*got 21"),
        ("resnet:depth=2", MNIST, r"depth must be 6n \+ 2 .*got 2"),
        ("wideresnet:depth=26", MNIST, r"depth must be 6n \+ 4 .*got 26"),
        *((f"{n}:width=0", MNIST, "width must be at least 1, got 0") for n in ("resnet20", "vgg", "light")),
        *((f"{n}:width=0", MNIST, "width must be at least 1, got 0") for n in ("preactresnet18", "wideresnet")),
        ("vgg:dense=0", MNIST, "dense must be at least 1, got 0"),
        ("vgg:pool=min", MNIST, "pool must be max, average or stride, got 'min'"),
        ("vgg:dropout=0.5", MNIST, "option 'dropout' of network 'vgg' must be yes or no, got '0.5'"),
        ("resnet20:form=prenorm", MNIST, "form must be pre, post or post_norm, got 'prenorm'"),
        ("resnet20:shortcut=none", MNIST, "shortcut must be pad, conv or conv3x3, got 'none'"),
        ("resnet20:patch=3", MNIST, "patch must divide the images' size 28, as 1, 2, 4, 7, 14 do, got 3"),
        ("resnet20:patch=0", MNIST, "patch must divide the images' size 28.*got 0"),
        ("vgg:patch=2", DIGITS, "images of 8 × 8 pixels are too small.*patch=2.*halves.*3 times.*16 × 16 or more"),
        ("resnet20:patch=4", DIGITS, "images of 8 × 8 pixels are too small.*take a smaller patch"),
    ],
)
def test_refuses(network: str, images: ImageFormat, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(network, "relu", images, seed=0)


def test_resnet50_refuses_small_and_grey_images() -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="takes images of 3 channels, got 1"):
        build("resnet50", "relu", MNIST, seed=0)
    small = ImageFormat(3, 28, 10, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match=r"images of 28 × 28 pixels are too small.*5 times, which takes 32 × 32"):
        build("resnet50", "relu", small, seed=0)


def test_refuses_images_that_would_broadcast() -> None:
    model: Callable[[Tensor], Tensor] = build("light:width=1", "relu", CIFAR10, seed=0)
    with pytest.raises(ValueError, match=r"wanted images \[N, 3, H, W\], got shape \[2, 1, 32, 32\]"):
        model(torch.rand(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"wanted images \[N, 3, H, W\], got shape \[3, 32, 32\]"):
        model(torch.rand(3, 32, 32))


@pytest.mark.parametrize(("depth", "blocks"), [(8, 3), (20, 9)])
def test_branches_start_with_one_over_the_root_of_their_number(depth: int, blocks: int) -> None:
    model = build(f"resnet:depth={depth},width=2,form=post", "relu", MNIST, 0)
    assert len(model.blocks) == blocks
    for block in model.blocks:
        torch.testing.assert_close(block.norm2.weight, torch.full_like(block.norm2.weight, blocks**-0.5))
