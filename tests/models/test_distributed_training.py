"""Two gloo processes must make the update that one makes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import checkpoints

ROOT = Path(__file__).parents[2]

# A network without batch norm, whose statistics are of a process's share by design.
SCRIPT = """
import sys, json
from pathlib import Path
import torch
from torch import nn
import kafops
from models.data import TensorSource
from models.training import Recipe, Trainer
from models.training.processes import Processes

class SmallBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 3, padding=1), kafops.KAF(4, init="silu")
    def forward(self, x):
        return x + self.act(self.conv(x))

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 4, 3), SmallBlock(), SmallBlock(), nn.Flatten(), nn.Linear(64, 3))
g = torch.Generator().manual_seed(0)
x, y = torch.rand(21, 1, 6, 6, generator=g), torch.arange(21) % 3
out, method, shard = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "fsdp"
recipe = Recipe(2, 8, 0.1, method=method, eps=0.1, watch_images=6, **json.loads(sys.argv[4]))
processes = Processes.from_environment()
trainer = Trainer(model, recipe, 3, TensorSource(x, y, 5), (x[:6], y[:6]), out, processes, shard)
trainer.resume()
trainer.run()
"""


def train(out: Path, processes: int, method: str, mode: str = "ddp", **settings: object) -> dict[str, torch.Tensor]:
    script = out.parent / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, str(script), str(out), method, mode, json.dumps(settings)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return checkpoints.load(out / "latest.safetensors")[0]


def assert_near(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Sums in another order: float32 roundings, over 6 steps."""
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", ["nfgsm", "free:m=2", "trades:steps=2"])
def test_two_processes_make_the_update_of_one(tmp_path: Path, method: str) -> None:
    """21 images in batches of 8: the last has 5, 3 for one process and 2 for the other."""
    assert_near(train(tmp_path / "one", 1, method), train(tmp_path / "two", 2, method))


def test_two_processes_with_sharded_parameters_make_the_update_of_one(tmp_path: Path) -> None:
    one, two = train(tmp_path / "one", 1, "nfgsm"), train(tmp_path / "two", 2, "nfgsm", "fsdp")
    assert_near(one, two)


def test_a_checkpoint_of_two_sharded_processes_goes_on_in_one(tmp_path: Path) -> None:
    two = train(tmp_path / "run", 2, "nfgsm", "fsdp")
    again = train(tmp_path / "run", 1, "nfgsm")
    assert all(torch.equal(two[name], again[name]) for name in two)
