# SPDX-License-Identifier: Apache-2.0
"""y = x W^T for up to 16 rows of x at the speed of reading W: csrc/few_rows.cuh, compiled when first needed.

While the kernel before it ends, each block has its first weights on their way into shared memory, which it
fills: memory is busy all the time. A row's bits depend on nothing but the row.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from yalis.kernels.compiled import (
    ENTRY,
    NUM_THREADS,
    NUMBERS,
    arch_of,
    can_run,
    launch,
    num_processors,
    stream_of,
)

MOST_ROWS = 16
_NUM_WARPS = NUM_THREADS // 32
_ITEM, _CHUNK = 64, 128  # inputs that a warp fetches at once, and then takes before the next warp's
_NUM_ANSWERS = 16
# Of a multiprocessor's 228 KB; a block takes a kilobyte itself, and the attention beside it some more.
_SHARED_BYTES = 190 << 10
# Of an even share of the passes, what a block has without asking: the slowest multiprocessor is through with
# it before the others have done the rest.
_GIVEN = 0.85


@dataclass(frozen=True)
class Tile:
    """How a block works. The bits of the result do not depend on it."""

    num_tiles: int  # of 16 rows of W, which share what is read of x
    depth: int  # items, of 64 inputs, that a warp has on their way


@dataclass(frozen=True)
class Spec:
    """Everything that the machine code depends on, apart from the sources."""

    dtype: torch.dtype
    num_rows: int  # of x that there is room for
    num_tiles: int
    depth: int
    is_gated: bool
    arch: str

    @property
    def shared_bytes(self) -> int:
        queues = self.depth * _item_bytes(self.num_rows, self.num_tiles)
        return _NUM_WARPS * queues + _rest_bytes(self.num_rows, self.num_tiles)

    def source(self) -> str:
        """The translation unit: the few lines that instantiate the kernel."""
        numbers = ", ".join(map(str, (self.num_rows, self.num_tiles, self.depth)))
        gated = str(self.is_gated).lower()
        return "\n".join(
            [
                '#include "few_rows.cuh"',
                f"using Kernel = yalis::FewRows<yalis::{NUMBERS[self.dtype]}, {numbers}, {gated}>;",
                f"static_assert(sizeof(yalis::Args) == {ctypes.sizeof(_Args)} && "
                f"Kernel::kSharedBytes == {self.shared_bytes} && yalis::kChunk == {_CHUNK}, "
                '"kernels/few_rows.py counts differently");',
                # With no more, the attention after it is ready on its multiprocessor when it ends.
                'extern "C" __global__ void __maxnreg__(64)',
                f"{ENTRY}(const __grid_constant__ yalis::Args args) {{",
                "    extern __shared__ __align__(16) char shared[];",
                "    Kernel(args, shared).run();",
                "}",
                "",
            ]
        )


class _Args(ctypes.Structure):
    """``Args`` of csrc/few_rows.cuh."""

    _fields_ = (
        ("x", ctypes.c_uint64),
        ("weight", ctypes.c_uint64),
        ("bias", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("x_stride", ctypes.c_uint64),
        ("weight_stride", ctypes.c_uint64),
        ("counter", ctypes.c_uint64),
        ("num_rows", ctypes.c_uint32),
        ("num_in", ctypes.c_uint32),
        ("num_out", ctypes.c_uint32),
        ("num_given", ctypes.c_uint32),
        ("num_ahead", ctypes.c_uint32),
    )


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is for this product: few rows of a 16-bit type, in reach of 16-byte copies."""
    return (
        0 < x.shape[0] <= MOST_ROWS
        and x.dtype in NUMBERS
        and weight.dtype == x.dtype
        and x.shape[1] > 0
        and all(_is_aligned(tensor) for tensor in (x, weight))
        and can_run(x.device)
    )


def _is_aligned(matrix: Tensor) -> bool:
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) % 8 == 0
        and matrix.shape[1] % 8 == 0
        and matrix.data_ptr() % 16 == 0
    )


def multiply_few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    is_gated: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """x `[num_rows, num_in]` and weight `[num_out, num_in]` to a new `[num_rows, num_out]`.

    `takes` says for which. Sums in float32, rounded once, bias `[num_out]` included. With `is_gated` the
    upper half of the weight's rows are gates, the lower their ups, and the result is silu(gate) * up,
    `[num_rows, num_out / 2]`, rounded as `silu_and_mul` does; then there is no bias.

    Capturable on a stream where it was called before. Graphs that were captured on the same stream must not
    be replayed at the same time.
    """
    if is_gated and bias is not None:
        raise ValueError(
            "a gated product has no bias; multiply without is_gated, then silu_and_mul"
        )
    num_rows, num_in = x.shape
    num_out = weight.shape[0]
    num_results = num_out // 2 if is_gated else num_out
    out = torch.empty((num_rows, num_results), dtype=x.dtype, device=x.device)
    if not num_results:
        return out
    num_blocks = min(num_processors(x.device), num_results)
    tile = tile or choose_tile(num_rows)
    num_passes = -(-num_out // (16 * tile.num_tiles))
    num_given, num_ahead = divide(num_passes, num_blocks, num_in, tile.depth)
    spec = spec_of(x.dtype, num_rows, tile, is_gated=is_gated, arch=arch_of(x.device))
    args = _Args(
        x.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr() if bias is not None else 0,
        out.data_ptr(),
        2 * x.stride(0),
        2 * weight.stride(0),
        counter(x.device).data_ptr(),
        num_rows,
        num_in,
        num_out,
        num_given,
        num_ahead,
    )
    launch(spec, args, x.device, num_blocks)
    return out


def divide(num_passes: int, num_blocks: int, num_in: int, depth: int) -> tuple[int, int]:
    """`num_given` and `num_ahead` of csrc/few_rows.cuh."""
    items_each = max(num_in // (_CHUNK * _NUM_WARPS), 1) * (_CHUNK // _ITEM)  # of a warp, at least
    num_ahead = 2 + depth // items_each
    num_given = int(_GIVEN * num_passes / num_blocks)
    return (num_given, num_ahead) if num_ahead <= min(num_given, _NUM_ANSWERS - 1) else (0, 0)


def counter(device: torch.device) -> Tensor:
    """Of the kernels of the current stream, which run one after the other. Zero between launches."""
    return _counter(device, stream_of(device))


@cache  # graphs hold its address
def _counter(device: torch.device, stream: int) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first product of few rows on this stream is captured; call it once before"
        )
    return torch.zeros(1, dtype=torch.int32, device=device)


def spec_of(dtype: torch.dtype, num_rows: int, tile: Tile, *, is_gated: bool, arch: str) -> Spec:
    """The kernel that a product with so many rows and this tile needs."""
    room = 1 << (num_rows - 1).bit_length()
    return Spec(dtype, room, tile.num_tiles, tile.depth, is_gated, arch)


def choose_tile(num_rows: int) -> Tile:
    """The tile for so many rows of x."""
    room = 1 << (num_rows - 1).bit_length()
    # All of x is read for each pass over a tile's outputs: with more rows of it, passes should be few.
    num_tiles = 1 if room <= 2 else 2
    item = _NUM_WARPS * _item_bytes(room, num_tiles)
    return Tile(num_tiles, (_SHARED_BYTES - _rest_bytes(room, num_tiles)) // item)


def _item_bytes(num_rows: int, num_tiles: int) -> int:
    return 2 * _ITEM * (16 * num_tiles + num_rows)


def _rest_bytes(num_rows: int, num_tiles: int) -> int:
    return 4 * (_NUM_WARPS * num_rows * num_tiles * 16 + _NUM_ANSWERS)
