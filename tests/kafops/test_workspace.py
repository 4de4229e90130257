"""What tables and sums take beside x, measured in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kafops.backends import cpu

pytestmark = pytest.mark.skipif(
    cpu.load_error is not None or not Path("/proc/self/status").exists(),
    reason=f"no compiled kernels, or no /proc: {cpu.load_error}",
)

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys

import torch

from kafops import ops


def memory(name):
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


torch.set_num_threads(2)
rows, channels, layout = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
x, grad = (torch.empty(rows, channels).uniform_(-3, 3) for _ in range(2))
if layout == "transposed":
    x, grad = (t.view(channels, rows).t() for t in (x, grad))
alpha, gamma = torch.randn(channels, 20), torch.linspace(1e4, 2e4, channels)
ops.kaf_backward(grad[:4000, :2], x[:4000, :2], alpha[:2], gamma[:2], None, 3.0, 7)  # what comes with a first call
before = memory("VmRSS")
found = ops.kaf_backward(grad, x, alpha, gamma, None, 3.0, 7)
print(memory("VmHWM") - before, sum(t.numel() * t.element_size() for t in (x, *found)))
"""


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(("rows", "channels"), [(1536, 2048), (8000, 16)])
def test_backward_with_narrow_gaussians_by_channel(rows, channels, layout):
    """Beside what comes out: at most as much as x, and a constant.

    A table has 1,200 to 1,700 cells, which are 110 to 160 kB a channel with the sums, 280 MB in all.
    """
    command = [sys.executable, "-c", PROGRAM, str(rows), str(channels), layout]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    taken, allowed = map(int, done.stdout.split())
    # 8 MiB of workspace, a table that goes beyond it, and threads' own: 2 × 1 MB of sums, parameters in double.
    assert taken <= allowed + 16 * 2**20
