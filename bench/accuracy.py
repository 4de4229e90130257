"""`python -m bench.accuracy`: largest errors in float32 against float64, of kafops and of the eager reference.

Every error is relative to S, the largest sum of the absolute values of a value's terms (Σ|α|K for y, Σ|g|K for the
gradient of alpha), and is printed in units of u S, u = 2^-24: one rounding of the largest term.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import kafops
from kafops import reference
from kafops.accuracy import Problem, conditioning, values

SIZES = (1, 2, 5, 20, 33, 64, 128)  # D
SPACINGS = (1 / 8, 1 / 6, 1 / 2, 2.0, 8.0)  # γΔ²
BOUNDARY, ELEMENTS, CHANNELS = 3.0, 4000, 4


def problem(size: int, spacing: float, free: bool) -> Problem:
    """Make x ~ N(0, 2²) with outliers up to 1e4, alpha ~ N(0, 0.8²) and random weights of all derivatives."""
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    step = 2 * BOUNDARY / (size - 1) if size > 1 else BOUNDARY
    width = step / math.sqrt(spacing)  # 1 / sqrt(γ)
    x = 2 * randn(ELEMENTS, CHANNELS)
    x[:4] = torch.tensor([1e4, -1e4, 30.0, -30.0]).unsqueeze(1)
    alpha, gamma = 0.8 * randn(CHANNELS, size), torch.full((CHANNELS,), 1 / width**2)
    v = [randn(*x.shape) * width, randn(*alpha.shape), randn(CHANNELS) / width**2]
    p = Problem(x, alpha, gamma, None, BOUNDARY, randn(*x.shape), tuple(v))
    if not free:
        return p
    even = reference.uniform_dictionary(size, BOUNDARY, like=alpha)
    return replace(p, dictionary=even + 0.3 * step * randn(*alpha.shape), v=(*p.v, width * randn(*alpha.shape)))


def errors(p: Problem) -> dict[str, tuple[float, float]]:
    """Return for each value the largest error of kafops and of the eager reference, in units of u S."""
    truth, scale = values(p, reference, torch.float64), conditioning(p)
    ours, eager = values(p, kafops), values(p, reference)
    unit = torch.finfo(torch.float32).eps / 2

    def error(got: dict[str, Tensor], name: str) -> float:
        return ((got[name] - truth[name]).abs().max() / scale[name].max()).item() / unit

    return {name: (error(ours, name), error(eager, name)) for name in truth}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per value: the worst case of kafops, of the reference, and the worst of their ratios."""
    argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__).parse_args(arguments)
    print(f"{kafops.backends.explain(torch.empty(1))}; torch {torch.__version__}")
    print(f"D in {SIZES}, γΔ² in {tuple(round(t, 3) for t in SPACINGS)}, even and free dictionaries; units of u S\n")
    worst: dict[str, list[tuple[float, float]]] = {}
    for size, spacing, free in itertools.product(SIZES, SPACINGS, (False, True)):
        for name, pair in errors(problem(size, spacing, free)).items():
            worst.setdefault(name, []).append(pair)
    print(f"{'':26}{'kafops':>8}{'eager':>8}{'kafops / max(eager, 1)':>26}")
    for name, pairs in worst.items():
        ours, eager = (max(p[i] for p in pairs) for i in (0, 1))
        print(f"{name:26}{ours:8.2f}{eager:8.2f}{max(a / max(b, 1.0) for a, b in pairs):26.2f}")


if __name__ == "__main__":
    main()
