# SPDX-License-Identifier: Apache-2.0
"""What each kernel computes, in plain torch: the specification that tests and the benchmark hold them to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In float64, rounded once."""
    y = x.double() @ weight.double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    if q_weight is not None and k_weight is not None:
        q.copy_(rms_norm(q, q_weight, eps))
        k = rms_norm(k, k_weight, eps)
    q.copy_(_rotate(q, cos, sin))
    is_stored = slots >= 0
    block, offset = slots[is_stored] // key_cache.shape[1], slots[is_stored] % key_cache.shape[1]
    key_cache[block, offset] = _rotate(k, cos, sin)[is_stored]
    value_cache[block, offset] = v[is_stored]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    half = low.shape[-1]
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    return torch.cat((low * cos + -high * sin, high * cos + low * sin), dim=-1)


def attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
) -> Tensor:
    """All new tokens of all sequences, in float32, one sequence after the other."""
    out = torch.zeros_like(q)
    num_kv_heads, block_size = key_cache.shape[2], key_cache.shape[1]
    for seq, seq_len in enumerate(seq_lens.tolist()):
        first, end = query_starts[seq : seq + 2].tolist()
        if seq_len == 0 or first == end:
            continue
        position = torch.arange(seq_len, device=q.device)
        block = block_tables[seq, position // block_size].long()
        keys = key_cache[block, position % block_size].float()
        values = value_cache[block, position % block_size].float()
        grouped = q[first:end].float().unflatten(1, (num_kv_heads, -1))
        scores = torch.einsum("qhgd,khd->hgqk", grouped, keys) * scale
        is_hidden = position[None, :] > position[seq_len - (end - first) :, None]
        weights = scores.masked_fill(is_hidden, -torch.inf).softmax(-1)
        out[first:end] = torch.einsum("hgqk,khd->qhgd", weights, values).flatten(1, 2).to(q.dtype)
    return out
