"""Processes of one machine that work together, by gloo."""

import time
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def group(rank, world, directory):
    """Join the group of processes that have a directory in common, and leave it when all are done.

    gloo's threads drop the last collective's tensors after it is done, and abort a process whose Python has ended
    meanwhile (torch 2.14).
    """
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world)
    try:
        torch.set_num_threads(1)
        yield
        dist.barrier()  # gloo may abort a process whose peer has left
    finally:
        time.sleep(0.5)
        dist.destroy_process_group()
