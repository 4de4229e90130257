"""Times learned activations of others beside kafops': `python -m bench.peers` fills the tables of docs/peers.md.

Each peer is its published formula in plain PyTorch, written here, eager and compiled, forward and backward pass by x
and all parameters, in float32 with one thread. A ratio is the median of pairs of neighbouring calls, of the peer and of
kafops' curves with as many numbers a channel; below 1 kafops loses.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kafops
from bench import machine, paired, problems
from bench.other_kernels import compare
from bench.points import peak_bytes
from bench.report import file_stem, quantity

ROOT = Path(__file__).parents[1]
SHAPE = (32, 32, 32, 32)
BATCH, INPUTS, OUTPUTS = 4096, 64, 64
BOUNDARY = problems.BOUNDARY

Function = Callable[..., Tensor]


def prelu(x: Tensor, slope: Tensor) -> Tensor:  # [N, C, *], [C]
    """He et al., "Delving deep into rectifiers", 2015."""
    return F.prelu(x, slope)


def rational(x: Tensor, coefficients: Tensor) -> Tensor:  # [N, C, *], [C, 10]
    """P(x) / (1 + |Q(x)|), P of degree 5, Q of degree 4 without constant.

    Molina et al., "Padé activation units", 2020, in the form that has no poles.
    """
    a = [c.view(-1, 1, 1) for c in coefficients.unbind(1)]
    over, under = a[5], a[9]
    for k in (4, 3, 2, 1, 0):
        over = over * x + a[k]
    for k in (8, 7, 6):
        under = under * x + a[k]
    return over / (1 + (under * x).abs())


def spline(x: Tensor, values: Tensor) -> Tensor:  # [N, C, *], [C, D]
    """A line between the values at the two knots around x, gathered; lines go on beyond the last.

    Bohra et al., "Learning activation functions in deep (spline) neural networks", 2020.
    """
    channels, knots = values.shape
    place = (x + BOUNDARY) * ((knots - 1) / (2 * BOUNDARY))
    k = place.detach().floor().clamp(0, knots - 2)
    index = k.long() + knots * torch.arange(channels).view(-1, 1, 1)
    left, right = (values.flatten().gather(0, i.flatten()).view_as(x) for i in (index, index + 1))
    return left + (place - k) * (right - left)


def radial(x: Tensor, weights: Tensor) -> Tensor:  # [N, C, *], [C, D]
    """Σ_k w_k exp(−(x − μ_k)² / 2σ²), σ = b / D: act_rbf of optox (Kobler et al., 2017), which ends at 4σ."""
    points = torch.linspace(-BOUNDARY, BOUNDARY, weights.shape[1])
    sigma = BOUNDARY / weights.shape[1]
    values = torch.exp(-((x.unsqueeze(-1) - points) ** 2) / (2 * sigma**2))
    return (weights[:, None, None] * values).sum(-1)


def fastkan(x: Tensor, weight: Tensor) -> Tensor:  # [B, I], [O, I, D]
    """All D Gaussians of each input, then a matmul.

    Li, "Kolmogorov-Arnold networks are radial basis function networks", 2024, without its LayerNorm and base.
    """
    points = torch.linspace(-BOUNDARY, BOUNDARY, weight.shape[2])
    step = 2 * BOUNDARY / (weight.shape[2] - 1)
    basis = torch.exp(-(((x.unsqueeze(-1) - points) / step) ** 2))
    return F.linear(basis.flatten(1), weight.flatten(1))


def kaf(x: Tensor, alpha: Tensor) -> Tensor:  # [N, C, *], [C, D]
    """The curves of kafops, with the default bandwidth."""
    return kafops.kaf(x, alpha, bandwidth(alpha.shape[-1]), BOUNDARY)


def kaf_as_radial(x: Tensor, alpha: Tensor) -> Tensor:  # [N, C, *], [C, D]
    """The same with the bandwidth of `radial`."""
    return kafops.kaf(x, alpha, torch.full((1,), (alpha.shape[1] / BOUNDARY) ** 2 / 2), BOUNDARY)


def kan(x: Tensor, alpha: Tensor) -> Tensor:  # [B, I], [O, I, D]
    """A layer y_o = Σ_i f_oi(x_i) of them, an output at a time, on rows of one channel each."""
    step = 2 * BOUNDARY / (alpha.shape[-1] - 1)
    gamma = torch.full((1,), 1 / step**2)  # FastKAN's
    x = x.t().contiguous().unsqueeze(0)  # [1, I, B]
    return torch.cat([kafops.kaf(x, a, gamma, BOUNDARY).sum(1) for a in alpha]).t()


def bandwidth(points: int) -> Tensor:
    """The default γ = 1/(6Δ²)."""
    step = 2 * BOUNDARY / (points - 1)
    return torch.full((1,), 1 / (6 * step**2))


@dataclass(frozen=True)
class Peer:
    """A formula, and the curves of kafops that it is compared with.

    Attributes:
        name, function: of the peer.
        shape: of x.
        numbers: shape of the peer's parameters.
        ours, our_numbers: what stands beside it, and the shape of its parameters.
    """

    name: str
    function: Function
    shape: tuple[int, ...]
    numbers: tuple[int, ...]
    ours: Function
    our_numbers: tuple[int, ...]


C = SHAPE[1]
PEERS = (
    Peer("`nn.PReLU`, a number a channel", prelu, SHAPE, (C,), kaf, (C, 20)),
    Peer("rational of order 5/4, 10 numbers", rational, SHAPE, (C, 10), kaf, (C, 10)),
    Peer("linear spline by gather, 20 knots", spline, SHAPE, (C, 20), kaf, (C, 20)),
    Peer("Gaussians as optox's, 20 points", radial, SHAPE, (C, 20), kaf_as_radial, (C, 20)),
    *(
        Peer(f"FastKAN layer 64 → 64, {d} points", fastkan, (BATCH, INPUTS), (OUTPUTS, INPUTS, d), kan,
             (OUTPUTS, INPUTS, d))
        for d in (8, 20)
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One peer, eager or compiled: seconds and bytes of it and of kafops, and peer / kafops by neighbours."""

    peer: str
    compiled: bool
    numbers: int
    our_numbers: int
    seconds: paired.Spread
    our_seconds: paired.Spread
    ratio: paired.Spread
    kept: int
    our_kept: int
    peak: int
    our_peak: int


def passes(f: Function, shape: tuple[int, ...], numbers: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """Return the forward and backward pass of f, of the same x ~ N(0, 1) for the same shape."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw).requires_grad_()
    parameters = (0.3 * torch.randn(numbers, generator=draw)).requires_grad_()
    grad = torch.randn(f(x, parameters).shape, generator=draw)
    return lambda: torch.autograd.grad(f(x, parameters), (x, parameters), grad)


def rows(rounds: int) -> Iterator[Row]:
    """Measure each peer, eager and compiled."""
    for peer in PEERS:
        ours = passes(peer.ours, peer.shape, peer.our_numbers)
        of_ours = problems.kept_bytes(ours), peak_bytes(ours)
        for function in (peer.function, torch.compile(peer.function, dynamic=False)):
            theirs = passes(function, peer.shape, peer.numbers)
            kept, peak = problems.kept_bytes(theirs), peak_bytes(theirs)
            taken, our_taken = compare(theirs, ours, rounds)
            yield Row(
                peer.name, function is not peer.function, torch.Size(peer.numbers).numel(),
                torch.Size(peer.our_numbers).numel(), paired.spread(taken), paired.spread(our_taken),
                paired.ratios(taken, our_taken), kept, of_ours[0], peak, of_ours[1],
            )  # fmt: skip


def table(measured: list[Row]) -> str:
    """Return the rows in Markdown."""
    lines = [
        "| | | peer | kafops | peer / kafops | kept for backward: peer | kafops | most at once: peer | kafops |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in measured:
        median, p20, p80 = (f"{v:.2g}" if v < 99 else f"{v:.0f}" for v in (r.ratio.median, r.ratio.p20, r.ratio.p80))
        ratio = f"{median} ({p20} to {p80})"
        cells = [
            "" if r.compiled else r.peer,
            "compiled" if r.compiled else "eager",
            quantity(r.seconds.median, "s"),
            quantity(r.our_seconds.median, "s"),
            f"**{ratio}**" if r.ratio.median < 1 else ratio,
            *(quantity(n, "B") for n in (r.kept, r.our_kept, r.peak, r.our_peak)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def described(at: dict[str, Any]) -> str:
    """Say where it was measured."""
    return (
        f"On {at['processor']} ({at['backend']}), {at['threads']} thread,\n"
        f"torch {at['torch']}, kafops {at['kafops']} at {at['commit'][:10]}, {at['date']}; "
        f"load average {at['load']:.1f} at the start."
    )


def put(page: str, text: str) -> str:
    """Return the page with the text between its two marks."""
    head, begin, rest = page.partition("<!-- python -m bench.peers -->\n")
    _, end, tail = rest.partition("<!-- end -->\n")
    return f"{head}{begin}\n{text}\n\n{end}{tail}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write page and results."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="pairs of calls (default 15)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, printed and not written")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {options.rounds}")
    with problems.threads(1):
        at, measured = machine.describe(), list(rows(3 if options.quick else options.rounds))
    text = f"{table(measured)}\n\n{described(at)}"
    print(text)
    if options.quick:
        return
    page = ROOT / "docs/peers.md"
    page.write_text(put(page.read_text(encoding="utf-8"), text), encoding="utf-8")
    results = ROOT / "bench/results" / f"peers-{file_stem(at)}.json"
    results.write_text(json.dumps({"machine": at, "rows": list(map(asdict, measured))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
