"""What a network is taken apart into, and what is refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from trained_networks import NETWORKS, trained_like

import kafops
from models import images, networks
from models.certified import traced
from models.certified.intervals import logits
from models.certified.traced import BoundError, steps
from models.evaluation import evaluation_mode


@pytest.mark.parametrize(("network", "activation"), NETWORKS)
def test_the_steps_compute_what_the_network_does(network: str, activation: str) -> None:
    """In float64, where both are right to some 1e-12; softplus leaves out what is below 2.1e-9 of its values."""
    model = trained_like(networks.build(network, activation, images.MNIST, seed=0)).double()
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
    close = 1e-6 if activation == "softplus" else 1e-9
    torch.testing.assert_close(logits(steps(model, (1, 28, 28)), x), wanted, rtol=close, atol=close)


def test_torchvisions_resnet50() -> None:
    model = trained_like(networks.build("resnet50", "silu", images.IMAGENET, seed=0))
    network = steps(model, (3, 64, 64))
    kinds = [step.operation.kind for step in network]
    assert kinds.count("convolution") == 53
    assert kinds.count("add") == 16
    assert kinds.count("activation") == 49
    assert (kinds.count("maxpool"), kinds.count("mean"), kinds[-1]) == (1, 1, "linear")
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model.double()(x.double())
    torch.testing.assert_close(logits(network, x), wanted, rtol=1e-7, atol=1e-7)


class Functions(nn.Module):
    """What others write without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding="same")
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x), inplace=True), 2)
        x = F.dropout(torch.tanh(x + x), 0.5, self.training)
        x = F.adaptive_avg_pool2d(F.avg_pool2d(x, 2), 1)
        return self.last(x.view(x.size(0), -1))


def test_functions_are_known_as_well_as_modules() -> None:
    model = Functions().eval().double()
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(logits(steps(model, (1, 8, 8)), x), model(x).detach())


def test_the_network_is_left_as_it_was() -> None:
    model = networks.build("light:width=2,dense=4,patch=7", "relu", images.MNIST, seed=0).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    network = steps(model, (1, 28, 28))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with evaluation_mode(model), torch.no_grad():
        x = torch.rand(1, 1, 28, 28)
        wanted = model(x)
    torch.testing.assert_close(logits(network, x).float(), wanted)


class Wrapped(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Constant(nn.Module):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.full((1, 1, 8, 8), start))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (nn.LayerNorm(8), r"part of the network cannot be bounded: torch\.nn.*LayerNorm is not known"),
        (nn.BatchNorm2d(1, track_running_stats=False), "part .* is a function of the batch"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), "only those padded with zeros, not transposed"),
        (nn.ConvTranspose2d(1, 1, 3), "only those padded with zeros, not transposed"),
        (nn.Linear(8, 8), "a linear layer is known on .N, features., got 4 dimensions; flatten before it"),
        (nn.AvgPool2d(3, ceil_mode=True), "average pooling is known without ceil_mode"),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), "with padding counted"),
        (nn.AdaptiveAvgPool2d(3), r"where it divides the size, got \[8, 8\] -> \[3, 3\]"),
        (nn.Flatten(2), r"only nn\.Flatten\(1, -1\) is known, got \(2, -1\)"),
        (nn.GELU(approximate="tanh"), "part of the network cannot be bounded: bounds are known for GELU with"),
        (Branching(), "torch.fx cannot trace it .* must not depend on the values of its input"),
        (Product(), "mul of the network cannot be bounded: the function mul is not known"),
        (Mean(), r"only that over all positions is known, got dim=1 of shape \[1, 1, 8, 8\]"),
        (Shifted(), "add of the network cannot be bounded: only the sum of two tensors of one shape is known"),
        (
            Constant(1.0),
            r"add of the network cannot be bounded: it takes part\.shift, a tensor that does not come from",
        ),
    ],
)
def test_what_is_not_known_is_named(part: nn.Module, message: str) -> None:
    with pytest.raises(BoundError, match=message):
        steps(Wrapped(part), (1, 8, 8))


class Overwriting(nn.Module):
    """A convolution, something in place, and a sum with what was there before."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.same = nn.Identity()
        self.last = nn.Linear(128, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z: Tensor
        if self.way == "module":
            z = y + self.relu(y)
        elif self.way == "method":
            z = y + y.relu_()
        elif self.way == "function":
            z = y + F.relu(y, True)
        elif self.way == "sum":
            z = y + y.add_(self.conv(x))
        elif self.way == "+=":
            z = y
            z += self.conv(x)
            z = z + y
        elif self.way == "view":
            z = F.relu(y.flatten(1), inplace=True) + y.flatten(1)
        elif self.way == "shared":
            z = self.relu(self.same(y)) + y
        elif self.way == "clone":
            z = self.relu(y.clone()) + y
        elif self.way == "before":
            z = self.same(y) + y
            z = self.relu(z) + self.relu(self.conv(x))
        return self.last(z.flatten(1))


@pytest.mark.parametrize("way", ["module", "method", "function", "sum", "view", "shared"])
def test_what_is_overwritten_is_not_used_again(way: str) -> None:
    """conv(x) + relu(conv(x)) as written, but 2 relu(conv(x)) as PyTorch computes it."""
    with pytest.raises(BoundError, match="after that was overwritten in place; use inplace=False"):
        steps(Overwriting(way), (1, 8, 8))


@pytest.mark.parametrize("way", ["clone", "before"])
def test_in_place_operations_that_nobody_notices_are_fine(way: str) -> None:
    model = Overwriting(way).double()
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(logits(steps(model, (1, 8, 8)), x), model(x).detach())


def test_a_sum_in_place_that_the_trace_does_not_show() -> None:
    """torch.fx sees z += x as z = z + x."""
    with pytest.raises(BoundError, match="Overwriting cannot be bounded: it computes something else than its steps do"):
        steps(Overwriting("+="), (1, 8, 8))


def test_steps_that_compute_something_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a flaw of this module took tanh for the sigmoid."""
    monkeypatch.setitem(traced._FUNCTIONS, torch.tanh, nn.Sigmoid)
    with pytest.raises(BoundError, match="Functions cannot be bounded: it computes something else than its steps do"):
        steps(Functions(), (1, 8, 8))


def test_channels_of_a_kaf_must_be_in_dimension_1() -> None:
    """By any number that says so; a single curve is the same wherever they are."""
    for channels, dim, shape in ((3, 1, (3, 4, 4)), (3, -3, (3, 4, 4)), (1, -1, (3, 4, 4)), (1, 2, (3, 4, 4))):
        network = steps(nn.Sequential(kafops.KAF(channels, channel_dim=dim, init="silu"), nn.Flatten()), shape)
        assert [step.operation.kind for step in network] == ["image", "activation", "flatten"]
    for dim in (-1, 3, -2, 2):
        model = nn.Sequential(kafops.KAF(4, channel_dim=dim), nn.Flatten())
        message = rf"0 of the network cannot be bounded: its channels are in dimension {dim} of \[1, 4, 4, 4\]; bounds"
        with pytest.raises(BoundError, match=message):
            steps(model, (4, 4, 4))


@pytest.mark.parametrize(("kernel", "dilation"), [(2, 1), (4, 1), (2, 3), (3, 2)])
def test_same_padding_puts_the_odd_pixel_behind(kernel: int, dilation: int) -> None:
    conv = nn.Conv2d(1, 2, kernel, padding="same", dilation=dilation).double()
    x = torch.rand(2, 1, 7, 7, dtype=torch.float64)
    model = nn.Sequential(conv, nn.Flatten())
    torch.testing.assert_close(logits(steps(model, (1, 7, 7)), x), model(x).detach(), rtol=1e-12, atol=1e-12)
