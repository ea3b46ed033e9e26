"""What every rank of tests/dist runs under torchrun: ranks_script.py TOPOLOGY CHECK..."""

from __future__ import annotations

import gc
import os
import random
import sys
import time
from pathlib import Path

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist

import nvrar
from nvrar.gpu import jit
from nvrar.gpu.includes import CompileError
from nvrar.rms_norm import add_rms_norm
from nvrar.testing import reference_all_reduce

torch._inductor.config.compile_threads = 1  # its workers would be waited for at the end
RANK = int(os.environ["RANK"])
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
DEVICE = torch.device("cuda", torch.cuda.current_device())
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
    assert comm._gpu is not None, comm._gpu_unavailable
    return comm


def check_bits() -> None:
    """Every plan, and on one every type and operation: the specification's bits, and close to fp64 and NCCL.

    Kernels that put take seconds to compile, so not every pair of them."""
    for plan in ("one-shot", "two-shot", "auto"):
        with communicator(plan=plan) as comm:
            types = (torch.float32, torch.float16, torch.bfloat16, torch.int32)
            for dtype in types if plan == "auto" else types[2:3]:
                for op in ("sum", "max") if plan == "auto" else ("sum",):
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
    """10,000 calls back to back, of random sizes, with random delays on random ranks; all verified. The same
    in a graph."""
    with communicator(plan="auto") as comm:
        sizes = [1, 7, 512, 5000, 33_333, 200_000]
        everyone = {n: inputs_of_all(n, torch.bfloat16, n) for n in sizes}
        expected = {
            n: reference_all_reduce(x, comm.plan_for(2 * n), "sum", TOPOLOGY)
            for n, x in everyone.items()
        }
        same, own = random.Random(1), random.Random(RANK)
        wrong, made = torch.zeros(2, dtype=torch.int64, device=DEVICE)

        def calls(number: int) -> None:
            for _ in range(number):
                n = same.choice(sizes)
                if own.random() < 0.05:
                    torch.cuda._sleep(own.randrange(200_000))
                y = comm.all_reduce(everyone[n][RANK])
                wrong.add_((y != expected[n]).sum())
                made.add_(1)

        calls(10_000)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls(200)
        for _ in range(50):
            graph.replay()
        comm.check()
        assert (wrong.item(), made.item()) == (0, 20_000)
        y = torch.empty_like(everyone[512][RANK])
        free = torch.cuda.memory_allocated()
        for _ in range(20_000):
            comm.all_reduce(everyone[512][RANK], out=y)
        comm.check()
        assert torch.cuda.memory_allocated() <= free


def check_norm() -> None:
    """Sum, residual and RMSNorm: the bits of the three apart, whatever the layout of the tensors."""
    generator = torch.Generator(device=DEVICE).manual_seed(5)
    with communicator(max_bytes=1 << 20) as comm:
        for dtype in (torch.bfloat16, torch.float32):
            comm.warmup([1 << 14, 1 << 20], dtype, norm=True)
            # One launch; then rows too many, too short and too long for it.
            for rows, hidden in (
                (1, 4096),
                (3, 5120),
                (16, 8192),
                (200, 8192),
                (7, 4),
                (2, 40_000),
            ):
                everyone = inputs_of_all(rows * hidden, dtype, hidden).view(-1, rows, hidden)
                residual = torch.randn(rows, hidden, generator=generator, device=DEVICE).to(dtype)
                weight = torch.randn(hidden, generator=generator, device=DEVICE).to(dtype)
                x = everyone[RANK].clone()
                small = x.nbytes <= comm.max_bytes
                if small:
                    total = reference_all_reduce(
                        everyone, comm.plan_for(x.nbytes, dtype), "sum", TOPOLOGY
                    )
                else:
                    dist.all_reduce(total := x.clone())
                expected = add_rms_norm(total, residual, weight, 1e-5)
                padded = torch.zeros(rows, hidden + 1, dtype=dtype, device=DEVICE)[:, 1:]
                padded.copy_(x)
                odd = padded if RANK == 0 else x  # only one rank's layout is odd
                for given in (x, odd):
                    found = comm.all_reduce_add_rms_norm(given, residual, weight, 1e-5)
                    for a, b in zip(found, expected, strict=True):
                        assert torch.equal(bits(a), bits(b)), (dtype, rows, hidden)
                h = residual.clone()
                out, _ = comm.all_reduce_add_rms_norm(x, h, weight, 1e-5, out=x, residual_out=h)
                assert out is x
                assert torch.equal(bits(x), bits(expected[0]))
                assert torch.equal(bits(h), bits(expected[1]))
        static = everyone[RANK, :1, :8192].contiguous()
        residual, weight = torch.randn_like(static), torch.ones(8192, device=DEVICE)
        total = reference_all_reduce(
            everyone[:, :1, :8192], comm.plan_for(static.nbytes, torch.float32), "sum", TOPOLOGY
        )
        expected = add_rms_norm(total, residual, weight, 1e-5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = [
                comm.all_reduce_add_rms_norm(static, residual, weight, 1e-5) for _ in range(10)
            ][-1]
        for _ in range(200):
            graph.replay()
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        compiled = torch.compile(
            lambda x: comm.all_reduce_add_rms_norm(x, residual, weight, 1e-5)[0], fullgraph=True
        )
        assert torch.equal(compiled(static), expected[0])
        comm.check()
    with communicator(
        wire_dtype=torch.float32
    ) as wide:  # a launch for the sum, and one for the rest
        everyone = inputs_of_all(64 * 8192, torch.bfloat16).view(-1, 64, 8192)
        x, weight = everyone[RANK], torch.ones(8192, dtype=torch.bfloat16, device=DEVICE)
        total = reference_all_reduce(
            everyone, wide.plan_for(x.nbytes), "sum", TOPOLOGY, torch.float32
        )
        expected = add_rms_norm(total, x, weight, 1e-5)
        wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for _ in range(500):
            found = wide.all_reduce_add_rms_norm(x, x, weight, 1e-5)
            wrong += sum((a != b).sum() for a, b in zip(found, expected, strict=True))
        wide.check()
        assert wrong.item() == 0


def check_streams() -> None:
    """Two communicators side by side on streams of their own, launched in another order on every rank."""
    comms = [communicator() for _ in range(2)]
    length = 2 << 20  # enough to fill what each may take of a GPU
    everyone = inputs_of_all(length, torch.bfloat16)
    expected = reference_all_reduce(everyone, comms[0].plan_for(2 * length), "sum", TOPOLOGY)
    order = list(zip(comms, [torch.cuda.Stream() for _ in comms], strict=True))
    if RANK % 2:
        order.reverse()
    # Rows over clusters, with and without their sum, begin early beside sums that wait: all must find room.
    num_rows = max(1, 32 // dist.get_world_size())
    rows = everyone[RANK, : num_rows * 8192].view(num_rows, 8192)
    weight = torch.rand(8192, device=DEVICE).bfloat16()
    # Given: making a tensor may wait for all streams, and then for the other communicator's peers.
    results = {comm: torch.empty_like(everyone[RANK]) for comm in comms}
    fused, apart = (
        {comm: (torch.empty_like(rows), torch.empty_like(rows)) for comm in comms} for _ in range(2)
    )
    summed = {comm: torch.empty_like(rows) for comm in comms}
    small = torch.empty_like(everyone[RANK, :9999])
    for comm in comms:
        comm.warmup([small.nbytes, rows.nbytes, everyone[RANK].nbytes], norm=True)
        assert comm._gpu.sums_rows(rows)
        comm.all_reduce_add_rms_norm(rows, rows, weight, 1e-5)
    torch.cuda.synchronize()
    for turn in range(50):
        for comm, stream in order:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000 * (turn % 3))
                for _ in range(3):
                    comm.all_reduce(everyone[RANK], out=results[comm])
                    comm.all_reduce(everyone[RANK, :9999], out=small)
                    out, h = fused[comm]
                    comm.all_reduce_add_rms_norm(rows, rows, weight, 1e-5, out=out, residual_out=h)
                    comm.all_reduce(rows, out=summed[comm])
                    to = apart[comm]
                    comm._gpu.add_rms_norm(summed[comm], rows, weight, 1e-5, *to, sums=False)
    for comm in comms:
        comm.check()
        assert torch.equal(bits(results[comm]), bits(expected))
        total = reference_all_reduce(
            everyone[:, : rows.numel()], comm.plan_for(rows.nbytes), "sum", TOPOLOGY
        )
        wanted = add_rms_norm(total.view_as(rows), rows, weight, 1e-5)
        for found in (fused[comm], apart[comm]):
            assert all(torch.equal(bits(f), bits(w)) for f, w in zip(found, wanted, strict=True))
        comm.close()


def check_groups() -> None:
    """Communicators on nested groups, made in another order by every rank; a rank that cannot; an arena
    that is too small."""
    own = [dist.new_group([r], backend="cpu:gloo,cuda:nccl") for r in range(dist.get_world_size())]
    made = {}
    for what in ("world", "own") if RANK % 2 else ("own", "world"):
        if what == "world":
            made[what] = nvrar.Communicator(topology=TOPOLOGY)
        else:
            made[what] = nvrar.Communicator(own[RANK])
    x = torch.full((5000,), 2.0, device=DEVICE)
    assert (made["world"].all_reduce(x) == 2 * dist.get_world_size()).all()
    assert torch.equal(made["own"].all_reduce(x), x)
    normed, h = made["own"].all_reduce_add_rms_norm(x, x, torch.ones_like(x))
    assert (h == 4).all()
    assert ((normed - 1).abs() < 1e-6).all()
    if RANK == 1:  # fails to compile on this rank alone: all fall back
        jit.load, load = does_not_compile, jit.load
    alone = nvrar.Communicator(topology=TOPOLOGY, plan="one-shot", max_bytes=1 << 10)
    assert alone.executor_for("cuda") == "torch.distributed", alone.executor_for("cuda")
    assert (alone.all_reduce(x) == 2 * dist.get_world_size()).all()
    if RANK == 1:
        jit.load = load
    greedy = nvrar.Communicator(topology=TOPOLOGY, max_bytes=1 << 30)
    assert greedy.executor_for("cuda") == "torch.distributed"
    assert (greedy.all_reduce(x) == 2 * dist.get_world_size()).all()
    print(f"[{RANK}] {alone._gpu_unavailable[:100]} | {greedy._gpu_unavailable}", flush=True)


def does_not_compile(spec: jit.KernelSpec) -> None:
    raise CompileError("no CUDA headers")


def check_foreign_nvshmem() -> None:
    """Another library has initialised NVSHMEM first, and goes on using it."""
    import nvshmem.core
    from cuda.core import Device

    device = Device(DEVICE.index)
    device.set_current()
    ids = [nvshmem.core.get_unique_id() if RANK == 0 else None]
    dist.broadcast_object_list(ids)
    nvshmem.core.init(
        device=device,
        uid=ids[0],
        rank=RANK,
        nranks=dist.get_world_size(),
        initializer_method="uid",
    )
    theirs = nvshmem.core.tensor((1000,), dtype=torch.float32)
    theirs.fill_(3)
    with communicator() as comm:
        x = torch.full((5000,), 2.0, device=DEVICE)
        assert (comm.all_reduce(x) == 2 * dist.get_world_size()).all()
        assert (comm.all_reduce(theirs) == 3 * dist.get_world_size()).all()
        comm.check()
    assert (theirs == 3).all()
    nvshmem.core.free_tensor(theirs)


def check_memory() -> None:
    """100,000 calls leave no more memory in use than the first thousand did."""
    with communicator() as comm:
        x = torch.ones(4096, device=DEVICE)
        y = torch.empty_like(x)

        def used() -> tuple[int, int, int]:
            comm.check()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            return pages * 4096, torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]

        def calls(number: int) -> None:
            for i in range(number):
                comm.all_reduce(x[: 1 + i % 4096], out=y[: 1 + i % 4096])

        calls(10_000)  # every size that will be used
        host, allocated, free = used()
        calls(100_000)
        more, now, left = used()
        assert more - host < 4 << 20, (host, more)
        assert (now, left) == (allocated, free)


def check_successors() -> None:
    """Communicators that come and go share their kernels, and leave no memory behind."""
    x = torch.full((500,), 2.0, device=DEVICE)
    free = []
    for i in range(20):
        with communicator(plan=("one-shot", "two-shot")[i % 2], max_bytes=4096) as comm:
            assert (comm.all_reduce(x) == 2 * dist.get_world_size()).all()
            comm.check()
        del comm
        gc.collect()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[9] - free[-1] < 4 << 20, free


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
