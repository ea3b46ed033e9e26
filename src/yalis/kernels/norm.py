# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalisation, with and without the residual sum before it. One program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from yalis.kernels.launch import begin, launch_options, wait


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension: `[num_rows, size]` to a new tensor of that shape.

    In float32, rounded to x's type, then weighted in that type. Rows of x may be strided. Capturable.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, x, out, out, weight, eps, adds=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(rms_norm(s), s)` with s = x + residual rounded to their type; all `[num_rows, size]`. Capturable."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual, out, total, weight, eps, adds=True)
    return out, total


def _launch(
    x: Tensor,
    residual: Tensor,
    out: Tensor,
    total: Tensor,
    weight: Tensor,
    eps: float,
    *,
    adds: bool,
) -> None:
    num_rows, size = x.shape
    if not num_rows:
        return
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(num_rows,)](
        x, residual, out, total, weight, x.stride(0), residual.stride(0), eps,
        SIZE=size, BLOCK=block, ADDS=adds,
        num_warps=min(max(block // 512, 1), 16),
        **launch_options(x.device),
    )  # fmt: skip


@triton.jit
def _rms_norm_kernel(
    x, residual, out, total, weight, x_stride, residual_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    begin(PDL)
    scale = tl.load(weight + column, mask, other=0.0)
    wait(PDL)
    value = tl.load(x + row * x_stride + column, mask, other=0.0)
    if ADDS:
        other = tl.load(residual + row * residual_stride + column, mask, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
        tl.store(total + row * SIZE + column, value, mask)
    wide = value.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    normed = (wide * inverse).to(value.dtype)
    tl.store(out + row * SIZE + column, normed * scale, mask)
