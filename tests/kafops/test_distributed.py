"""Two gloo processes, each with half of the batch, against one process with all of it."""

import faulthandler

import pytest
import torch
from forms import assert_equal_to_rounding
from processes import group
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kafops

PROCESSES = 2
STEPS = 2


def make_net():
    """Curves of every kind; 5 channels and 1 row do not divide by two."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        kafops.KAF2d(5),
        nn.Conv2d(5, 8, 3),
        kafops.KAF2d(8, 7, learn_gamma=True, learn_dictionary=True),
        nn.Flatten(),
        nn.Linear(8 * 16, 6),
        kafops.KAF(1, learn_gamma=True),
    ).double()


def data_parallel(net):
    return DistributedDataParallel(net)


def sharded(net):
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in net:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def train(net, x, target):
    """A few steps of gradient descent; the gradients of the last and the parameters after it."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), target).backward()
        optimizer.step()
    return [whole(p.grad).detach() for p in net.parameters()], [whole(p).detach() for p in net.parameters()]


def make_data():
    draw = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 8, 8, generator=draw).double(), torch.randn(8, 6, generator=draw).double()


def worker(rank, directory, wrappers):
    faulthandler.enable()
    with group(rank, PROCESSES, directory):
        own = [t.chunk(PROCESSES)[rank] for t in make_data()]
        for wrap in wrappers:
            torch.save(train(wrap(make_net()), *own), f"{directory}/{wrap.__name__}-{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("distributed")
    wrappers = (data_parallel, sharded)
    torch.multiprocessing.spawn(worker, (str(directory), wrappers), nprocs=PROCESSES)
    return {w: [torch.load(directory / f"{w.__name__}-{rank}.pt") for rank in range(PROCESSES)] for w in wrappers}


@pytest.mark.parametrize("wrapper", [data_parallel, sharded], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one(results, wrapper):
    want = train(make_net(), *make_data())
    for got in results[wrapper]:
        assert_equal_to_rounding(got, want)
