"""`python -m kafops.check`: compare the kernels with the float64 reference on this machine, its GPU too.

Prints what computes here and, for a handful of cases, the largest error of the output, of its gradients and of their
gradients, as a share of what rounding allows (see kafops.accuracy). Exits with 1 where a value is wrong, else with 0,
also where there are no kernels and the reference is all there is. KAFOPS_BACKEND chooses the kernels.
"""

import argparse
import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import kafops
from kafops import backends
from kafops.accuracy import Problem, excess, random_problem, values

__all__ = ["main", "processor"]

_STAGES = ("forward", "backward", "double backward")


@dataclass(frozen=True)
class _Case:
    name: str
    shape: tuple[int, ...] = (4, 20, 12, 12)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    size: int = 20  # D
    spacing: float = 1 / 6  # γΔ²
    free: bool = False
    rows: int = 20  # of every parameter

    def problem(self, device: torch.device) -> Problem:
        p = random_problem(self.shape, self.size, self.spacing, self.rows, self.free).to(device)
        v_x, *v = p.v
        assert v_x is not None
        return replace(p, x=self._data(p.x), grad=self._data(p.grad), v=(self._data(v_x), *v))

    def _data(self, t: Tensor) -> Tensor:
        t = t.to(self.dtype)
        if self.layout == "channels_last":
            return t.to(memory_format=torch.channels_last)
        if self.layout == "every second channel":
            return t.repeat_interleave(2, 1)[:, ::2]
        return t


_CASES = (
    _Case("float32"),
    _Case("float64", dtype=torch.float64),
    _Case("bfloat16", dtype=torch.bfloat16),
    _Case("float16", dtype=torch.float16),
    _Case("float32, channels_last", layout="channels_last"),
    _Case("bfloat16, channels_last", layout="channels_last", dtype=torch.bfloat16),
    _Case("float32, every second channel", layout="every second channel"),
    _Case("float32, one curve for all", rows=1),
    _Case("float32, a few elements", shape=(2, 20)),
    _Case("float32, many elements", shape=(20_000, 2), rows=2),
    _Case("float32, D = 1", size=1),
    _Case("float32, D = 128", size=128, spacing=2.0),
    _Case("float32, free dictionary", free=True),
    _Case("float64, free dictionary", free=True, dtype=torch.float64),
    _Case("bfloat16, free dictionary", free=True, dtype=torch.bfloat16),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check, print its table, and return the exit status: 1 where a value is wrong."""
    parser = argparse.ArgumentParser(prog="python -m kafops.check", description=__doc__.partition("\n\n")[2])
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=found, help="cpu, cuda, cuda:1, ...; here %(default)s unless given")
    device = torch.device(parser.parse_args(arguments).device)
    print(f"kafops {kafops.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{processor()}, {platform.system()} {platform.machine()}, {torch.get_num_threads()} threads")
    if device.type == "cuda":
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
        print(f"{torch.cuda.get_device_name(device)}, compute capability {capability}, CUDA {torch.version.cuda}")
    print(f"{backends.explain(device)}\n")
    print("largest error as a share of what rounding allows; above 1 is wrong")
    width = max(len(case.name) for case in _CASES) + 2
    print(f"{'':{width}}" + "".join(f"{stage:>17}" for stage in _STAGES))
    wrong = [case.name for case in _CASES if not _run(case, device, width)]
    if not _run_non_finite(device, width):
        wrong.append("NaN and infinity")
    total = len(_CASES) + 1
    if wrong:
        print(f"\nWRONG: {len(wrong)} of {total} cases differ from the float64 reference. Please report this output.")
        return 1
    compiled = backends.choose(torch.empty(0, device=device)) != "reference"
    computed = "kernels" if compiled else "reference in each dtype"
    print(f"\nRIGHT: the {computed} and the float64 reference agree in all {total} cases.")
    return 0


def _run(case: _Case, device: torch.device, width: int) -> bool:
    """Print the case's line; return whether it is right."""
    problem = case.problem(device)
    try:
        shares = excess(problem, values(problem, kafops))
    except Exception as error:  # whatever a broken installation raises is a result to report
        print(f"{case.name:{width}}{type(error).__name__}: {error}  WRONG")
        return False
    # "y", "backward x", "double backward grad": the stage is all but the last word
    worst = [
        max(share for name, share in shares.items() if (name.rpartition(" ")[0] or "forward") == stage)
        for stage in _STAGES
    ]
    right = all(share <= 1 for share in worst)
    print(f"{case.name:{width}}" + "".join(f"{share:17.2g}" for share in worst) + f"  {'ok' if right else 'WRONG'}")
    return right


def _run_non_finite(device: torch.device, width: int) -> bool:
    """Print the line on NaN, which gives NaN in its element, and ±inf, which gives 0; return whether that is so."""
    x = torch.linspace(-3, 3, 1000, device=device).reshape(-1, 2)
    alpha, gamma = torch.ones(1, 20, device=device), torch.ones(1, device=device)
    clean = kafops.kaf(x, alpha, gamma)
    x[0, 0], x[1, 0], x[2, 1] = math.nan, math.inf, -math.inf
    y = kafops.kaf(x, alpha, gamma)
    clean[1, 0] = clean[2, 1] = 0
    right = bool(y[0, 0].isnan()) and torch.equal(y.flatten()[1:], clean.flatten()[1:])
    print(f"{'float32, NaN and infinity':{width}}{'':{17 * len(_STAGES)}}  {'ok' if right else 'WRONG'}")
    return right


def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown processor")


if __name__ == "__main__":
    sys.exit(main())
