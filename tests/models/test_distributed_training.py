"""Two gloo processes must make the update that one makes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.support import checkpoints

ROOT = Path(__file__).parents[2]

# A network without batch norm, whose statistics are of a process's share by design.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from torch import nn
import kafops
from models.data import TensorSource
from models.support.interrupts import Interrupted
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
out, method, mode, settings = Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
norm = [nn.BatchNorm2d(4)] if "norm" in mode else []
model = nn.Sequential(nn.Conv2d(1, 4, 3), *norm, SmallBlock(), SmallBlock(), nn.Flatten(), nn.Linear(64, 3))
g = torch.Generator().manual_seed(0)
x, y = torch.rand(21, 1, 6, 6, generator=g), torch.arange(21) % 3
stop = settings.pop("stop", None)
recipe = Recipe(2, 8, 0.1, method=method, eps=0.1, watch_images=6, **settings)
processes = Processes.from_environment()
trainer = Trainer(model, recipe, 3, TensorSource(x, y, 5), (x[:6], y[:6]), out, processes, "fsdp" in mode)
trainer.resume()

def on_step(trainer):
    if trainer.steps_done == stop and processes.rank == processes.world - 1:
        os.kill(os.getpid(), signal.SIGINT)

try:
    trainer.run(on_step)
except Interrupted:
    pass
if processes.world > 1 and norm:  # all processes have the same statistics, also of the average of the weights
    for network in (trainer.model, trainer.result):
        theirs = [torch.empty_like(network[1].running_var) for _ in range(processes.world)]
        torch.distributed.all_gather(theirs, network[1].running_var)
        assert all(torch.equal(t, theirs[0]) for t in theirs)
    # What a process saw of its own images is in there: it is not the first one's alone.
    assert not torch.equal(trainer.model[1].running_var, torch.ones(4))
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


@pytest.mark.parametrize("method", ["nfgsm", "free:m=2", pytest.param("trades:steps=2", marks=pytest.mark.slow)])
def test_two_processes_make_the_update_of_one(tmp_path: Path, method: str) -> None:
    """21 images in batches of 8: the last has 5, 3 for one process and 2 for the other."""
    assert_near(train(tmp_path / "one", 1, method), train(tmp_path / "two", 2, method))


def test_two_processes_with_sharded_parameters_make_the_update_of_one(tmp_path: Path) -> None:
    one, two = train(tmp_path / "one", 1, "nfgsm"), train(tmp_path / "two", 2, "nfgsm", "fsdp")
    assert_near(one, two)


@pytest.mark.parametrize(("processes", "mode"), [(2, "fsdp"), (1, "ddp")])
def test_an_interrupted_sharded_training_goes_on_in_two_processes_or_one(
    tmp_path: Path, processes: int, mode: str
) -> None:
    """Stopped after 4 of 6 steps, in the middle of an epoch, by a signal to the second process."""
    train(tmp_path / "run", 2, "nfgsm", "fsdp", stop=4)
    _, record = checkpoints.load(tmp_path / "run/latest.safetensors")
    assert (record["epoch"], record["batch"]) in ((1, 1), (1, 2))  # the other process hears of it a step later
    assert_near(train(tmp_path / "one", 1, "nfgsm"), train(tmp_path / "run", processes, "nfgsm", mode))


@pytest.mark.slow
def test_processes_agree_on_the_statistics_of_batch_norm(tmp_path: Path) -> None:
    train(tmp_path / "run", 2, "nfgsm", "norm", ema=0.5)
