"""What is timed on a GPU: the maps that three networks hand to their activations, and what kafops is compared with.

    network     batch   maps as channels × side², in the order of the network
    ResNet20    128     16×32  32×16  64×8, for CIFAR
    ResNet50    64      64×112 | 64×56 256×56 | 128×56 128×28 512×28 | 256×28 256×14 1024×14 | 512×14 512×7 2048×7
    VGG16       64      64×224  128×112  256×56  512×28  512×14, the features' (its classifier's are too small to time)

ResNet50 is torchvision's, which halves a map in a block's 3×3 convolution, so that a stage's first 1×1 convolution
still has the side of the stage before it. Maps that two networks share are timed once.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import kafops
from bench import problems
from bench.problems import Curve, Problem
from bench.table import BOTH, FORWARD, Baseline, of_curve, of_function

Shape = tuple[int, int, int, int]  # [N, C, H, W]


@dataclass(frozen=True)
class Network:
    """A network's batch and its distinct maps, as (channels, side)."""

    batch: int
    maps: tuple[tuple[int, int], ...]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple((self.batch, channels, side, side) for channels, side in self.maps)


NETWORKS = {
    "ResNet20": Network(128, ((16, 32), (32, 16), (64, 8))),
    "ResNet50": Network(
        64,
        (
            (64, 112),
            (64, 56), (256, 56),
            (128, 56), (128, 28), (512, 28),
            (256, 28), (256, 14), (1024, 14),
            (512, 14), (512, 7), (2048, 7),
        ),
    ),
    "VGG16": Network(64, ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14))),
}  # fmt: skip
# One of the largest maps of each network.
LARGEST: dict[str, Shape] = {
    "ResNet50": (64, 256, 56, 56),
    "VGG16": (64, 64, 224, 224),
    "ResNet20": (128, 16, 32, 32),
}
DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = {mode.name: mode for mode in (FORWARD, BOTH)}


@dataclass(frozen=True)
class Case:
    """One input of an activation, and what is asked of it."""

    network: str
    shape: Shape
    dtype: str
    layout: str
    mode: str

    def __str__(self) -> str:
        return f"{self.network} {self.shape} {self.dtype} {self.layout}, {self.mode}"

    @property
    def bytes_moved(self) -> int:
        """The least that a fused implementation reads and writes: forward 2 passes over x, backward 3 more."""
        return MODES[self.mode].passes * self.bytes_of_x

    @property
    def bytes_of_x(self) -> int:
        return functools.reduce(int.__mul__, self.shape) * getattr(torch, self.dtype).itemsize

    def problem(self, device: str) -> Problem:
        """Make x ~ N(0, 1), dL/dy ~ N(0, 1) and alpha ~ N(0, 0.8²), the same for the same arguments."""
        generator = torch.Generator(device).manual_seed(0)
        channels, d = self.shape[1], problems.DICTIONARY_SIZE

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        def data() -> Tensor:
            return randn(*self.shape).to(getattr(torch, self.dtype)).contiguous(memory_format=LAYOUTS[self.layout])

        step = 2 * problems.BOUNDARY / (d - 1)
        alpha = (problems.ALPHA_STD * randn(channels, d)).requires_grad_()
        gamma = torch.full((channels,), 1 / (6 * step**2), device=device)
        return Problem(data().requires_grad_(), data(), (alpha, gamma))


@functools.cache
def _compiled(curve: Curve) -> Curve:
    # Whole graphs only: where PyTorch gives up compiling for ever more shapes, it shall raise, not run uncompiled.
    return torch.compile(curve, dynamic=False, fullgraph=True)


def two_exponentials(x: Tensor, alpha: Tensor, gamma: Tensor, boundary: float) -> Tensor:
    """Compute the formula in float32 for a half-precision x, and return x's dtype as kafops does."""
    return problems.two_exponentials(x, alpha, gamma, boundary).to(x.dtype)


def _prelu_problem(p: Problem) -> Problem:
    return p.of(p.x.new_full(p.x.shape[1:2], 0.25).requires_grad_())  # F.prelu wants the dtype of x


REFERENCE = Baseline("reference", of_curve(lambda: kafops.reference.kaf), True)
SILU = Baseline("F.silu", of_function(F.silu))
RELU = Baseline("F.relu", of_function(F.relu))
PRELU = Baseline("nn.PReLU", lambda mode, p: mode.call(F.prelu, _prelu_problem(p)))
COMPILED = Baseline("reference, torch.compile", of_curve(lambda: _compiled(kafops.reference.kaf)), True)
TWO_EXPONENTIALS = Baseline(
    "two-exponential formula, torch.compile", of_curve(lambda: _compiled(two_exponentials)), True
)
# Compiling takes many seconds for every case, so the compiled baselines are measured apart, and last.
GROUPS = {"plain": (REFERENCE, SILU, RELU, PRELU), "compiled": (COMPILED, TWO_EXPONENTIALS)}
BASELINES = tuple(baseline for group in GROUPS.values() for baseline in group)


@dataclass(frozen=True)
class Row:
    """A case, and the baselines that take turns with kafops on it."""

    case: Case
    group: str

    @property
    def key(self) -> str:
        return f"{self.case}, {self.group}"


def _largest(network: str, layouts: tuple[str, ...]) -> list[Case]:
    return [
        Case(network, LARGEST[network], dtype, layout, mode)
        for layout in layouts
        for dtype in ("float32", "bfloat16")
        for mode in MODES
    ]


def _all_cases() -> list[Case]:
    networks = {shape: name for name in reversed(NETWORKS) for shape in NETWORKS[name].shapes}  # the first to have it
    shapes = [shape for network in NETWORKS.values() for shape in network.shapes]
    cases = [
        Case(networks[shape], shape, dtype, layout, mode)
        for layout in LAYOUTS
        for dtype in DTYPES
        for shape in dict.fromkeys(shapes)
        for mode in MODES
    ]
    return [*cases, *(Case("ResNet20", LARGEST["ResNet20"], "float64", "contiguous", mode) for mode in MODES)]


def _rows() -> tuple[list[Row], list[Row]]:
    contiguous = [case for network in LARGEST for case in _largest(network, ("contiguous",))]
    last = _largest("ResNet50", ("channels_last",))
    first = [Row(c, "plain") for c in (*contiguous, *last)] + [Row(c, "compiled") for c in contiguous]
    every = [Row(c, group) for group in GROUPS for c in _all_cases()]
    return first, list(dict.fromkeys((*first, *every)))


# The most important come first, and are enough for a result; ROWS are all.
FIRST_ROWS, ROWS = _rows()
