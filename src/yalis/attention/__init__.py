# SPDX-License-Identifier: Apache-2.0
"""Attention over a paged cache of keys and values: what a model asks for, whoever computes it.

A backend owns the cache, because its layout is the backend's own business. The cache is an array of blocks;
a sequence's tokens lie in the blocks of its table, `block_size` to a block, in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheShape:
    """What one rank keeps of every token, and how many tokens make a block."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def bytes_per_block(self) -> int:
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim
        return per_token * self.block_size * self.dtype.itemsize


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the rows of one step lie: made once a step, the same for all layers. n sequences, t new tokens.

    - `query_starts` `[n + 1]` int32: sequence i has the rows from entry i up to entry i + 1.
    - `seq_lens` `[n]` int32: its tokens in the cache once this step's are stored.
    - `block_tables` `[n, width]` int32: its blocks; entries past its length name a block that exists, but
      that is not its own.
    - `cache_indices` `[t]` int32: block * block_size + offset of each new token (vLLM's slot_mapping).

    All on the model's device. The first `num_decodes` sequences have one new token each. `max_query_len` and
    `max_seq_len` are bounds known to the host. In a CUDA graph the tensors keep their addresses, the
    contents and with them the lengths change from replay to replay, and `max_seq_len` is the model's
    greatest length. What pads a graph's batch lies in a block of its own, past those that are handed out:
    beside decodes sequences of length 1, beside chunks sequences of none and tokens, past the last entry of
    `query_starts`, of no sequence. What a block holds past a sequence's length may be NaN: it must be left
    out, not multiplied by zero.
    """

    num_decodes: int
    max_query_len: int
    max_seq_len: int
    query_starts: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    cache_indices: Tensor


def one_token_each(metadata: AttentionMetadata, most: int) -> Iterator[AttentionMetadata]:
    """The same step, `most` tokens at a time, as sequences of one new token each. Waits for no device."""
    starts, num_tokens = metadata.query_starts, len(metadata.cache_indices)
    rows = torch.arange(num_tokens, dtype=torch.int32, device=starts.device)
    seqs = torch.repeat_interleave(starts.diff(), output_size=num_tokens)
    lens = metadata.seq_lens[seqs] - (starts[1:][seqs] - 1 - rows)
    for first in range(0, num_tokens, most):
        part = slice(first, min(first + most, num_tokens))
        yield AttentionMetadata(
            num_decodes=part.stop - first,
            max_query_len=1,
            max_seq_len=metadata.max_seq_len,
            query_starts=torch.arange(
                part.stop - first + 1, dtype=torch.int32, device=starts.device
            ),
            seq_lens=lens[part],
            block_tables=metadata.block_tables[seqs[part]],
            cache_indices=metadata.cache_indices[part],
        )


@dataclass(frozen=True)
class AttentionLayer:
    """What is particular to one layer's attention. A weight `[head_dim]` asks for its heads' RMSNorm."""

    idx: int
    window: int | None = None  # how many tokens one sees, itself included; None is all before it
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    eps: float = 0.0


class AttentionStep(Protocol):
    """Attention for one batch; the same for all layers."""

    def __call__(
        self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Normalise the heads of q and k, turn them to their positions, store k and v of the new tokens, then
        attend from q to everything its sequence has stored, or to the layer's window of it.

        The first two are `functional.prepare_heads`, whoever computes it: a GPU does all before attending
        in one launch. All rows are stored before any attends, because sequences of one step may share
        blocks. q `[num_tokens, num_heads, head_dim]`; k and v `[num_tokens, num_kv_heads, head_dim]`, whose
        rows may be strided and may be overwritten; cos and sin `[num_tokens, head_dim / 2]`. Returns q's
        shape, contiguous. Causal: a token sees its own sequence, up to itself, and nothing else.
        """
        ...


class AttentionBackend(Protocol):
    is_capturable: (
        bool  # whether steps can be part of a CUDA graph: then nothing waits for the device
    )

    def prepare(self, metadata: AttentionMetadata) -> AttentionStep:
        """What the layers of one step share, computed once."""
        ...
