# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a decoder, and the one place where each operation finds who computes it.

The torch code below is the specification: what the checkpoints' own code computes, with a rounding to the
tensor's type after each operation. Rows are tokens; every row is computed by itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x `[num_tokens, num_in]` W^T + b: `[num_tokens, num_out]`."""
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Each vector of `[..., size]` divided by its root mean square, then times `weight` `[size]`.

    The order of Llama's checkpoints: normalised in fp32, rounded to x's type, weighted in that type.
    """
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return weight * F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(rms_norm(s, weight, eps), s)` with s = x + residual, rounded; all `[num_tokens, size]`."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """`[num_tokens, 2 * size]`, gates first, to silu(gate) * up `[num_tokens, size]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Heads `[num_tokens, num_heads, head_dim]` of both, turned by their token's angles.

    Component i pairs with i + head_dim / 2. `cos` and `sin` are `[num_tokens, head_dim / 2]`.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
