# SPDX-License-Identifier: Apache-2.0
"""Attention by torch's scaled_dot_product_attention, one sequence at a time: no padding, any device.

It wins on CPU and as the plain reference for tests. A GPU wants one launch for all sequences, which is
another backend behind the same interface.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from yalis.core import Batch


class SdpaAttention:
    """Keys and values in one tensor each, `[num_layers, num_cache_tokens, num_kv_heads, head_dim]`.

    A sequence owns consecutive cache tokens, from the start that the scheduler chose.
    """

    def __init__(
        self,
        num_layers: int,
        num_cache_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_cache_tokens, num_kv_heads, head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)

    def prepare(self, batch: Batch) -> SdpaStep:
        spans, row = [], 0
        for num_new, num_cached, start in zip(
            batch.num_new, batch.num_cached, batch.starts, strict=True
        ):
            spans.append(_Span(row, num_new, num_cached, start))
            row += num_new
        return SdpaStep(self._keys, self._values, tuple(spans))


@dataclass(frozen=True)
class _Span:
    """One sequence in a step: its rows of the batch, and its place in the cache."""

    row: int
    num_new: int
    num_cached: int
    start: int


@dataclass(frozen=True)
class SdpaStep:
    keys: Tensor
    values: Tensor
    spans: tuple[_Span, ...]

    def __call__(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        layer_keys, layer_values = self.keys[layer_idx], self.values[layer_idx]
        for span in self.spans:
            rows = slice(span.row, span.row + span.num_new)
            length = span.num_cached + span.num_new
            # narrow, not a slice: past the cache's end it raises, where a slice would come up short
            keys = layer_keys.narrow(0, span.start, length)
            values = layer_values.narrow(0, span.start, length)
            keys[span.num_cached :] = k[rows]
            values[span.num_cached :] = v[rows]
            out[rows] = _attend(q[rows], keys, values, span.num_cached)
        return out


def _attend(q: Tensor, k: Tensor, v: Tensor, num_cached: int) -> Tensor:
    """One sequence: q `[num_new, heads, dim]` over k and v `[num_cached + num_new, kv_heads, dim]`.

    Consecutive query heads share a key head; the group is a dimension of its own, so that keys and
    values are never copied once per query head.
    """
    num_new, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    grouped = q.view(num_new, num_kv_heads, num_heads // num_kv_heads, head_dim)
    if num_new == 1:
        # One token sees everything: let the group of query heads play the part of the tokens.
        k, v = k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)
        return F.scaled_dot_product_attention(grouped, k, v).view(num_new, num_heads, head_dim)
    grouped = grouped.permute(1, 2, 0, 3)
    k = k.transpose(0, 1).unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)
    v = v.transpose(0, 1).unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)
    if num_cached == 0:
        attended = F.scaled_dot_product_attention(grouped, k, v, is_causal=True)
    else:
        shape = (num_new, num_cached + num_new)
        mask = torch.ones(shape, dtype=torch.bool, device=q.device).tril(num_cached)
        attended = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
    return attended.permute(2, 0, 1, 3).reshape(num_new, num_heads, head_dim)
