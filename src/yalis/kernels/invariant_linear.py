# SPDX-License-Identifier: Apache-2.0
"""y = x W^T for any number of rows, each row's bits the same however many rows there are, in Triton.

Few rows are bound by reading W. Each program multiplies a few rows of W by all rows of x on tensor cores and
goes through the inner dimension in order, so there is no second pass and nothing to agree on; many
small programs keep the memory busy. With dependent launch a program fetches the end of its weights while
the kernel before it still runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from yalis.kernels.activation import gated
from yalis.kernels.launch import begin, launch_options, wait


@dataclass(frozen=True)
class Tile:
    """What one program computes: `num_out` outputs of `num_rows` rows, `num_in` inputs at a time."""

    num_out: int
    num_rows: int
    num_in: int
    num_warps: int
    num_stages: int


def choose_tile(num_rows: int, *, is_gated: bool = False) -> Tile:
    """The tile for a product with so many rows. The bits do not depend on it."""
    if num_rows <= 16:
        return Tile(16, 8 if num_rows <= 8 else 16, 256, 2, 3 if is_gated else 5)
    if num_rows <= 32:
        return Tile(32, 32, 128, 4, 4)
    if num_rows <= 64:
        return Tile(64, 64, 128, 4, 2 if is_gated else 4)
    return Tile(128, 128, 64, 8, 3) if is_gated else Tile(128, 128, 64, 4, 4)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, tile: Tile | None = None
) -> Tensor:
    """x `[num_rows, num_in]` and weight `[num_out, num_in]` to `[num_rows, num_out]` in x's type. Capturable.

    Sums in float32, in the order of the inner dimension. Rows of x and weight may be strided.
    """
    return _launch(x, weight, bias, weight.shape[0], False, tile)


def linear_silu_and_mul(x: Tensor, weight: Tensor, *, tile: Tile | None = None) -> Tensor:
    """`silu_and_mul(linear(x, weight))`, bit for bit, without the matrix between. Capturable.

    weight `[2 * size, num_in]`, the gate's rows first; returns `[num_rows, size]`.
    """
    return _launch(x, weight, None, weight.shape[0] // 2, True, tile)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, num_out: int, is_gated: bool, tile: Tile | None
) -> Tensor:
    num_rows, num_in = x.shape
    out = torch.empty((num_rows, num_out), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    tile = tile or choose_tile(num_rows, is_gated=is_gated)
    grid = (triton.cdiv(num_out, tile.num_out) * triton.cdiv(num_rows, tile.num_rows),)
    _linear_kernel[grid](
        x, weight, bias if bias is not None else weight, out,
        num_rows, num_out, x.stride(0), weight.stride(0),
        NUM_IN=num_in, BLOCK_OUT=tile.num_out, BLOCK_ROWS=tile.num_rows, BLOCK_IN=tile.num_in,
        NUM_STAGES=tile.num_stages, HAS_BIAS=bias is not None, IS_GATED=is_gated,
        num_warps=tile.num_warps, **launch_options(x.device),
    )  # fmt: skip
    return out


@triton.jit
def _tile_of(at, k, NUM_IN: tl.constexpr, BLOCK_IN: tl.constexpr, AXIS: tl.constexpr):
    """The tile whose inner dimension begins at k; beyond NUM_IN it is zero."""
    if NUM_IN % BLOCK_IN == 0:
        return tl.load(at + k)
    inner = tl.expand_dims(k + tl.arange(0, BLOCK_IN) < NUM_IN, AXIS)
    return tl.load(at + k, mask=inner, other=0.0)


# One row is no special case: as a constant it costs x its pipeline, and a quarter of the speed.
@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x, weight, bias, out, num_rows, num_out, x_stride, weight_stride,
    NUM_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_IN: tl.constexpr,
    NUM_STAGES: tl.constexpr, HAS_BIAS: tl.constexpr, IS_GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Programs that run together share rows of W, then rows of x: eight tiles of rows, then the next outputs.
    num_row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    num_out_tiles = tl.cdiv(num_out, BLOCK_OUT)
    group_size = 8 * num_out_tiles
    group = tl.program_id(0) // group_size
    num_group_rows = tl.minimum(num_row_tiles - group * 8, 8)
    row_tile = group * 8 + tl.program_id(0) % group_size % num_group_rows
    out_tile = tl.program_id(0) % group_size // num_group_rows

    begin(PDL)
    output = out_tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inner = tl.arange(0, BLOCK_IN)
    # Rows past the end are read as the last one, and not stored.
    weight_row = tl.minimum(output, num_out - 1).to(tl.int64) * weight_stride
    x_row = tl.minimum(row, num_rows - 1).to(tl.int64) * x_stride
    w_at = weight + weight_row[:, None] + inner[None, :]
    x_at = x + x_row[None, :] + inner[:, None]
    up_at = w_at + tl.cast(num_out, tl.int64) * weight_stride

    # The last tile of W is fetched before the wait; the others are pipelined behind it, from the L2 cache.
    LAST: tl.constexpr = (NUM_IN - 1) // BLOCK_IN * BLOCK_IN
    last_w = _tile_of(w_at, LAST, NUM_IN, BLOCK_IN, 0)
    if IS_GATED:
        last_up = _tile_of(up_at, LAST, NUM_IN, BLOCK_IN, 0)
    wait(PDL)
    last_x = _tile_of(x_at, LAST, NUM_IN, BLOCK_IN, 1)
    total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    total_up = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    for k in tl.range(0, LAST, BLOCK_IN, num_stages=NUM_STAGES):
        x_tile = tl.load(x_at + k)
        total = tl.dot(tl.load(w_at + k), x_tile, total)
        if IS_GATED:
            total_up = tl.dot(tl.load(up_at + k), x_tile, total_up)
    total = tl.dot(last_w, last_x, total)
    if HAS_BIAS:
        total += tl.load(bias + tl.minimum(output, num_out - 1)).to(tl.float32)[:, None]
    result = total.to(out.dtype.element_ty)
    if IS_GATED:
        total_up = tl.dot(last_up, last_x, total_up)
        result = gated(result, total_up.to(out.dtype.element_ty))
    at = out + row.to(tl.int64)[None, :] * num_out + output[:, None]
    tl.store(at, result, (row < num_rows)[None, :] & (output < num_out)[:, None])
