# SPDX-License-Identifier: Apache-2.0
"""Attention by torch's scaled_dot_product_attention, one sequence at a time: no padding, any device.

It wins on CPU and is the plain reference for tests. It reads lengths on the host: a GPU wants one launch for
all sequences, which is another backend behind the same interface.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from yalis.attention import AttentionLayer, AttentionMetadata, CacheShape
from yalis.layers.functional import prepare_heads


class SdpaAttention:
    """Keys and values in one tensor each, `[num_layers, num_blocks * block_size, num_kv_heads, head_dim]`."""

    is_capturable = False  # reads lengths on the host

    def __init__(self, shape: CacheShape, num_blocks: int, device: torch.device) -> None:
        size = (shape.num_layers, num_blocks * shape.block_size, shape.num_kv_heads, shape.head_dim)
        self._block_size = shape.block_size
        self._keys = torch.empty(size, dtype=shape.dtype, device=device)
        self._values = torch.empty(size, dtype=shape.dtype, device=device)

    def prepare(self, metadata: AttentionMetadata) -> SdpaStep:
        starts, lengths = metadata.query_starts.tolist(), metadata.seq_lens.tolist()
        tables = metadata.block_tables.cpu().numpy()
        spans = [
            _Span(start, stop - start, length, self._place(table, length))
            for start, stop, length, table in zip(
                starts[:-1], starts[1:], lengths, tables, strict=True
            )
            if stop > start  # else it is padding
        ]
        return SdpaStep(self._keys, self._values, metadata.cache_indices.long(), tuple(spans))

    def _place(self, table: NDArray[np.int32], length: int) -> int | Tensor:
        """The first of a sequence's cache places if they follow each other, else all of them `[length]`."""
        size = self._block_size
        blocks = table[: -(-length // size)]
        if (np.diff(blocks) == 1).all():
            return int(blocks[0]) * size
        places = (blocks[:, None].astype(np.int64) * size + np.arange(size)).reshape(-1)[:length]
        return torch.from_numpy(places).to(self._keys.device)


@dataclass(frozen=True)
class _Span:
    """One sequence in a step: its rows of the batch, and its place in the cache."""

    row: int
    num_new: int
    length: int
    place: int | Tensor

    def of(self, cache: Tensor) -> Tensor:
        """The sequence's part of one layer's keys or values: a view where its blocks are neighbours."""
        if isinstance(self.place, int):
            return cache.narrow(0, self.place, self.length)
        return cache.index_select(0, self.place)


@dataclass(frozen=True)
class SdpaStep:
    keys: Tensor
    values: Tensor
    cache_indices: Tensor
    spans: tuple[_Span, ...]

    def __call__(
        self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        q, k = prepare_heads(q, k, cos, sin, layer.q_weight, layer.k_weight, layer.eps)
        out = torch.empty_like(q)
        keys, values = self.keys[layer.idx], self.values[layer.idx]
        keys.index_copy_(0, self.cache_indices, k)
        values.index_copy_(0, self.cache_indices, v)
        for span in self.spans:
            rows = slice(span.row, span.row + span.num_new)
            out[rows] = _attend(q[rows], span.of(keys), span.of(values), layer.window)
        return out


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One sequence: q `[num_new, heads, dim]`, its last tokens, over k and v `[length, kv_heads, dim]`.

    Consecutive query heads share a key head; the group is a dimension of its own, so that keys and
    values are never copied once per query head.
    """
    num_new, num_heads, head_dim = q.shape
    if window is not None:  # what the first new token does not see, none does
        seen = slice(max(0, len(k) - num_new + 1 - window), None)
        k, v = k[seen], v[seen]
    length, num_kv_heads, _ = k.shape
    grouped = q.view(num_new, num_kv_heads, num_heads // num_kv_heads, head_dim)
    if num_new == 1:
        # One token sees everything: let the group of query heads play the part of the tokens.
        k, v = k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)
        # On some devices the result's strides are those of the transposed keys.
        attended = F.scaled_dot_product_attention(grouped, k, v)
        return attended.reshape(num_new, num_heads, head_dim)
    grouped = grouped.permute(1, 2, 0, 3)
    k = k.transpose(0, 1).unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)
    v = v.transpose(0, 1).unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)
    if num_new == length and (window is None or length <= window):
        attended = F.scaled_dot_product_attention(grouped, k, v, is_causal=True)
    else:
        mask = torch.ones(num_new, length, dtype=torch.bool, device=q.device).tril(length - num_new)
        if window is not None:
            mask &= mask.new_ones(mask.shape).triu(length - num_new + 1 - window)
        attended = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
    return attended.permute(2, 0, 1, 3).reshape(num_new, num_heads, head_dim)
