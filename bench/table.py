"""The rows of the table: what is timed, against which baseline, and the target it must reach."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kafops
from bench import points, problems
from bench.problems import Call, Curve, Problem


@dataclass(frozen=True)
class Pair:
    """Two calls to be timed in turn."""

    candidate: Call
    baseline: Call
    calls: int = 1  # per timed round
    bytes_moved: int | None = None  # the least that the candidate must move
    exact: Callable[[], tuple[Tensor, ...]] | None = None  # what the candidate returns, in float64
    same_function: bool = False  # whether the baseline returns the same


@dataclass(frozen=True)
class Row:
    """One comparison. `limit` is the most that candidate / baseline may be to meet the target; None: for context."""

    key: str
    what: str
    baseline: str
    limit: float | None
    make: Callable[[], Pair]
    rounds: int = 60


@dataclass(frozen=True)
class Mode:
    """A way to call a curve, and the passes over tensors as large as x that it cannot avoid."""

    name: str
    call: Callable[[Curve, Problem], Call]
    passes: int


@dataclass(frozen=True)
class Baseline:
    """What kafops is compared with: its call, whether it computes the same function, how many rounds it can afford."""

    name: str
    call: Callable[[Mode, Problem], Call]
    same_function: bool = False
    rounds: int = 60


def of_curve(curve: Callable[[], Curve]) -> Callable[[Mode, Problem], Call]:
    """Make a baseline that takes the same parameters as kafops."""
    return lambda mode, p: mode.call(curve(), p)


def of_function(function: Curve, *parameters: Callable[[], Tensor]) -> Callable[[Mode, Problem], Call]:
    """Make a baseline of another activation, with parameters of its own."""
    return lambda mode, p: mode.call(function, p.of(*(make() for make in parameters)))


def prelu_weight() -> Tensor:
    return torch.full(problems.SHAPE[1:2], 0.25, requires_grad=True)


def one_thread(mode: Mode, p: Problem) -> Call:
    call = mode.call(kafops.kaf, p)

    def alone() -> tuple[Tensor, ...]:
        with problems.threads(1):
            return call()

    return alone


FORWARD = Mode("forward", problems.forward, problems.FORWARD)
BOTH = Mode("forward + backward", problems.forward_backward, problems.FORWARD_BACKWARD)
PENALTY = Mode("gradient penalty (double backward)", problems.gradient_penalty, problems.GRADIENT_PENALTY)

EAGER = Baseline("reference", of_curve(lambda: kafops.reference.kaf), True, rounds=5)
COMPILED = Baseline(
    "reference, torch.compile", of_curve(lambda: problems.compiled(kafops.reference.kaf)), True, rounds=12
)
COMPILED_FREE = Baseline(
    "reference, torch.compile", of_curve(lambda: problems.compiled(kafops.reference.kaf_free)), True, rounds=12
)
TWO_EXPONENTIALS = Baseline(
    "two-exponential formula, torch.compile", of_curve(lambda: problems.compiled(problems.two_exponentials)), True
)
PRELU = Baseline("nn.PReLU(32)", of_function(F.prelu, prelu_weight))
SILU = Baseline("F.silu", of_function(F.silu))
RELU = Baseline("F.relu", of_function(F.relu))
FLOAT32 = Baseline("kafops, contiguous float32", lambda mode, p: mode.call(kafops.kaf, problems.problem()))
TWENTY = Baseline("kafops, D = 20", FLOAT32.call)
ONE_THREAD = Baseline("kafops, 1 thread", one_thread)


def of_case(name: str, **case: Any) -> Baseline:
    """Make kafops on another problem the baseline."""
    return Baseline(name, lambda mode, p: mode.call(kafops.kaf, problems.problem(**case)))


def kaf_row(mode: Mode, baseline: Baseline, limit: float | None, variant: str = "", **case: Any) -> Row:
    """Compare a call of kafops on `problems.problem(**case)` with a baseline."""

    def make() -> Pair:
        p = problems.problem(**case)
        return Pair(
            mode.call(kafops.kaf_free if case.get("free") else kafops.kaf, p),
            baseline.call(mode, p),
            bytes_moved=p.passes(mode.passes),
            exact=lambda: problems.exact(mode.call, p),
            same_function=baseline.same_function,
        )

    what = f"{mode.name}, {variant}" if variant else mode.name
    return Row(f"{what} / {baseline.name}", what, baseline.name, limit, make, baseline.rounds)


def small_call() -> Pair:
    """Forward and backward of a small layer, where the time is PyTorch's and ours outside the loops."""
    x = torch.randn(problems.SMALL_SHAPE, requires_grad=True)
    grad = torch.randn(problems.SMALL_SHAPE)

    def call(layer: nn.Module) -> Call:
        leaves = (x, *layer.parameters())
        return lambda: torch.autograd.grad(layer(x), leaves, grad)

    channels = problems.SMALL_SHAPE[1]
    return Pair(call(kafops.KAF2d(channels)), call(nn.PReLU(channels)), calls=100)


def empty_call() -> Pair:
    """Forward and backward of no elements: what a call costs that computes nothing."""
    x = torch.empty(0, problems.SMALL_SHAPE[1], requires_grad=True)
    layers = kafops.KAF(x.shape[1]), nn.PReLU(x.shape[1])

    def call(layer: nn.Module) -> Call:
        leaves = (x, *layer.parameters())
        return lambda: torch.autograd.grad(layer(x), leaves, x.detach())

    return Pair(call(layers[0]), call(layers[1]), calls=100)


def trainings() -> ModuleType:
    """Return what times the application: only its rows import it."""
    from bench import trainings

    return trainings


def channels_last_rows() -> tuple[Row, ...]:
    """Compare channels_last with contiguous for numbers of channels that fill registers, and that do not."""
    last = torch.channels_last
    return tuple(
        kaf_row(mode, of_case(f"contiguous, {c} channels", shape=shape), 1.5, f"channels_last, {c} channels",
                shape=shape, memory_format=last)
        for c in (20, 24, 40, 48)
        for shape in ((128, c, 32, 32),)
        for mode in (FORWARD, BOTH)
    )  # fmt: skip


def laplacian_bytes() -> tuple[int, int]:
    """Return the most bytes held by a step with the Laplacian of a KAF network, and of one with tanh."""
    return tuple(points.peak_bytes(points.laplacian_step(a)) for a in (points.kaf, nn.Tanh))  # type: ignore[return-value]


def kept_bytes() -> tuple[int, int]:
    """Return the bytes that kafops keeps for backward, and those of x and the parameters."""
    p = problems.problem()
    kept = problems.kept_bytes(lambda: kafops.kaf(*p.arguments()))
    return kept, sum(t.nbytes for t in (p.x, *p.parameters))


TARGETS = (
    kaf_row(BOTH, COMPILED, 1 / 50),
    kaf_row(BOTH, TWO_EXPONENTIALS, 1 / 2.5),
    kaf_row(BOTH, PRELU, 1),
    kaf_row(FORWARD, SILU, 3),
    kaf_row(BOTH, SILU, 3.5),
    kaf_row(FORWARD, FLOAT32, 1.5, "channels_last", memory_format=torch.channels_last),
    kaf_row(BOTH, FLOAT32, 1.5, "channels_last", memory_format=torch.channels_last),
    *channels_last_rows(),
    *(
        kaf_row(mode, of_case(f"one γ, {name}", memory_format=layout), 1.2, f"γ by channel, {name}",
                gamma_by_channel=True, memory_format=layout)
        for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last))
        for mode in (FORWARD, BOTH)
    ),
    *(
        kaf_row(BOTH, of_case("no base"), limit, f"base {base}", base=base)
        for base, limit in (("identity", 1.1), ("relu", 1.1), ("silu", 1.35), ("gelu", 1.35))
    ),
    *(
        kaf_row(mode, of_case("(8, 256, 32, 32) in channels_last", shape=(8, 256, 32, 32),
                              memory_format=torch.channels_last), 1.1, "(8192, 256), channel_dim=-1",
                shape=(8192, 256), channel_dim=-1)
        for mode in (FORWARD, BOTH)
    ),
    kaf_row(FORWARD, FLOAT32, 1.3, "bfloat16", dtype=torch.bfloat16),
    kaf_row(BOTH, FLOAT32, 1.3, "bfloat16", dtype=torch.bfloat16),
    kaf_row(FORWARD, FLOAT32, 1.3, "float16", dtype=torch.float16),
    kaf_row(BOTH, FLOAT32, 1.3, "float16", dtype=torch.float16),
    kaf_row(FORWARD, TWENTY, 3.2, "D = 64", dictionary_size=64),
    kaf_row(BOTH, TWENTY, 3.2, "D = 64", dictionary_size=64),
    kaf_row(BOTH, COMPILED_FREE, 1 / 15, "free dictionary", free=True),
    kaf_row(PENALTY, EAGER, 1 / 100),
    Row("small call", "forward + backward, KAF2d on (8, 16, 8, 8)", "nn.PReLU(16)", 2, small_call),
    Row("empty call", "forward + backward of no elements, KAF(16)", "nn.PReLU(16)", 1.6, empty_call),
    Row(
        "laplacian", "Laplacian of a 3×64 network at 4096 points, training step", "the same with tanh", 4,
        lambda: Pair(points.laplacian_step(points.kaf), points.laplacian_step(nn.Tanh)), 10,
    ),
    Row(
        "vmap", "vmap(grad(network)) at 4096 points", "the gradient of the batch", 2,
        lambda: Pair(points.gradients_by_vmap(), points.gradients_of_a_batch()), 20,
    ),
    Row(
        "training step", "ResNet20 training step, batch 128, 3×32×32", "the same with ReLU", 1.15,
        lambda: Pair(trainings().step("kaf_isometric"), trainings().step("relu")), 20,
    ),
    kaf_row(BOTH, ONE_THREAD, 1 / 1.6, "2 threads"),
    Row(
        "adversarial epoch", "ResNet20 epoch of fast adversarial training", "the same with ReLU", 1.15,
        lambda: Pair(trainings().epoch("kaf_isometric"), trainings().epoch("relu")), 10,
    ),
    Row(
        "adversarial epoch / clean", "KAF ResNet20 epoch of fast adversarial training", "a clean epoch", 2.2,
        lambda: Pair(trainings().epoch("kaf_isometric"), trainings().epoch("kaf_isometric", "standard")), 10,
    ),
    Row(
        "epoch with loading", "KAF ResNet20 clean epoch, images cropped and flipped", "batches made beforehand", 1.1,
        lambda: Pair(
            trainings().epoch("kaf_isometric", "standard"),
            trainings().epoch("kaf_isometric", "standard", lambda: trainings().Made(trainings().source())),
        ), 10,
    ),
    Row(
        "PGD on 2 threads", "PGD-10 on 128 images 3×32×32, KAF ResNet20, 2 threads", "1 thread", 1 / 1.4,
        lambda: Pair(trainings().attack(2), trainings().attack(1)), 8,
    ),
)  # fmt: skip
BYTES = {
    ("kept bytes", "bytes kept for backward", "bytes of x and the parameters", 1.0): kept_bytes,
    ("laplacian bytes", "Laplacian of a 3×64 network, bytes held at once", "the same with tanh", 2.0): laplacian_bytes,
}
CONTEXT = (
    *(kaf_row(FORWARD, baseline, None) for baseline in (EAGER, COMPILED, TWO_EXPONENTIALS, PRELU, RELU)),
    *(kaf_row(BOTH, baseline, None) for baseline in (EAGER, RELU)),
)
