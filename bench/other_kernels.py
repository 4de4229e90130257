"""Times the kernels other than the Gaussian: `python -m bench.other_kernels` prints the table of docs/other-kernels.md.

On x [32, 32, 32, 32] in float32 with D = 20 and one thread, a layer's forward pass, and forward and backward pass (by x
and alpha), against F.silu and against the plain PyTorch reference of the same kernel. Each ratio is the median of pairs
of neighbours.
"""

import argparse
import time
from collections.abc import Callable

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


def compare(candidate: Work, baseline: Work, rounds: int) -> tuple[float, float]:
    """Return the median of candidate / baseline, of calls in turn, and the median of the candidate's milliseconds."""
    seconds(baseline), seconds(candidate)  # not yet warm
    pairs = [(seconds(candidate), seconds(baseline)) for _ in range(rounds)]
    ours, theirs = zip(*pairs, strict=True)
    return paired.ratios(ours, theirs).median, 1e3 * paired.spread(ours).median


def passes(f: Callable[[], Tensor], leaves: tuple[Tensor, ...], grad: Tensor) -> tuple[Work, Work]:
    """Return the forward pass of f without derivatives, and the forward and backward pass."""

    def forward() -> object:
        with torch.no_grad():
            return f()

    return forward, lambda: torch.autograd.grad(f(), leaves, grad)


def row(kernel: str, rounds: int) -> str:
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
        ratio, milliseconds = compare(candidate, smooth, rounds)
        faster = 1 / compare(candidate, slow, max(3, rounds // 5))[0]
        cells += [f"{milliseconds:.1f} ms", f"{ratio:.1f}", f"{faster:.0f}"]
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.other_kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="pairs of calls (default 15)")
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
