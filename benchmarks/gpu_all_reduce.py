"""All-reduce on GPUs: every contender beside the others in one run. Start with torchrun, a rank a GPU.

bf16 sum in a CUDA graph of 20 calls; per size the contenders take turns, and the number is the median over
replays of the largest time of any rank, in microseconds a call. Correct before it is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

import nvrar
from nvrar.gpu.algorithms import Algorithm
from nvrar.gpu.executor import GpuExecutor
from nvrar.gpu.layout import LL, LL128, LaunchShape
from nvrar.plan import Plan
from nvrar.testing import reference_all_reduce
from nvrar.topology import Topology

CALLS = 20


def graph_of(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS):
            call()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier()
    torch.cuda.synchronize()
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3 / CALLS


def eager(comm: nvrar.Communicator, device: torch.device, rank: int) -> None:
    """Host time of a call outside a graph, with the GPU kept behind."""
    x = torch.zeros(8192, dtype=torch.bfloat16, device=device)
    calls = {"nvrar": lambda: comm.all_reduce(x, out=x), "nvrar new": lambda: comm.all_reduce(x)}
    calls["nccl"] = lambda: dist.all_reduce(x)
    for name, call in calls.items():
        samples = []
        for _ in range(20):
            torch.cuda.synchronize()
            dist.barrier()
            start = time.perf_counter()
            for _ in range(50):
                call()
            samples.append((time.perf_counter() - start) / 50 * 1e6)
        if rank == 0:
            print(f"eager host time {name}: {statistics.median(samples):.1f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="1K,4K,16K,64K,128K,256K,512K,1M,2M,4M")
    parser.add_argument("--topology", default="1x2")
    parser.add_argument("--plans", default="exchange:2")
    parser.add_argument("--replays", type=int, default=30)
    parser.add_argument(
        "--shapes", default="", help="blocks x threads to try, such as 32x512,64x512"
    )
    parser.add_argument("--peers", type=int, default=1)
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    ranks = dist.get_world_size()
    scale = {"K": 1 << 10, "M": 1 << 20}
    sizes = [int(s[:-1]) * scale[s[-1]] for s in options.sizes.split(",")]
    plans = [Plan.parse(w) for w in options.plans.split(",")]
    topology = Topology.parse(options.topology)
    put = os.environ.get("NVRAR_TRANSPORT") == "put"
    formats = (LL,) if put else (LL, LL128)
    algorithms = {Algorithm(p, f): max(sizes) for p in plans for f in formats}
    ours = GpuExecutor(dist.group.WORLD, topology, lambda _: algorithms, 30.0, 2.0)
    comm = nvrar.Communicator(topology=topology, max_bytes=max(sizes), timeout_s=20)
    pool_group = dist.new_group()
    shapes = [LaunchShape(*map(int, s.split("x"))) for s in options.shapes.split(",") if s]
    rows = []
    for size in sizes:
        torch.manual_seed(size)
        inputs = torch.randn(ranks, size // 2, device=device).bfloat16()
        x = inputs[rank].clone()
        name = dist.group.WORLD.group_name
        contenders: dict[str, Callable[[], object]] = {}
        for algorithm in algorithms:
            expected = reference_all_reduce(inputs, algorithm.plan)
            out = torch.empty_like(x)
            prepared = ours.prepare(size, x.dtype, "sum", algorithm)
            ours.launch(prepared, x, out)
            torch.cuda.synchronize()
            assert ours.failure.kind == 0, (size, algorithm, ours.failure.kind, ours.failure.level)
            assert torch.equal(out.view(torch.int16), expected.view(torch.int16)), (size, algorithm)
            for shape in shapes or [prepared.shape]:
                p = dataclasses.replace(prepared, shape=shape, configs={})

                def call(x=x, o=out, p=p):
                    ours.launch(p, x, o)

                label = f"{algorithm.packets.name} {algorithm.plan}"
                contenders[label + (f" {shape.blocks}x{shape.threads}" if shapes else "")] = call
        result = torch.empty_like(x)
        contenders["auto"] = lambda x=x, o=result: comm.all_reduce(x, out=o)
        if options.peers:
            y = x.clone()
            contenders["nccl"] = lambda y=y: dist.all_reduce(y)
            s = symm_mem.empty(size // 2, dtype=torch.bfloat16, device=device)
            symm_mem.rendezvous(s, dist.group.WORLD.group_name)
            contenders["symm one-shot"] = lambda s=s, name=name: (
                torch.ops.symm_mem.one_shot_all_reduce(s, "sum", name)
            )
            contenders["symm two-shot"] = lambda s=s, name=name: (
                torch.ops.symm_mem.two_shot_all_reduce_(s, "sum", name)
            )
            backend = pool_group._get_backend(device)
            pool = torch.cuda.MemPool(backend.mem_allocator)
            with torch.cuda.use_mem_pool(pool):
                z = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
            dist.all_reduce(z, group=pool_group)
            torch.cuda.synchronize()
            backend.register_mem_pool(pool, symm=True)
            contenders["nccl pool"] = lambda z=z: dist.all_reduce(z, group=pool_group)
        graphs = {name: graph_of(call) for name, call in contenders.items()}
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(options.replays):
            for name, graph in graphs.items():
                times[name].append(replay_us(graph))
        assert ours.failure.kind == 0
        comm.check()
        names = list(times)
        table = torch.tensor([times[n] for n in names], device=device)
        dist.all_reduce(table, dist.ReduceOp.MAX)
        median = {n: statistics.median(r) for n, r in zip(names, table.tolist(), strict=True)}
        rows.append((size, median))
        if rank == 0:
            print(
                size,
                {n: round(t, 2) for n, t in sorted(median.items(), key=lambda p: p[1])},
                flush=True,
            )
        del graphs
    eager(comm, device, rank)
    if rank == 0 and options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file)
    ours.close()
    dist.barrier()
    torch.cuda.synchronize()
    os._exit(0)  # NCCL 2.28 does not come back from destroying a group with a registered pool


if __name__ == "__main__":
    main()
