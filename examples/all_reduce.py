"""An all-reduce in a dozen lines: torchrun --nproc-per-node 4 examples/all_reduce.py

NVRAR_RANKS_PER_NODE=2 torchrun ... plays two nodes of two ranks on this machine.
"""

import logging

import torch
import torch.distributed as dist

import nvrar

logging.basicConfig()
dist.init_process_group("gloo")  # torchrun has told it where

with nvrar.Communicator() as comm:  # finds out who sits where, and chooses a plan for each size
    x = torch.full((1000,), float(comm.rank + 1))
    y = comm.all_reduce(x)  # a new tensor; out=x would work in place
    expected = comm.world_size * (comm.world_size + 1) / 2
    assert (y == expected).all()

    if comm.rank == 0:
        print(f"{comm.world_size} ranks as {comm.topology}: {y[0]:g}, by {comm.plan_for(x.nbytes)}")

dist.destroy_process_group()
