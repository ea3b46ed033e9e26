# SPDX-License-Identifier: Apache-2.0
"""The gated activation of an MLP."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from yalis.kernels.launch import begin, launch_options, wait

# Small blocks end sooner; of many, large ones keep more reads on their way.
_BLOCK, _LARGE_BLOCK = 1024, 4096
_LARGE = 1 << 22


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of `[num_rows, 2 * size]`, gate first: a new `[num_rows, size]`. Capturable.

    silu is computed in float32 and rounded to the tensor's type before the product.
    """
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = _BLOCK if out.numel() < _LARGE else _LARGE_BLOCK
        _silu_and_mul_kernel[(num_rows, triton.cdiv(size, block))](
            gate_up, out, gate_up.stride(0), size, BLOCK=block, **launch_options(gate_up.device)
        )
    return out


@triton.jit
def gated(gate, up):
    """silu(gate) * up, rounded as the separate operations would."""
    wide = gate.to(tl.float32)
    return (wide / (1.0 + tl.exp(-wide))).to(gate.dtype) * up


@triton.jit
def _silu_and_mul_kernel(gate_up, out, stride, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    begin(PDL)
    wait(PDL)
    gate = tl.load(gate_up + row * stride + column, mask, other=0.0)
    up = tl.load(gate_up + row * stride + size + column, mask, other=0.0)
    tl.store(out + row * size + column, gated(gate, up), mask)
