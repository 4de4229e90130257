"""Time and memory of one training step of the same network with different implementations of its activation.

A step is forward, cross-entropy, backward and optimizer on one clean batch. Implementations take turns, so that a
change of the machine's speed meets all of them, and ratios are within one run. Memory is what autograd keeps between
forward and backward: the bytes of all distinct storages that it saves, parameters and buffers left out.
"""

import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kafops
from models.images import MNIST
from models.networks import build

Curve = Callable[[Tensor, Tensor, Tensor, float], Tensor]
Step = Callable[[], None]

ROUNDS = 5
TURNS = {"reference": 1, "compiled": 1, "fused": 3, "relu": 3}  # steps per round: quick ones vary more
IMPLEMENTATIONS = tuple(TURNS)


class CurveBy(nn.Module):
    """A KAF layer's curves computed by a given function with the signature of `kafops.kaf`."""

    def __init__(self, layer: kafops.KAF, function: Curve) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        """Apply each channel's curve."""
        return self.function(x, self.layer.alpha, self.layer.bandwidths(), self.layer.boundary)


def measure(
    implementations: tuple[str, ...],
    batch_size: int,
    width: int,
    seed: int,
    on_step: Callable[[str], None] = lambda implementation: None,
) -> dict[str, Any]:
    """Return for each implementation its seconds per step, median, spread, kept bytes and ratios to ReLU's, or why not.

    Implementations: "relu", and of a KAF network's curves "fused" (`kafops.kaf`), "reference" (plain PyTorch) and
    "compiled" (torch.compile of the reference), whose first step compiles and is not timed.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it reports that there is no GPU
    images = torch.rand(batch_size, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(batch_size) % 10
    steps: dict[str, Step] = {}
    results: dict[str, dict[str, Any]] = {}
    for name in implementations:
        try:
            network = _network(name, width, seed)
            start = time.perf_counter()
            kept = kept_bytes(network, images, labels)
            step = _step(network, images, labels)
            step()
            steps[name] = step
            results[name] = {"kept_bytes": kept, "first_step_seconds": time.perf_counter() - start, "seconds": []}
        except Exception as error:  # a compiler can fail in any way, and the rest is worth having
            if name != "compiled":
                raise
            results[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        on_step(name)
    for _ in range(ROUNDS):
        for name, step in steps.items():
            for _ in range(TURNS[name]):
                start = time.perf_counter()
                step()
                results[name]["seconds"].append(time.perf_counter() - start)
                on_step(name)
    return {
        "batch_size": batch_size,
        "width": width,
        "threads": torch.get_num_threads(),
        "implementations": {name: _summary(result, results.get("relu", {})) for name, result in results.items()},
    }


def expected_steps(implementations: tuple[str, ...]) -> int:
    """Return how often `measure` calls `on_step` when nothing fails."""
    return sum(1 + ROUNDS * TURNS[name] for name in implementations)


def kept_bytes(network: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Count the bytes that autograd keeps after a forward pass: distinct storages, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    kept: dict[int, Tensor] = {}  # the tensors are held, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        F.cross_entropy(network(images), labels)
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


def _network(implementation: str, width: int, seed: int) -> nn.Module:
    if implementation == "relu":
        return build(f"resnet20:width={width}", "relu", MNIST, seed)
    functions: dict[str, Callable[[], Curve]] = {
        "fused": lambda: kafops.kaf,
        "reference": lambda: kafops.reference.kaf,
        "compiled": lambda: torch.compile(kafops.reference.kaf, dynamic=True),
    }
    function = functions[implementation]()
    return build(
        f"resnet20:width={width}",
        lambda channels: CurveBy(kafops.KAF2d(channels, init="isometric"), function),
        MNIST,
        seed,
    )


def _step(network: nn.Module, images: Tensor, labels: Tensor) -> Step:
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def _summary(result: dict[str, Any], relu: dict[str, Any]) -> dict[str, Any]:
    if "error" in result:
        return result
    median = statistics.median(result["seconds"])
    summary = {**result, "median_seconds": median, "spread_seconds": [min(result["seconds"]), max(result["seconds"])]}
    if "seconds" in relu:
        summary["time_ratio"] = median / statistics.median(relu["seconds"])
        summary["memory_ratio"] = result["kept_bytes"] / relu["kept_bytes"]
    return summary
