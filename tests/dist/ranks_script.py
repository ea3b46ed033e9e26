"""What every rank of tests/dist runs, a GPU each, under torchrun: ranks_script.py TOPOLOGY CHECK..."""

from __future__ import annotations

import os
import random
import sys
import time

import pytest
import torch
import torch.distributed as dist

import nvrar
from nvrar.testing import reference_all_reduce

RANK = int(os.environ["RANK"])
DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
TOPOLOGY = nvrar.Topology.parse(sys.argv[1])
LENGTHS = (1, 2, 3, 63, 480, 481, 4096, 99_991, 1 << 20)


def inputs_of_all(length: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    shape = (dist.get_world_size(), length)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
    return torch.randint(-1000, 1000, shape, generator=generator, device=DEVICE, dtype=dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def communicator(**options) -> nvrar.Communicator:
    comm = nvrar.Communicator(topology=TOPOLOGY, **options)
    assert comm._gpu is not None, comm._gpu_lack
    return comm


def check_bits() -> None:
    """Every type, operation, length and plan: the specification's bits, and close to fp64 and to NCCL."""
    for plan in ("auto", "nvrar", "one-shot", "two-shot"):
        with communicator(plan=plan) as comm:
            for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int32):
                for op in ("sum", "max"):
                    for length in LENGTHS:
                        everyone = inputs_of_all(length, dtype, length)
                        x = everyone[RANK].clone()
                        expected = reference_all_reduce(
                            everyone, comm.plan_for(x.nbytes, dtype), op, TOPOLOGY
                        )
                        y = comm.all_reduce(x, op=op)
                        assert torch.equal(bits(y), bits(expected)), (plan, dtype, op, length)
                        comm.all_reduce(x, out=x, op=op)
                        assert torch.equal(bits(x), bits(expected)), (plan, dtype, op, length)
                        if op == "sum" and dtype.is_floating_point:
                            exact = everyone.double().sum(0)
                            scale = everyone.double().abs().sum(0)
                            bound = 4 * torch.finfo(dtype).eps * scale
                            assert ((y.double() - exact).abs() <= bound).all()
                            theirs = everyone[RANK].clone()
                            dist.all_reduce(theirs)
                            assert ((y.double() - theirs.double()).abs() <= bound).all()
            assert not comm.stats.fallbacks
            comm.check()


def check_layouts() -> None:
    """Odd addresses, strides, empty tensors, fallbacks."""
    with communicator(max_bytes=1 << 20) as comm:
        everyone = inputs_of_all(1000, torch.bfloat16)
        padded = torch.zeros(1001, dtype=torch.bfloat16, device=DEVICE)
        padded[1:] = everyone[RANK]
        expected = reference_all_reduce(everyone, comm.plan_for(2000), "sum", TOPOLOGY)
        assert torch.equal(comm.all_reduce(padded[1:]), expected)
        strided = torch.zeros(1000, 2, dtype=torch.bfloat16, device=DEVICE)
        strided[:, 0] = everyone[RANK]
        assert torch.equal(comm.all_reduce(strided[:, 0]), expected)
        comm.all_reduce(strided[:, 0], out=strided[:, 0])
        assert torch.equal(strided[:, 0], expected)
        assert comm.all_reduce(torch.empty(0, 3, device=DEVICE)).shape == (0, 3)
        assert not comm.stats.fallbacks
        big = torch.ones(1 << 20, device=DEVICE)
        assert (comm.all_reduce(big) == dist.get_world_size()).all()
        assert (comm.all_reduce(big[:8].double()) == dist.get_world_size()).all()
        assert sum(comm.stats.fallbacks.values()) == 2
        on_cpu = comm.all_reduce(torch.ones(5))  # the host executor, over gloo
        assert (on_cpu == dist.get_world_size()).all()
        wide = nvrar.Communicator(topology=TOPOLOGY, wire_dtype=torch.float32)
        y = wide.all_reduce(everyone[RANK])
        assert torch.equal(
            y, reference_all_reduce(everyone, wide.plan_for(2000), "sum", TOPOLOGY, torch.float32)
        )
        wide.close()


def check_graphs() -> None:
    """Captured once, replayed thousands of times, mixed with eager calls, other sizes, other streams."""
    with communicator() as comm, communicator(plan="one-shot") as other:
        everyone = inputs_of_all(40_000, torch.bfloat16)
        static, result = everyone[RANK].clone(), torch.empty_like(everyone[RANK])
        expected = reference_all_reduce(everyone, comm.plan_for(80_000), "sum", TOPOLOGY)
        expected_small = reference_all_reduce(everyone[:, :9], comm.plan_for(18), "sum", TOPOLOGY)
        side = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # the very first call is a captured one
            for _ in range(4):
                comm.all_reduce(static, out=result)
                other.all_reduce(static[:9])
        for turn in range(1000):
            graph.replay()
            if turn % 50 == 0:
                assert torch.equal(comm.all_reduce(everyone[RANK, :9]), expected_small)
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    y = comm.all_reduce(everyone[RANK])
                torch.cuda.current_stream().wait_stream(side)
                assert torch.equal(y, expected)
                assert torch.equal(result, expected)
        comm.check()
        compiled = torch.compile(lambda x: comm.all_reduce(x * 1) + 0, fullgraph=True)
        assert torch.equal(compiled(everyone[RANK]), expected)
        with_delay = torch.cuda.CUDAGraph()
        with pytest.raises(nvrar.ArgumentError, match="warmup"), torch.cuda.graph(with_delay):
            comm.all_reduce(static.half(), op="max")
        comm.warmup([80_000], torch.float16, "max")
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            comm.all_reduce(static.half(), op="max")


def check_storm() -> None:
    """10,000 calls back to back, of random sizes, with random delays on random ranks; all verified."""
    with communicator(plan="auto") as comm:
        sizes = [1, 7, 512, 5000, 33_333, 200_000]
        everyone = {n: inputs_of_all(n, torch.bfloat16, n) for n in sizes}
        expected = {
            n: reference_all_reduce(x, comm.plan_for(2 * n), "sum", TOPOLOGY)
            for n, x in everyone.items()
        }
        same, own = random.Random(1), random.Random(RANK)
        wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for _ in range(10_000):
            n = same.choice(sizes)
            if own.random() < 0.05:
                torch.cuda._sleep(own.randrange(200_000))
            y = comm.all_reduce(everyone[n][RANK])
            wrong += (y != expected[n]).sum()
        comm.check()
        assert wrong.item() == 0
        y = torch.empty_like(everyone[512][RANK])
        free = torch.cuda.memory_allocated()
        for _ in range(20_000):
            comm.all_reduce(everyone[512][RANK], out=y)
        comm.check()
        assert torch.cuda.memory_allocated() <= free


def check_late() -> None:
    """The last rank comes too late: the others are told within the budget, and get no result."""
    comm = communicator(timeout_s=3.0)
    last = dist.get_world_size() - 1
    x = torch.ones(1000, device=DEVICE)
    comm.all_reduce(x)
    comm.check()
    dist.barrier()
    start = time.monotonic()
    if last == RANK:
        time.sleep(5)
        return
    y = comm.all_reduce(x)
    with pytest.raises(nvrar.PeerTimeout) as caught:
        comm.check()
    assert caught.value.peers == (last,), caught.value
    assert time.monotonic() - start < 4.5
    print(f"[{RANK}] {caught.value}", flush=True)
    assert y.isnan().all()
    with pytest.raises(nvrar.PeerTimeout):  # broken for good
        comm.all_reduce(x)


def check_mismatch() -> None:
    """Ranks that call with different sizes are told so, and add nothing."""
    comm = communicator(timeout_s=4.0)
    comm.all_reduce(torch.ones(1000, device=DEVICE))
    comm.check()
    y = comm.all_reduce(torch.ones(1000 + 8 * (RANK == 0), device=DEVICE))
    with pytest.raises(nvrar.NvrarError) as caught:
        comm.check()
    print(f"[{RANK}] {type(caught.value).__name__}: {caught.value}", flush=True)
    assert y.isnan().all()


def main() -> None:
    torch.cuda.set_device(DEVICE)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=DEVICE)
    for name in sys.argv[2:]:
        start = time.monotonic()
        globals()[f"check_{name}"]()
        torch.cuda.synchronize()
        dist.barrier()
        if RANK == 0:
            print(f"{name} on {TOPOLOGY}: passed in {time.monotonic() - start:.1f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
