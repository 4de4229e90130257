"""`python -m bench.accuracy`: largest errors in float32 against float64, of kafops and of the eager reference.

Every error is relative to S, the largest sum of the absolute values of a value's terms (Σ|α|K for y, Σ|g|K for the
gradient of alpha), and is printed in units of u S, u = 2^-24: one rounding of the largest term.
"""

import argparse
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

import kafops
from kafops import reference
from kafops.accuracy import Problem, conditioning, random_problem, values

SIZES = (1, 2, 5, 20, 33, 64, 128)  # D
SPACINGS = (1 / 8, 1 / 6, 1 / 2, 2.0, 8.0)  # γΔ²
ELEMENTS, CHANNELS = 4000, 4


def problem(size: int, spacing: float, free: bool, device: str = "cpu") -> Problem:
    """Draw a problem, with a few x far outside the dictionary."""
    p = random_problem((ELEMENTS, CHANNELS), size, spacing, CHANNELS, free)
    p.x[:4] = torch.tensor([1e4, -1e4, 30.0, -30.0]).unsqueeze(1)
    return p.to(device)


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
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument("--device", default="cpu", help="where the kernels and the eager reference compute")
    device = parser.parse_args(arguments).device
    print(f"{kafops.backends.explain(torch.empty(1, device=device))}; torch {torch.__version__}")
    print(f"D in {SIZES}, γΔ² in {tuple(round(t, 3) for t in SPACINGS)}, even and free dictionaries; units of u S\n")
    worst: dict[str, list[tuple[float, float]]] = {}
    for size, spacing, free in itertools.product(SIZES, SPACINGS, (False, True)):
        for name, pair in errors(problem(size, spacing, free, device)).items():
            worst.setdefault(name, []).append(pair)
    print(f"{'':26}{'kafops':>8}{'eager':>8}{'kafops / max(eager, 1)':>26}")
    for name, pairs in worst.items():
        ours, eager = (max(p[i] for p in pairs) for i in (0, 1))
        print(f"{name:26}{ours:8.2f}{eager:8.2f}{max(a / max(b, 1.0) for a, b in pairs):26.2f}")


if __name__ == "__main__":
    main()
