"""Runs the kernels' tests on the kernels for GPUs, executed on the CPU: one process each, as the choice is made once.

CUDA C++ runs under tests/emulator, in several orders of threads and under sanitizers; Triton under its interpreter.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kafops.backends import triton

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "emulator"))
import emulator_build  # noqa: E402

EVERYTHING = "not nothing"
TABLE = "test_values or same_bits or by_hand"  # every case, and that two runs give the same bits
# The interpreter takes ten minutes for everything.
QUICK = "test_values or by_hand or not_finite or infinite"


@dataclass(frozen=True)
class Run:
    """A process with a plugin of pytest that puts some kernels in the place of the CPU's.

    Attributes:
        plugin: its module.
        chosen: which of the kernels' tests, as `pytest -k` takes it.
        at_least: how many those are.
        environment: further variables.
    """

    plugin: str
    chosen: str
    at_least: int
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pytest", "-q", "-p", self.plugin, "-p", "no:cacheprovider"]
        command += ["-m", "not slow and not cpu_kernels"]
        command += ["-k", self.chosen, "tests/kafops/test_kernels.py", "tests/kafops/test_gpu_operators.py"]
        paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        environment = {"PYTHONPATH": paths, "KAFOPS_TEST_GPU_KERNELS": "1", "OMP_NUM_THREADS": "1"} | self.environment
        return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def runs() -> dict[str, Run]:
    found = {}
    if emulator_build.compiler() is not None:
        found["cuda"] = Run("emulated_cuda", EVERYTHING, 700, {"KAFOPS_EMULATOR_ORDER": "forward"})
        # The same with tables of curves wherever the cases are too small to be worth them.
        always = {"KAFOPS_EMULATOR_TABLES": "1"}
        found["cuda, tables"] = Run("emulated_cuda", EVERYTHING, 700, always)
        for order in ("reverse", "1"):
            found[f"cuda, threads {order}"] = Run(
                "emulated_cuda", TABLE, 400, always | {"KAFOPS_EMULATOR_ORDER": order}
            )
        # Red zones of 2 KB around every tensor are its guard bands.
        sanitized = emulator_build.sanitizer_environment() | always | {"KAFOPS_TEST_SANITIZE": "1"}
        sanitized["ASAN_OPTIONS"] += ":redzone=2048:max_redzone=2048:quarantine_size_mb=16"
        found["cuda, sanitizers"] = Run("emulated_cuda", TABLE, 400, sanitized)
    if triton.load_error is None:
        found["triton"] = Run("interpreted_triton", QUICK, 450)
        found["triton, everything"] = Run("interpreted_triton", EVERYTHING, 700)
    return found


RUNS = runs()


@pytest.fixture(scope="module")
def results(request):
    """The processes of the tests that were selected, two at once."""
    selected = {item.callspec.params["name"] for item in request.session.items if item.path == Path(__file__)}
    names = [name for name in RUNS if name in selected]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(lambda name: RUNS[name](), names), strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "cuda",
        "cuda, tables",
        "cuda, threads reverse",
        "cuda, threads 1",
        "cuda, sanitizers",
        "triton",
        pytest.param("triton, everything", marks=pytest.mark.slow),
    ],
)
def test_kernels(name, results):
    if name not in RUNS:
        pytest.skip("no C++ compiler" if "cuda" in name else str(triton.load_error))
    done = results[name]
    output = done.stdout[-6000:] + done.stderr[-3000:]
    assert done.returncode == 0, output
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, output
    assert int(passed[1]) >= RUNS[name].at_least, output
    assert "skipped" not in done.stdout, output
