"""What every rank of a test in test_gpus.py runs under torchrun: yalis's backends over symmetric memory."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from yalis.layers import functional
from yalis.parallel.all_reduce import SYMM_MEM_ALL_REDUCES, AllReduce, make_all_reduce

torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
DEVICE = torch.device("cuda", torch.cuda.current_device())


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator(device=DEVICE).manual_seed(rank)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def check(all_reduce: AllReduce, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parts = [part(rank, shape, dtype) for rank in range(dist.get_world_size())]
    want = torch.stack(parts).double().sum(dim=0)
    bound = 1e-5 if dtype == torch.float32 else 0.02 * len(parts)
    got = all_reduce(parts[dist.get_rank()].clone())
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=bound, rtol=bound)
    residual, weight = part(99, shape, dtype), part(98, shape[-1:], dtype)
    normed, total = all_reduce.add_rms_norm(
        parts[dist.get_rank()].clone(), residual, weight, 1e-5
    )
    assert torch.equal(total, got + residual)
    torch.testing.assert_close(normed, functional.rms_norm(total, weight, 1e-5))


def main() -> None:
    dist.init_process_group("nccl", device_id=DEVICE)
    group = dist.group.WORLD
    assert group is not None
    for name in SYMM_MEM_ALL_REDUCES:
        all_reduce = make_all_reduce(name, group=group, nodes=None, plan="auto")
        for dtype in (torch.float32, torch.bfloat16):
            for shape in ((1, 4096), (7, 24), (256, 8192), (3, 5), (600, 8192)):
                check(all_reduce, shape, dtype)
        print(name, all_reduce.describe()["fallbacks"], flush=True)
        x = part(dist.get_rank(), (4, 4096), torch.bfloat16)
        want = all_reduce(x.clone())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = all_reduce(x.clone())
        for _ in range(100):
            graph.replay()
        assert torch.equal(y, want)
    if dist.get_rank() == 0:
        print("symm_mem: passed", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
