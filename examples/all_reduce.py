"""An all-reduce in a dozen lines: torchrun --nproc-per-node 4 examples/all_reduce.py

On GPUs where each rank of a node has one, else on CPUs. NVRAR_RANKS_PER_NODE=2 in front plays two nodes
of two ranks on this machine.
"""

import logging
import os
import sys

import torch
import torch.distributed as dist

import nvrar

if "RANK" not in os.environ:
    sys.exit("start it as several ranks: torchrun --nproc-per-node 4 examples/all_reduce.py")
logging.basicConfig()
local_rank, ranks_here = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
on_gpus = torch.cuda.device_count() >= ranks_here
if on_gpus:
    torch.cuda.set_device(local_rank)
dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")

with nvrar.Communicator() as comm:  # finds out who sits where, and chooses a plan for each size
    x = torch.full((1000,), comm.rank + 1.0, device="cuda" if on_gpus else "cpu")
    y = comm.all_reduce(x)  # a new tensor; out=x would work in place
    comm.check()  # on a GPU: waits for it, and raises if the call went wrong there
    assert (y == comm.world_size * (comm.world_size + 1) / 2).all()

    if comm.rank == 0:
        print(f"{y[0]:g} on every rank, by {comm.plan_for(x.nbytes, x.dtype)}\n{comm}")

dist.destroy_process_group()
