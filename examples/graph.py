"""All-reduces in a CUDA graph, replayed between eager ones: torchrun --nproc-per-node 2 examples/graph.py"""

import os
import sys

import torch
import torch.distributed as dist

import nvrar

local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", -1)), torch.cuda.device_count()
if not 0 <= local_rank < num_gpus:
    sys.exit(f"needs an NVIDIA GPU for each rank, and torch sees {num_gpus}: start it with torchrun "
             "--nproc-per-node GPUS; examples/all_reduce.py runs on CPUs")  # fmt: skip
torch.cuda.set_device(local_rank)
dist.init_process_group("cpu:gloo,cuda:nccl")

with nvrar.Communicator() as comm:
    x = torch.ones(4, 4096, dtype=torch.bfloat16, device="cuda")  # a replay reads this memory again
    residual, weight = torch.zeros_like(x), torch.ones_like(x[0])
    comm.warmup([x.nbytes], x.dtype, norm=True)  # compiles what the capture must find compiled
    comm.all_reduce(x)  # where calls are left to NCCL: it too wants its first one before a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = comm.all_reduce(x)
        normed, _ = comm.all_reduce_add_rms_norm(x, residual, weight)
    for step in range(1000):
        x.fill_(comm.rank + 1 + step % 7)
        graph.replay()
        eager = comm.all_reduce(x)  # on the same stream: calls and replays run in this order
    comm.check()  # waits for the GPU, and raises what went wrong in any call or replay

    expected = sum(rank + 1 + step % 7 for rank in range(comm.world_size))
    assert (total / expected - 1).abs().max() < 0.01  # bf16
    assert torch.equal(total, eager)  # to the bit
    assert (normed - 1).abs().max() < 0.01  # the norm of equal numbers
    if comm.rank == 0:
        print(f"1000 replays gave the bits of eager calls\n{comm}")
dist.destroy_process_group()
