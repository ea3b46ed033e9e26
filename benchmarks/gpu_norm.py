"""Sum, residual and RMSNorm in one launch, beside NCCL and the two operations compiled by torch.

bf16, in a CUDA graph of 20 calls; the two take turns, and the number is the median over replays of the
longest time of any rank, in microseconds a call. Correct before it is timed. Start with torchrun, a rank a
GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics

import torch
import torch._inductor.config
import torch.distributed as dist
from torch import Tensor

import nvrar
from nvrar import timing
from nvrar.rms_norm import add_rms_norm
from nvrar.testing import reference_all_reduce

EPS = 1e-5


def plain_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As models write it."""
    h = x + residual
    wide = h.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * (wide * scale).to(x.dtype), h


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", default="4096,8192")
    parser.add_argument("--sizes", default="16384,65536,131072,262144,524288", help="bytes")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    group, rank = dist.group.WORLD, dist.get_rank()
    torch._dynamo.config.recompile_limit = 64  # every shape gets a kernel of its own
    torch._inductor.config.compile_threads = 1  # its workers would be waited for at the end
    compiled = torch.compile(plain_add_rms_norm, dynamic=False)
    with nvrar.Communicator(timeout_s=20) as comm:
        sizes = [int(n) for n in options.sizes.split(",")]
        comm.warmup(sizes, norm=True)
        if rank == 0:
            print("hidden   bytes    ours us  NCCL + compiled us  ratio", flush=True)
        for hidden in map(int, options.hidden.split(",")):
            for num_bytes in sizes:
                generator = torch.Generator(device=device).manual_seed(num_bytes)
                shape = (dist.get_world_size(), num_bytes // 2 // hidden, hidden)
                everyone = torch.randn(shape, generator=generator, device=device).bfloat16()
                residual = torch.randn(shape[1:], generator=generator, device=device).bfloat16()
                weight = torch.rand(hidden, generator=generator, device=device).bfloat16()
                x = everyone[rank].clone()
                total = reference_all_reduce(everyone, comm.plan_for(num_bytes))
                expected = add_rms_norm(total, residual, weight, EPS)
                found = comm.all_reduce_add_rms_norm(x, residual, weight, EPS)
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
                h = residual.clone()

                def ours(x=x, h=h, weight=weight):
                    comm.all_reduce_add_rms_norm(x, h, weight, EPS, out=x, residual_out=h)

                y = everyone[rank].clone()

                def theirs(y=y, h=h, weight=weight):
                    dist.all_reduce(y)
                    return compiled(y, h, weight)

                clocks = [timing.GraphClock(group, call, 3) for call in (ours, theirs)]
                samples = timing.in_turns(group, clocks, options.rounds, 3, "cuda")
                mine, other = map(statistics.median, samples)
                comm.check()
                if rank == 0:
                    row = f"{hidden:6d} {num_bytes:7d}  {mine:8.2f}  {other:18.2f}"
                    print(f"{row}  {other / mine:5.2f}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
