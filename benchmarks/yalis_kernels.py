# ruff: noqa: B023 -- every closure of a loop here is called before the loop goes on
"""yalis's kernels on one GPU: held to their reference, then timed beside torch, alone and as a decode step.

bf16, CUDA graphs, weights and caches that do not fit the L2 cache; the median of some replays. Sections run
until the time budget is spent, the most telling first: `--sections` picks some. First a process for each
section runs it without a clock, all at once, so that every kernel is compiled when the timing begins.
Prefill attention and products of many rows were measured in the first version (see git log).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import kernel_cases
from yalis.kernels import decode_attention as decode
from yalis.kernels import few_rows, invariant_linear, launch
from yalis.kernels.activation import silu_and_mul
from yalis.kernels.decode_splits import SPLIT, DecodeWorkspace, plan_decode
from yalis.kernels.few_rows import Tile, multiply_few_rows
from yalis.kernels.linear import linear, linear_silu_and_mul
from yalis.kernels.norm import add_rms_norm, rms_norm
from yalis.kernels.rotary import rotate_and_store
from yalis.kernels.warp_attention import NewTokens

DEVICE = torch.device("cuda", 0)
BF16 = torch.bfloat16
BLOCK_SIZE = 16
COLD_BYTES = 256 << 20  # several times the L2 cache
NUM_PROCESSORS = 132  # of an H200
READ_TBPS = 4.10  # measured for a GEMV on an H200
COMPILE_ONLY = "--compile-only" in sys.argv
Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """One rank's part of a model."""

    hidden: int = 4096
    num_heads: int = 32
    num_kv_heads: int = 8
    intermediate: int = 14336
    vocab: int = 128256
    num_layers: int = 32
    head_dim: int = 128

    def part(self, num_ranks: int) -> Shape:
        return replace(
            self,
            num_heads=self.num_heads // num_ranks,
            num_kv_heads=self.num_kv_heads // num_ranks,
            intermediate=self.intermediate // num_ranks,
            vocab=self.vocab // num_ranks,
        )

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of each weight."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "qkv": (q + 2 * kv, self.hidden),
            "o": (self.hidden, q),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    @property
    def num_bytes(self) -> int:
        layer = sum(rows * columns for rows, columns in self.products.values())
        return 2 * (self.num_layers * layer + self.vocab * self.hidden)


LLAMA_8B = Shape()
LLAMA_70B = Shape(8192, 64, 8, 28672, 128256, 80)


def time_us(calls: Sequence[Call], num_replays: int = 9) -> float:
    """Microseconds a call, of a graph of all of them."""
    if COMPILE_ONLY:
        calls[0]()
        torch.cuda.synchronize()
        return 1.0
    graph = graph_of(calls)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples = []
    for _ in range(num_replays):
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return statistics.median(samples)


def graph_of(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, dtype=BF16, device=DEVICE).normal_(0, scale)


def num_copies(num_bytes: int) -> int:
    return max(2, min(64, -(-COLD_BYTES // num_bytes)))


def gbps(num_bytes: float, us: float) -> str:
    return f"{num_bytes / us / 1e3:5.0f}"


# --- checks


def check() -> Iterator[str]:
    """Every kernel against its reference."""
    for name, case in {**kernel_cases.GPU_ONLY, **kernel_cases.ALL}.items():
        start = time.monotonic()
        try:
            case(DEVICE, BF16)
            result = "ok"
        except Exception as error:
            result = "FAILED " + " ".join(str(error).split())[:300]
        yield f"{name:16} {result} ({time.monotonic() - start:.1f} s)"


# --- a whole decode step


@dataclass(frozen=True)
class Variant:
    """Who multiplies, and how."""

    product: str = "ours"  # or "cublas", "invariant"
    tile: Tile | None = None
    in_triton: bool = False  # decode attention
    turns: bool = True  # and stores on the way, where decode attention is not in Triton
    stages: int = 3
    per_processor: int | None = None

    def num_programs(self, num_kv_heads: int) -> int | None:
        return self.per_processor and -(-self.per_processor * NUM_PROCESSORS // num_kv_heads)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.product == "cublas":
            return F.linear(x, weight)
        if self.product == "invariant":
            return invariant_linear.linear(x, weight)
        tile = self._tile(x)
        return linear(x, weight) if tile is None else multiply_few_rows(x, weight, tile=tile)

    def gated(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.product == "cublas":
            return silu_and_mul(F.linear(x, weight))
        if self.product == "invariant":
            return invariant_linear.linear_silu_and_mul(x, weight)
        tile = self._tile(x)
        if tile is None:
            return linear_silu_and_mul(x, weight)
        return multiply_few_rows(x, weight, is_gated=True, tile=tile)

    def _tile(self, x: Tensor) -> Tile | None:
        return self.tile if x.shape[0] <= few_rows.MOST_ROWS else None


class Model:
    """Random weights of a shape and a step of decoding with them."""

    def __init__(self, shape: Shape, batch: int, context: int) -> None:
        self.shape, self.batch = shape, batch
        scale = 0.02
        self.layers = [
            {name: random(*size, scale=scale) for name, size in shape.products.items()}
            for _ in range(shape.num_layers)
        ]
        self.head = random(shape.vocab, shape.hidden, scale=scale)
        self.norm = random(shape.hidden)
        self.set_batch(batch, context)

    def set_batch(self, batch: int, context: int) -> None:
        shape, self.batch = self.shape, batch
        table_len = -(-context // BLOCK_SIZE)
        caches = (
            shape.num_layers,
            2,
            batch * table_len,
            BLOCK_SIZE,
            shape.num_kv_heads,
            shape.head_dim,
        )
        self.caches = random(*caches)
        at = {"dtype": torch.int32, "device": DEVICE}
        self.tables = torch.arange(batch * table_len, **at).view(batch, table_len)
        self.starts = torch.arange(batch + 1, **at)
        self.lens = torch.full((batch,), context, **at)
        self.slots = self.tables[:, -1].long() * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
        angle = torch.rand(batch, shape.head_dim // 2, device=DEVICE)
        self.cos, self.sin = angle.cos().to(BF16), angle.sin().to(BF16)
        self.workspace = DecodeWorkspace.allocate(
            batch, context, shape.num_heads, shape.num_kv_heads, shape.head_dim, DEVICE,
            few=decode.few_sequences(DEVICE, shape.num_kv_heads),
        )  # fmt: skip
        self.x = random(batch, shape.hidden)
        self.rows = torch.arange(batch, device=DEVICE)

    def step(self, variant: Variant = Variant(), *, attends: bool = True) -> Tensor:
        shape = self.shape
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        plan_decode(self.starts, self.lens, self.workspace)
        residual = F.embedding(self.rows, self.x)
        x = rms_norm(residual, self.norm, 1e-5)
        for layer, cache in zip(self.layers, self.caches, strict=True):
            qkv = variant.linear(x, layer["qkv"])
            q, k, v = (
                part.view(self.batch, -1, shape.head_dim)
                for part in qkv.split([q_size, kv_size, kv_size], dim=1)
            )
            out = q
            if attends:
                new = None
                if variant.turns and not variant.in_triton:
                    new = NewTokens(k, v, self.cos, self.sin)
                else:
                    rotate_and_store(q, k, v, self.cos, self.sin, cache[0], cache[1], self.slots)
                out = torch.empty(q.shape, dtype=BF16, device=DEVICE)
                decode.decode_attention(
                    q, cache[0], cache[1], self.tables, self.starts, self.lens, self.workspace, out,
                    scale=shape.head_dim**-0.5, in_triton=variant.in_triton, new=new,
                    num_stages=variant.stages, num_programs=variant.num_programs(shape.num_kv_heads),
                )  # fmt: skip
            x = variant.linear(out.reshape(self.batch, -1), layer["o"])
            x, residual = add_rms_norm(x, residual, self.norm, 1e-5)
            x = variant.gated(x, layer["gate_up"])
            x, residual = add_rms_norm(variant.linear(x, layer["down"]), residual, self.norm, 1e-5)
        return variant.linear(x, self.head)

    def floor_ms(self) -> float:
        cache = 2 * self.caches.numel()
        return (self.shape.num_bytes + cache) / READ_TBPS / 1e9


def model() -> Iterator[str]:
    """ms per step of the 8B shape, context 256, in a graph."""
    yield from steps(Model(LLAMA_8B, 1, 256))


def part_of_2() -> Iterator[str]:
    """The same for one rank of two, without its all-reduces."""
    yield from steps(Model(LLAMA_8B.part(2), 1, 256))


def steps(m: Model) -> Iterator[str]:
    first = None  # sequence 0 is the same in every batch
    base = {}
    variants = {
        "cublas": Variant("cublas", in_triton=True),
        "ours": Variant(),
        "turned apart": Variant(turns=False),
        "invariant": Variant("invariant", turns=False),
        "triton attention": Variant(in_triton=True),
        "2 stages": Variant(in_triton=True, stages=2),
    }
    for batch in (1, 8, 32):
        m.set_batch(batch, 256)
        mine = [m.x[:1], m.caches[:, :, :16], m.cos[:1], m.sin[:1]]
        first = first or [part.clone() for part in mine]
        for part, value in zip(mine, first, strict=True):
            part.copy_(value)
        base[batch] = m.step()[0].clone()
        other = m.step(variants["cublas"])[0]
        error = ((base[batch] - other).abs().max() / other.abs().max()).item()
        row = {}
        for name, variant in variants.items():
            row[name] = time_us([lambda v=variant: m.step(v)])
        row["no attention"] = time_us([lambda: m.step(attends=False)])
        row["no pdl"] = without_pdl(lambda: time_us([m.step]))
        row["prefer shared"] = preferring_shared(lambda: time_us([m.step]))
        times = ", ".join(f"{name} {us / 1e3:.3f}" for name, us in row.items())
        yield f"batch {batch}: {times}; floor {m.floor_ms():.3f} ms"
        yield f"    row 0 as alone: {torch.equal(base[batch], base[1])}; from cublas {error:.1e}"
    m.set_batch(1, 256)
    result: list[Tensor] = []
    graph = graph_of([lambda: result.append(m.step())])
    want, num_wrong = result[-1].clone(), 0
    for _ in range(100):
        result[-1].zero_()
        graph.replay()
        num_wrong += not torch.equal(result[-1], want)
    yield f"100 replays that follow each other: {num_wrong} differ"


def without_pdl(call: Callable[[], float]) -> float:
    before, launch._has_dependent_launch = launch._has_dependent_launch, lambda _: False
    try:
        return call()
    finally:
        launch._has_dependent_launch = before


def preferring_shared(call: Callable[[], float]) -> float:
    """With multiprocessors set up for shared memory whatever runs, so that none is set up anew."""
    from cuda.bindings import driver

    driver.cuCtxSetCacheConfig(driver.CUfunc_cache.CU_FUNC_CACHE_PREFER_SHARED)
    try:
        return call()
    finally:
        driver.cuCtxSetCacheConfig(driver.CUfunc_cache.CU_FUNC_CACHE_PREFER_NONE)


# --- products

TILES = {
    1: [Tile(1, 6), Tile(1, 8), Tile(2, 5)],
    4: [Tile(1, 9), Tile(2, 3), Tile(2, 4)],
    8: [Tile(1, 7), Tile(2, 3), Tile(4, 2)],
    16: [Tile(1, 5), Tile(2, 3), Tile(4, 2)],
}


def products() -> Iterator[str]:
    """GB/s of the weight, back to back: cublas, ours (the tile), Triton's, and other tiles."""
    shapes = {
        **LLAMA_8B.products,
        "head": (128256, 4096),
        **{f"{name}/2": size for name, size in LLAMA_8B.part(2).products.items()},
    }
    for name, (num_out, num_in) in shapes.items():
        num_bytes = 2 * num_out * num_in
        weights = [random(num_out, num_in, scale=0.02) for _ in range(num_copies(num_bytes))]
        is_gated = name.startswith("gate_up")
        for num_rows, tiles in TILES.items():
            x = random(num_rows, num_in)
            usual = few_rows.choose_tile(num_rows)
            calls: dict[str, Callable[[Tensor], object]] = {
                "cublas": lambda w: F.linear(x, w),
                **{
                    show(tile): lambda w, t=tile: multiply_few_rows(x, w, is_gated=is_gated, tile=t)
                    for tile in (usual, *tiles)
                },
            }
            triton = invariant_linear.linear_silu_and_mul if is_gated else invariant_linear.linear
            calls["triton"] = lambda w: triton(x, w)
            us = {
                key: time_us([lambda w=w: call(w) for w in weights], 5)
                for key, call in calls.items()
            }
            cells = "  ".join(f"{key} {gbps(num_bytes, value)}" for key, value in us.items())
            yield f"{name} {num_rows} x {num_out}x{num_in}: {cells}  (best {min(us.values()):.1f} us)"


def show(tile: Tile) -> str:
    return f"{tile.num_tiles}.{tile.depth}"


# --- attention and what is between


def attention_call(
    batch: int, context: int, shape: Shape, split: int = SPLIT
) -> tuple[list[Callable[[int | None, int], None]], int]:
    num_bytes = 2 * 2 * batch * context * shape.num_kv_heads * shape.head_dim
    table_len = -(-context // BLOCK_SIZE)
    at = {"dtype": torch.int32, "device": DEVICE}
    copies = min(num_copies(num_bytes), 16)
    caches = random(copies, 2, batch * table_len, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    tables = torch.randperm(batch * table_len, device=DEVICE).to(torch.int32).view(batch, table_len)
    starts, lens = torch.arange(batch + 1, **at), torch.full((batch,), context, **at)
    q = random(batch, shape.num_heads, shape.head_dim)
    workspace = DecodeWorkspace.allocate(
        batch, context, shape.num_heads, shape.num_kv_heads, shape.head_dim, DEVICE, split=split
    )
    out = torch.empty_like(q)
    plan_decode(starts, lens, workspace)

    def call(copy: int, num_programs: int | None, num_stages: int) -> None:
        decode.decode_attention(
            q, caches[copy, 0], caches[copy, 1], tables, starts, lens, workspace, out,
            scale=shape.head_dim**-0.5, num_programs=num_programs, num_stages=num_stages,
            in_triton=num_stages > 0,
        )  # fmt: skip

    return [lambda n, s, c=c: call(c, n, s) for c in range(copies)], num_bytes


def decodes() -> Iterator[str]:
    """us of decode attention: length of a split / tile / programs for each multiprocessor / stages.

    Stages 0 is the kernel in CUDA C++.
    """
    before = decode._TILE
    for batch, context in [
        (1, 256),
        (1, 4096),
        (1, 131072),
        (8, 2048),
        (16, 1024),
        (32, 256),
        (32, 2048),
        (256, 384),
    ]:
        cells = []
        for split, tile in ((256, 64), (256, 128), (512, 64), (1024, 64)):
            decode._TILE = tile
            calls, num_bytes = attention_call(batch, context, LLAMA_8B, split)
            us = time_us([lambda c=c: c(None, 0) for c in calls], 5)
            cells.append((us, f"C++ {split} {us:.1f}"))
            if split == 1024:
                continue
            for per_processor, stages in ((1, 3), (2, 3), (2, 2), (4, 2)):
                n = -(-per_processor * NUM_PROCESSORS // LLAMA_8B.num_kv_heads)
                us = time_us([lambda c=c, n=n, s=stages: c(n, s) for c in calls], 5)
                cells.append((us, f"{split}/{tile}/{per_processor}/{stages} {us:.1f}"))
        decode._TILE = before
        best = ", ".join(
            cell for i, (_, cell) in enumerate(sorted(cells)) if i < 6 or cell.startswith("C++")
        )
        yield (
            f"{batch} x {context}: best {best}; worst {max(cells)[1]}"
            f"  (best {gbps(num_bytes, min(cells)[0])} GB/s)"
        )


def smalls() -> Iterator[str]:
    """us of the kernels between, one after the other with overlap, and without."""
    for rows in (1, 32, 16384):
        x, residual, weight = random(rows, 4096), random(rows, 4096), random(4096)
        gate_up = random(rows, 28672)
        heads = random(rows, 48, 128)
        cos, sin = random(rows, 64), random(rows, 64)
        caches = random(2, max(rows // 16, 1) + 1, 16, 8, 128)
        slots = torch.arange(rows, device=DEVICE)
        calls: dict[str, Call] = {
            "add_rms_norm": lambda: add_rms_norm(x, residual, weight, 1e-5),
            "silu_and_mul": lambda: silu_and_mul(gate_up),
            "rotate_and_store": lambda: rotate_and_store(
                heads[:, :32], heads[:, 32:40], heads[:, 40:], cos, sin, caches[0], caches[1], slots
            ),
        }
        cells = [
            f"{name} {time_us([call] * 20):.2f} / {without_pdl(lambda call=call: time_us([call] * 20)):.2f}"
            for name, call in calls.items()
        ]
        yield f"{rows} rows: " + ", ".join(cells)


SECTIONS: dict[str, Callable[[], Iterator[str]]] = {
    section.__name__: section for section in (check, model, part_of_2, products, decodes, smalls)
}


def compile_all(names: Sequence[str], timeout_s: float = 60) -> None:
    command = [sys.executable, __file__, "--compile-only", "--sections"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = [subprocess.Popen([*command, name], **quiet) for name in names]
    end = time.monotonic() + timeout_s
    for process in running:
        try:
            process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
    print(f"compiled in {timeout_s - end + time.monotonic():.0f} s", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--budget-s", type=float, default=80, help="no section begins after it")
    parser.add_argument("--compile-only", action="store_true", help="run without a clock")
    args = parser.parse_args()
    begin = time.monotonic()
    if not args.compile_only:
        compile_all(args.sections)
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name(DEVICE)}, torch {torch.__version__}", flush=True)
    for name in args.sections:
        start = time.monotonic()
        if start - begin > args.budget_s:
            print(f"== {name}: left out, {args.budget_s:.0f} s are spent", flush=True)
            continue
        print(f"== {name}: {(SECTIONS[name].__doc__ or '').strip()}", flush=True)
        try:
            for line in SECTIONS[name]():
                print("  " + line, flush=True)
        except Exception:
            print("  FAILED " + traceback.format_exc()[-900:], flush=True)
        torch.cuda.empty_cache()
        print(f"  ({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
