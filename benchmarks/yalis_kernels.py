# ruff: noqa: B023 -- every closure of a loop here is called before the loop goes on
"""yalis's kernels on one GPU: held to their reference, then timed beside torch, alone and as a decode step.

bf16, CUDA graphs, weights and caches that do not fit the L2 cache; the median of some replays. Sections run
until the time budget is spent, the most telling first: `--sections` picks some. First a process for each
section runs it without a clock, all at once, so that every kernel is compiled when the timing begins.
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
from yalis.kernels import launch
from yalis.kernels import prefill_attention as prefill
from yalis.kernels.activation import silu_and_mul
from yalis.kernels.linear import Tile, choose_tile, linear, linear_silu_and_mul
from yalis.kernels.norm import add_rms_norm, rms_norm
from yalis.kernels.rotary import rotate_and_store

DEVICE = torch.device("cuda", 0)
BF16 = torch.bfloat16
BLOCK_SIZE = 16
COLD_BYTES = 256 << 20  # several times the L2 cache
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
    for name, case in kernel_cases.ALL.items():
        start = time.monotonic()
        try:
            case(DEVICE, BF16)
            result = "ok"
        except Exception as error:
            result = "FAILED " + " ".join(str(error).split())[:300]
        yield f"{name:16} {result} ({time.monotonic() - start:.1f} s)"


def check_rows() -> Iterator[str]:
    """Whether a row's bits depend on the number of rows, and so on the kind of tensor core instruction."""
    for num_out, num_in in [(4096, 4096), (4096, 14336)]:
        x, weight = random(1024, num_in), random(num_out, num_in, scale=num_in**-0.5)
        exact = F.linear(x[:1].double(), weight.double())
        one = linear(x[:1], weight)
        equal = {
            m: bool(torch.equal(linear(x[:m], weight)[:1], one))
            for m in (2, 9, 17, 33, 65, 300, 1024)
        }
        cublas = {
            m: bool(torch.equal(F.linear(x[:m], weight)[:1], F.linear(x[:1], weight)))
            for m in (2, 17, 65, 1024)
        }
        error = (one.double() - exact).abs().max().item() / exact.abs().max().item()
        yield f"{num_out}x{num_in}: row 0 as alone {equal}; cublas {cublas}; error {error:.1e}"


# --- a whole decode step


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
        self.workspace = decode.DecodeWorkspace.allocate(
            batch, context, shape.num_heads, shape.num_kv_heads, shape.head_dim, DEVICE
        )
        self.x = random(batch, shape.hidden)

    def step(self, tiles: dict[str, Tile] | None = None, *, uses_cublas: bool = False) -> Tensor:
        shape = self.shape
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        tiles = tiles or {}

        def product(x: Tensor, name: str, weight: Tensor) -> Tensor:
            return F.linear(x, weight) if uses_cublas else linear(x, weight, tile=tiles.get(name))

        decode.plan_decode(self.starts, self.lens, self.workspace)
        residual = self.x
        x = rms_norm(residual, self.norm, 1e-5)
        for layer, cache in zip(self.layers, self.caches, strict=True):
            qkv = product(x, "qkv", layer["qkv"])
            q, k, v = (
                part.view(self.batch, -1, shape.head_dim)
                for part in qkv.split([q_size, kv_size, kv_size], dim=1)
            )
            rotate_and_store(q, k, v, self.cos, self.sin, cache[0], cache[1], self.slots)
            out = torch.empty(q.shape, dtype=BF16, device=DEVICE)
            decode.decode_attention(
                q, cache[0], cache[1], self.tables, self.starts, self.lens, self.workspace, out,
                scale=shape.head_dim**-0.5,
            )  # fmt: skip
            x = product(out.view(self.batch, -1), "o", layer["o"])
            x, residual = add_rms_norm(x, residual, self.norm, 1e-5)
            if uses_cublas:
                x = silu_and_mul(F.linear(x, layer["gate_up"]))
            else:
                x = linear_silu_and_mul(x, layer["gate_up"], tile=tiles.get("gate_up"))
            x, residual = add_rms_norm(product(x, "down", layer["down"]), residual, self.norm, 1e-5)
        return product(x, "head", self.head)

    def floor_ms(self) -> float:
        cache = 2 * self.caches.numel()
        return (self.shape.num_bytes + cache) / READ_TBPS / 1e9


def model() -> Iterator[str]:
    """ms per step of the 8B shape, context 256, in a graph; the last tiles are early's winners."""
    m = Model(LLAMA_8B, 1, 256)
    first = None  # sequence 0 is the same in every batch
    base = {}
    for batch in (1, 8, 32):
        m.set_batch(batch, 256)
        mine = [m.x[:1], m.caches[:, :, :16], m.cos[:1], m.sin[:1]]
        first = first or [part.clone() for part in mine]
        for part, value in zip(mine, first, strict=True):
            part.copy_(value)
        logits = m.step()
        base[batch] = logits[0].clone()
        other = m.step(uses_cublas=True)
        error = ((logits - other).abs().max() / other.abs().max()).item()
        row = {
            "cublas": time_us([lambda: m.step(uses_cublas=True)]),
            "ours": time_us([m.step]),
            "no pdl": without_pdl(lambda: time_us([m.step])),
        }
        for early in (1024, 2048, 4096):
            tiles = early_tiles(batch, early)
            row[f"early {early}"] = time_us([lambda tiles=tiles: m.step(tiles)])
        times = ", ".join(f"{name} {us / 1e3:.3f}" for name, us in row.items())
        same = bool(torch.equal(base[batch], base[1]))
        yield f"batch {batch}: {times}; floor {m.floor_ms():.3f} ms"
        yield f"    row 0 as alone: {same}; largest difference from cublas {error:.1e}"
    m.set_batch(1, 256)
    tiles = early_tiles(1, 2048)
    result: list[Tensor] = []
    graph = graph_of([lambda: result.append(m.step(tiles))])
    want, num_wrong = result[-1].clone(), 0
    for _ in range(300):
        result[-1].zero_()
        graph.replay()
        num_wrong += not torch.equal(result[-1], want)
    yield f"300 replays that follow each other: {num_wrong} differ"


def early_tiles(batch: int, early: int) -> dict[str, Tile]:
    return {
        name: replace(choose_tile(batch, is_gated=name == "gate_up"), num_early=early)
        for name in ("qkv", "o", "gate_up", "down", "head")
    }


def without_pdl(call: Callable[[], float]) -> float:
    before, launch._has_dependent_launch = launch._has_dependent_launch, lambda _: False
    try:
        return call()
    finally:
        launch._has_dependent_launch = before


def parts() -> Iterator[str]:
    """ms per step of one rank's part, without its all-reduces."""
    for name, shape in {
        "8B / 2": LLAMA_8B.part(2),
        "70B / 2, 16 layers": replace(LLAMA_70B.part(2), num_layers=16),
    }.items():
        m = Model(shape, 1, 256)
        for batch in (1, 8, 32):
            m.set_batch(batch, 256)
            ours, cublas = (
                time_us([m.step]) / 1e3,
                time_us([lambda m=m: m.step(uses_cublas=True)]) / 1e3,
            )
            yield f"{name}, batch {batch}: ours {ours:.3f}, cublas {cublas:.3f}, floor {m.floor_ms():.3f} ms"
        del m


# --- single kernels

FEW_ROWS = [
    Tile(16, 8, 256, 2, 5), Tile(16, 8, 512, 4, 4), Tile(16, 8, 256, 4, 5), Tile(16, 8, 512, 2, 3),
    Tile(32, 8, 256, 4, 4), Tile(32, 8, 512, 8, 3), Tile(64, 8, 128, 4, 5),
]  # fmt: skip
FEW_ROWS_GATED = [
    Tile(16, 8, 256, 2, 5), Tile(16, 8, 256, 4, 4), Tile(16, 8, 128, 4, 6), Tile(16, 8, 512, 4, 2),
    Tile(32, 8, 128, 4, 5), Tile(32, 8, 256, 8, 3),
]  # fmt: skip
ROWS_32 = [
    Tile(32, 32, 128, 4, 5), Tile(32, 32, 256, 4, 3), Tile(16, 32, 256, 4, 3), Tile(64, 32, 128, 4, 4),
    Tile(128, 32, 64, 4, 6),
]  # fmt: skip
ROWS_32_GATED = [
    Tile(32, 32, 128, 4, 4),
    Tile(32, 32, 64, 4, 6),
    Tile(64, 32, 64, 4, 5),
    Tile(64, 32, 128, 4, 3),
]


def show(tile: Tile) -> str:
    return f"{tile.num_out}.{tile.num_rows}.{tile.num_in}w{tile.num_warps}s{tile.num_stages}"


def few_rows() -> Iterator[str]:
    """GB/s of the weight for each tile (outputs.rows.inputs w warps s stages), back to back with overlap."""
    products = LLAMA_8B.products
    yield from product_lines(1, {**products, "head": (128256, 4096)}, FEW_ROWS, FEW_ROWS_GATED)
    yield from product_lines(32, products, ROWS_32, ROWS_32_GATED)


def product_lines(
    num_rows: int, products: dict[str, tuple[int, int]], tiles: list[Tile], gated: list[Tile]
) -> Iterator[str]:
    for name, (num_out, num_in) in products.items():
        num_bytes = 2 * num_out * num_in
        weights = [random(num_out, num_in, scale=0.02) for _ in range(num_copies(num_bytes))]
        x = random(num_rows, num_in)
        is_gated = name == "gate_up"
        product = linear_silu_and_mul if is_gated else linear
        found = {"cublas": time_us([lambda w=w: F.linear(x, w) for w in weights])}
        for tile in gated if is_gated else tiles:
            try:
                found[show(tile)] = time_us(
                    [lambda w=w, t=tile: product(x, w, tile=t) for w in weights]
                )
            except Exception as error:
                yield f"{show(tile)} cannot: {' '.join(str(error).split())[:120]}"
        cells = "  ".join(f"{key} {gbps(num_bytes, us)}" for key, us in found.items())
        yield f"{num_rows} x {num_out}x{num_in} {name}: {cells}  (best {min(found.values()):.1f} us)"


def attention_call(
    batch: int, context: int, shape: Shape
) -> tuple[list[Callable[[int], None]], int]:
    num_bytes = 2 * 2 * batch * context * shape.num_kv_heads * shape.head_dim
    table_len = -(-context // BLOCK_SIZE)
    at = {"dtype": torch.int32, "device": DEVICE}
    copies = min(num_copies(num_bytes), 16)
    caches = random(copies, 2, batch * table_len, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    tables = torch.randperm(batch * table_len, device=DEVICE).to(torch.int32).view(batch, table_len)
    starts, lens = torch.arange(batch + 1, **at), torch.full((batch,), context, **at)
    q = random(batch, shape.num_heads, shape.head_dim)
    workspace = decode.DecodeWorkspace.allocate(
        batch, context, shape.num_heads, shape.num_kv_heads, shape.head_dim, DEVICE
    )
    out = torch.empty_like(q)
    decode.plan_decode(starts, lens, workspace)

    def call(copy: int, num_programs: int) -> None:
        decode.decode_attention(
            q, caches[copy, 0], caches[copy, 1], tables, starts, lens, workspace, out,
            scale=shape.head_dim**-0.5, num_programs=num_programs,
        )  # fmt: skip

    return [lambda n, c=c: call(c, n) for c in range(copies)], num_bytes


def decodes() -> Iterator[str]:
    """us of decode attention by the length of a split and the programs for each multiprocessor."""
    processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    before = decode.SPLIT
    for batch, context in [
        (1, 256),
        (1, 1024),
        (1, 4096),
        (1, 131072),
        (32, 256),
        (32, 2048),
        (256, 1024),
    ]:
        cells = []
        for split in (128, 256, 512):
            decode.SPLIT = split
            calls, num_bytes = attention_call(batch, context, LLAMA_8B)
            for per_processor in (1, 2, 4):
                n = -(-per_processor * processors // LLAMA_8B.num_kv_heads)
                us = time_us([lambda c=c, n=n: c(n) for c in calls], 5)
                cells.append((us, f"{split}/{per_processor} {us:.1f}"))
        best = min(cells)[0]
        decode.SPLIT = before
        yield (
            f"{batch} x {context}: "
            + "  ".join(cell for _, cell in cells)
            + f"  (best {gbps(num_bytes, best)} GB/s)"
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


# --- prefill

MANY_ROWS = [
    Tile(128, 128, 64, 4, 4), Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3), Tile(256, 128, 64, 8, 3),
]  # fmt: skip


def products_of_prompts() -> Iterator[str]:
    """TFLOP/s of 16384 rows."""
    for name, (num_out, num_in) in LLAMA_8B.products.items():
        x, weight = random(16384, num_in), random(num_out, num_in, scale=0.02)
        num_flops = 2 * 16384 * num_out * num_in
        found = {"cublas": time_us([lambda: F.linear(x, weight)] * 2, 5)}
        for tile in MANY_ROWS:
            try:
                found[show(tile)] = time_us([lambda t=tile: linear(x, weight, tile=t)] * 2, 5)
            except Exception as error:
                yield f"{show(tile)} cannot: {' '.join(str(error).split())[:120]}"
        yield f"{name}: " + "  ".join(
            f"{key} {num_flops / us / 1e6:.0f}" for key, us in found.items()
        )


def prompts() -> Iterator[str]:
    """TFLOP/s of prefill attention: rows/tile/warps/stages, beside torch's flash attention without paging."""
    shape = LLAMA_8B
    rows, tile = prefill._NUM_ROWS, prefill._TILE
    for batch, length in [(8, 2048), (1, 8192), (1, 128)]:
        num_flops = 4 * shape.num_heads * shape.head_dim * batch * length * (length + 1) / 2
        table_len = length // BLOCK_SIZE
        caches = random(2, batch * table_len, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
        at = {"dtype": torch.int32, "device": DEVICE}
        tables = torch.arange(batch * table_len, **at).view(batch, table_len)
        starts, lens = torch.arange(batch + 1, **at) * length, torch.full((batch,), length, **at)
        q = random(batch * length, shape.num_heads, shape.head_dim)
        out = torch.empty_like(q)
        cells = []
        for variant in [
            (128, 64, 8, 3),
            (128, 64, 8, 2),
            (128, 128, 8, 2),
            (64, 64, 4, 3),
            (64, 64, 4, 2),
        ]:
            prefill._NUM_ROWS, prefill._TILE, warps, stages = variant

            def call(warps: int = warps, stages: int = stages) -> None:
                prefill.prefill_attention(
                    q, caches[0], caches[1], tables, starts, lens, out,
                    scale=shape.head_dim**-0.5, num_warps=warps, num_stages=stages,
                )  # fmt: skip

            try:
                us = time_us([call] * 2, 5)
                cells.append(f"{'/'.join(map(str, variant))} {num_flops / us / 1e6:.0f}")
            except Exception as error:
                cells.append(f"{variant} cannot: {' '.join(str(error).split())[:80]}")
        prefill._NUM_ROWS, prefill._TILE = rows, tile
        keys, values = (cache.view(-1, shape.num_kv_heads, shape.head_dim) for cache in caches)
        try:
            from torch.nn.attention.varlen import varlen_attn

            us = time_us(
                [
                    lambda: varlen_attn(
                        q, keys, values, starts, starts, length, length, window_size=(-1, 0)
                    )
                ]
                * 2,
                5,
            )
            cells.append(f"torch varlen {num_flops / us / 1e6:.0f}")
        except Exception as error:
            cells.append(f"torch varlen cannot: {' '.join(str(error).split())[:80]}")
        yield f"{batch} x {length}: " + "  ".join(cells)


SECTIONS: dict[str, Callable[[], Iterator[str]]] = {
    section.__name__: section
    for section in (
        check,
        check_rows,
        model,
        few_rows,
        decodes,
        prompts,
        products_of_prompts,
        parts,
        smalls,
    )
}


def compile_all(names: Sequence[str], timeout_s: float = 150) -> None:
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
    parser.add_argument("--budget-s", type=float, default=240, help="no section begins after it")
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
