"""Runs the kernels' tests for the other instruction sets: one process each, as the choice is made once in a process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kafops.backends import cpu

pytestmark = pytest.mark.skipif(cpu.load_error is not None, reason=f"no compiled kernels: {cpu.load_error}")

ROOT = Path(__file__).parents[2]
ALL = re.findall(r"\bX\((\w+),", (ROOT / "csrc/cpu/isa.h").read_text(encoding="utf-8"))
OTHERS = [name for name in ALL if cpu.load_error is not None or name != cpu.capability()]


def run(capability: str, *command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"KAFOPS_CPU_CAPABILITY": capability}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("capability", OTHERS)
def test_kernels(capability):
    chosen = run(capability, "-c", "import kafops.backends.cpu as cpu; print(cpu.capability())")
    if "does not run here" in chosen.stderr:
        pytest.skip(chosen.stderr.splitlines()[-1])
    assert chosen.stdout.strip() == capability, chosen.stderr
    files = [f"tests/kafops/test_{name}.py" for name in ("kernels", "orders", "bases")]
    done = run(capability, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


def test_unknown_instruction_set():
    done = run("sse9", "-c", "import kafops")
    assert done.returncode != 0
    assert "KAFOPS_CPU_CAPABILITY=sse9 does not run here; this machine runs: " in done.stderr
    assert "portable" in done.stderr
