"""Times the kernels other than the Gaussian: `python -m bench.other_kernels` prints the table of docs/other-kernels.md.

On x [32, 32, 32, 32] in float32 with D = 20 and one thread, a layer's forward pass, and forward and backward pass (by x
and alpha), against F.silu and against the plain PyTorch reference of the same kernel. Each ratio is the median of pairs
of neighbours, with the 20th and 80th percentile.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kafops
from bench import paired, problems

SHAPE = (32, 32, 32, 32)
DICTIONARY_SIZE = 20

Work = Callable[[], object]


def seconds(work: Work) -> float:
    """Time one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(candidate: Work, baseline: Work, rounds: int) -> tuple[list[float], list[float]]:
    """Return the seconds of candidate and baseline, which take turns."""
    seconds(baseline), seconds(candidate)  # not yet warm
    pairs = [(seconds(candidate), seconds(baseline)) for _ in range(rounds)]
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]


def shown(numerators: list[float], denominators: list[float], form: str) -> str:
    """Return the median ratio of the pairs, with the 20th and 80th percentile."""
    ratio = paired.ratios(numerators, denominators)
    return f"{ratio.median:{form}} ({ratio.p20:{form}} to {ratio.p80:{form}})"


def passes(f: Callable[[], Tensor], leaves: tuple[Tensor, ...], grad: Tensor) -> tuple[Work, Work]:
    """Return the forward pass of f without derivatives, and the forward and backward pass."""

    def forward() -> object:
        with torch.no_grad():
            return f()

    return forward, lambda: torch.autograd.grad(f(), leaves, grad)


def row(kernel: Any, rounds: int) -> str:
    """Return a line of the table."""
    torch.manual_seed(0)
    x = torch.randn(SHAPE, requires_grad=True)
    grad = torch.randn(SHAPE)
    layer = kafops.KAF2d(SHAPE[1], DICTIONARY_SIZE, kernel=kernel)
    leaves = (x, layer.alpha)
    gamma, boundary = layer.bandwidths(), layer.boundary
    ours = passes(lambda: layer(x), leaves, grad)
    silu = passes(lambda: F.silu(x), (x,), grad)
    plain = passes(lambda: kafops.reference.kaf(x, layer.alpha, gamma, boundary, kernel), leaves, grad)
    cells = [f"`{kernel}`"]
    for candidate, smooth, slow in zip(ours, silu, plain, strict=True):
        taken, of_silu = compare(candidate, smooth, rounds)
        cells += [f"{1e3 * paired.spread(taken).median:.1f} ms", shown(taken, of_silu, ".1f")]
        taken, of_reference = compare(candidate, slow, max(5, rounds // 4))
        cells.append(shown(of_reference, taken, ".0f"))
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.other_kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="pairs of calls (default 40)")
    rounds = parser.parse_args(arguments).rounds
    if rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {rounds}")
    print("| kernel | forward | / `F.silu` | reference / it | forward + backward | / `F.silu` | reference / it |")
    print("|---|---|---|---|---|---|---|")
    with problems.threads(1):
        for kernel in kafops.kernels.KERNELS:
            print(row(kernel, rounds), flush=True)


if __name__ == "__main__":
    main()
