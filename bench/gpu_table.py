"""What is timed on a GPU: kernels on maps of networks, the host's part of a call, training steps of a ResNet50."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kafops
from bench import problems
from bench.paired import Work
from kafops import bases, kernels
from kafops.ops import Needs

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Tensors as large as x that each must read or write.
PASSES = {
    "forward": 2,
    "backward of x": 3,
    "backward of x, alpha": 3,
    "backward of all": 3,
    "double backward": 5,
}
LARGE = (64, 256, 56, 56)  # of a ResNet50
SMALL = ((128, 16, 32, 32), (64, 2048, 7, 7), (64, 512, 14, 14))
COPY, SILU = "copy", "F.silu"


@dataclass(frozen=True)
class Case:
    """One call of a kernel."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    what: str = "forward"
    size: int = problems.DICTIONARY_SIZE  # D
    free: bool = False
    kernel: str = "gaussian"
    base: str | None = None

    @property
    def title(self) -> str:
        more = [f"D = {self.size}"] * (self.size != problems.DICTIONARY_SIZE) + ["free dictionary"] * self.free
        more += [self.kernel] * (self.kernel != "gaussian") + [f"base {self.base}"] * (self.base is not None)
        return ", ".join((self.what, *more))

    def works(self, device: str) -> tuple[Work, dict[str, Work]]:
        """Return kafops' call, and what it is compared with by name: a copy, and F.silu where it has the like."""
        generator = torch.Generator(device).manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        def data() -> Tensor:
            return randn(*self.shape).to(getattr(torch, self.dtype)).contiguous(memory_format=LAYOUTS[self.layout])

        x, grad, channels, boundary = data(), data(), self.shape[1], problems.BOUNDARY
        step = 2 * boundary / (self.size - 1)
        alpha = problems.ALPHA_STD * randn(channels, self.size)
        gamma = torch.full((channels,), 1 / (6 * step**2), device=device)
        points = torch.linspace(-boundary, boundary, self.size, device=device)
        dictionary = points + 0.3 * step * randn(channels, self.size) if self.free else None
        curve = (x, alpha, gamma, dictionary, 0.0 if self.free else boundary)
        operators = torch.ops.kafops
        kappa, base = kernels.named(self.kernel).code, bases.code(self.base)
        every = Needs.X | Needs.ALPHA | Needs.GAMMA | (Needs.DICTIONARY if self.free else 0)
        needs = {"backward of x": Needs.X, "backward of x, alpha": Needs.X | Needs.ALPHA, "backward of all": every}
        calls: dict[str, Work] = {
            "forward": lambda: operators.kaf(*curve, kappa, base),
            "double backward": lambda: operators.kaf_double_backward(
                grad, None, None, None, grad, *curve, Needs.X | Needs.ALPHA | Needs.GRAD, base
            ),
        }
        call = calls.get(self.what) or (lambda: operators.kaf_backward(grad, *curve, needs[self.what], kappa, base))
        to = torch.empty_like(x)
        others: dict[str, Work] = {COPY: lambda: to.copy_(x)}
        if self.what == "forward":
            others[SILU] = lambda: F.silu(x)
        elif self.what.startswith("backward"):
            others[SILU] = lambda: torch.ops.aten.silu_backward(grad, x)
        return call, others


def _first() -> list[Case]:
    forms = [(LARGE, d, layout) for d in ("float32", "bfloat16") for layout in LAYOUTS]
    forms += [(shape, d, "contiguous") for shape in SMALL for d in ("float32", "bfloat16")]
    return [Case(*form, what=what) for form in forms for what in ("forward", "backward of x, alpha")]


def _rest() -> list[Case]:
    large = functools.partial(Case, LARGE)
    both = ("forward", "backward of x, alpha")
    return [
        *(large("float16", layout, what) for layout in LAYOUTS for what in both),
        *(large(d, layout, "backward of x") for d in ("float32", "bfloat16") for layout in LAYOUTS),
        *(large(what=what, base="gelu") for what in both),
        *(large(what=what, size=64) for what in both),
        *(large(what=what, free=True) for what in ("forward", "backward of all")),
        *(large(what=what) for what in ("backward of all", "double backward")),
        *(Case((64, 64, 224, 224), d, what=what) for d in ("float32", "bfloat16") for what in both),
        *(Case((65536, 1024), d, what=what) for d in ("float32", "bfloat16") for what in both),
        *(large("bfloat16", what=what) for what in ("backward of all", "double backward")),
        *(large(what=what, kernel="rational_quadratic") for what in both),
    ]


FIRST, REST = _first(), _rest()

Activation = Callable[[int], nn.Module]  # channels -> layer
ACTIVATIONS: dict[str, Activation] = {
    "nn.ReLU": lambda channels: nn.ReLU(inplace=True),
    "KAF2d": lambda channels: kafops.KAF2d(channels),
    "nn.SiLU": lambda channels: nn.SiLU(),
    "nn.PReLU": lambda channels: nn.PReLU(channels),
}
RELU, KAF = "nn.ReLU", "KAF2d"


def resnet50(activation: Activation, **options: Any) -> nn.Module:
    """Make torchvision's ResNet50 with an activation of its own at each of its 49 places.

    A block has one nn.ReLU for maps of different channels, so its forward is written anew.
    """
    from torchvision.models import resnet

    def forward(block: Any, x: Tensor) -> Tensor:
        out = block.act1(block.bn1(block.conv1(x)))
        out = block.act2(block.bn2(block.conv2(out)))
        shortcut = x if block.downsample is None else block.downsample(x)
        return block.act3(block.bn3(block.conv3(out)) + shortcut)

    network = resnet.resnet50(**options)
    network.relu = activation(64)
    for block in network.modules():
        if isinstance(block, resnet.Bottleneck):
            width = block.conv1.out_channels
            del block.relu
            block.act1, block.act2, block.act3 = activation(width), activation(width), activation(4 * width)
            block.forward = functools.partial(forward, block)
    return network


@dataclass(frozen=True)
class Training:
    """Steps of SGD: forward under autocast, backward, update."""

    batch: int = 128
    side: int = 224
    dtype: str = "bfloat16"
    layout: str = "channels_last"

    def step(self, activation: Activation, device: str, compiled: bool = False) -> Work:
        """Return the call that makes one step of a ResNet50."""
        torch.manual_seed(0)
        layout = LAYOUTS[self.layout]
        network = resnet50(activation).to(device).to(memory_format=layout)
        optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9)
        images = torch.randn(self.batch, 3, self.side, self.side, device=device).contiguous(memory_format=layout)
        classes = torch.randint(1000, (self.batch,), device=device)
        call = torch.compile(network, fullgraph=True) if compiled else network
        dtype = getattr(torch, self.dtype)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(call(images), classes)
            loss.backward()
            optimizer.step()

        return step
