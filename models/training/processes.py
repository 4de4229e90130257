"""One process, or several that share every batch: DDP and FSDP2 under torchrun or `accelerate launch`.

A batch is cut into shares, process r taking images r, r + world, ...; losses are weighted so that the averaged gradient
is that of the whole batch whatever the shares' sizes. Batch norm sees a process's own share; after an epoch its
statistics are the mean over processes.
"""

import atexit
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from models.support.errors import UserError

_SECONDS_TO_DROP = 0.5


class ProcessError(UserError):
    """Processes that cannot work together."""


@dataclass(frozen=True)
class Processes:
    """This process's place among all, and the device it computes on."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def from_environment(cls) -> "Processes":
        """Join the group that torchrun or `accelerate launch` describes; without one, be alone.

        GPU number LOCAL_RANK is used where there are GPUs, with NCCL, else the CPU with gloo.

        Raises:
            ProcessError: WORLD_SIZE is set, but what goes with it is not.
        """
        cuda = torch.cuda.is_available()
        if "WORLD_SIZE" not in os.environ:
            return cls(device=device())
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ProcessError(
                f"WORLD_SIZE is set but {', '.join(missing)} are not; start with "
                "torchrun --nproc-per-node=N -m models ..."
            )
        own = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
        if cuda:
            torch.cuda.set_device(own)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
            atexit.register(_leave)
        return cls(dist.get_rank(), dist.get_world_size(), own)

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def ddp(self, model: nn.Module) -> nn.Module:
        """Return the network wrapped so that gradients are averaged; as it is where this process is alone."""
        if self.world == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        # Broadcasting would overwrite each process's batch norm statistics with the first one's at every step.
        return DistributedDataParallel(model, devices, broadcast_buffers=False)

    def sum(self, numbers: Tensor) -> Tensor:
        """Return the sum over processes."""
        if self.world > 1:
            dist.all_reduce(numbers)
        return numbers

    def first_says(self, value: Any) -> Any:
        """Return the first process's value, in all."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def join(self, share: Tensor) -> Tensor:  # [n, *] -> [N, *]
        """Return the rows of all processes in the order of the whole batch; `cut` undoes it."""
        if self.world == 1:
            return share
        counts = [torch.zeros(1, dtype=torch.int64, device=share.device) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([len(share)], device=share.device))
        longest = int(max(counts))
        padded = torch.cat([share, share.new_zeros(longest - len(share), *share.shape[1:])])
        shares = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(shares, padded.contiguous())
        return torch.stack(shares, 1).flatten(0, 1)[: int(sum(counts))]

    def cut(self, whole: Tensor) -> Tensor:  # [N, *] -> [n, *]
        """Return this process's rows."""
        return whole[self.rank :: self.world]

    def mean_of_buffers(self, model: nn.Module) -> None:
        """Make the processes' floating buffers (batch norm's statistics) one: their mean."""
        if self.world > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.world

    def wait(self) -> None:
        """Wait for all."""
        if self.world > 1:
            dist.barrier()


def device() -> torch.device:
    """Return the device of a process that is alone: a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def shard(model: nn.Module, units: Iterable[nn.Module]) -> None:
    """Shard parameters, gradients and optimizer state among processes (FSDP2): each unit by itself, then the rest."""
    for unit in units:
        fully_shard(unit)
    fully_shard(model)


def whole(value: Any) -> Any:
    """Return a sharded tensor gathered, anything else as it is. All processes must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Any, pattern: Any) -> Any:
    """Return a whole tensor sharded as `pattern` is, or as it is where that is not sharded."""
    if isinstance(pattern, DTensor) and isinstance(value, Tensor) and value.shape == pattern.shape:
        return distribute_tensor(value.to(pattern.device), pattern.device_mesh, pattern.placements)
    return value


def _leave() -> None:
    """End the group before Python ends.

    gloo's threads drop the last collective's tensors, for which they need Python's lock, some time after it is done.
    One that asks for the lock when Python has ended aborts the process, and nothing tells when they are done (torch
    2.14; destroying the group ends them only where no network refers to it any more). So they are given time.
    """
    if dist.is_initialized():
        time.sleep(_SECONDS_TO_DROP)
        dist.destroy_process_group()
