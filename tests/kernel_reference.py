"""What yalis's kernels compute, in plain torch on a CPU: what `functional` specifies, and a paged cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from yalis.layers import functional


def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of CPU copies, which no kernel of ours computes, its results back on the device."""

    def compute(first: Tensor, *others: Any, **options: Any) -> Any:
        arguments = [x.cpu() if isinstance(x, Tensor) else x for x in (first, *others)]
        results = function(*arguments, **options)
        if isinstance(results, tuple):
            return tuple(result.to(first.device) for result in results)
        return results.to(first.device)

    return compute


rms_norm = on_cpu(functional.rms_norm)
add_rms_norm = on_cpu(functional.add_rms_norm)
_prepare_heads = on_cpu(functional.prepare_heads)


@on_cpu
def silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@on_cpu
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
    turned, k = _prepare_heads(q, k, cos, sin, q_weight, k_weight, eps)
    q.copy_(turned)
    is_stored = slots >= 0
    block, offset = slots[is_stored] // key_cache.shape[1], slots[is_stored] % key_cache.shape[1]
    key_cache[block, offset] = k[is_stored]
    value_cache[block, offset] = v[is_stored]


def attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
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
        distance = position[seq_len - (end - first) :, None] - position[None, :]
        is_hidden = (distance < 0) | (distance >= (window or seq_len))
        weights = scores.masked_fill(is_hidden, -torch.inf).softmax(-1)
        out[first:end] = torch.einsum("hgqk,khd->qhgd", weights, values).flatten(1, 2).to(q.dtype)
    return out
