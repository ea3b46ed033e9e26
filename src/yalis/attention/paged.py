# SPDX-License-Identifier: Apache-2.0
"""Attention on a GPU: one launch stores all sequences' keys and values, one or two attend for all of them;
of decodes one launch does all of it.

The kernels read lengths and blocks on the device, so a step waits for nothing and can be captured in a CUDA
graph. For 16-bit types; `sdpa.py` serves float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yalis.attention import AttentionLayer, AttentionMetadata, CacheShape, one_token_each
from yalis.kernels.decode_attention import can_turn, decode_attention, few_sequences
from yalis.kernels.decode_splits import DecodeWorkspace, plan_decode
from yalis.kernels.prefill_attention import prefill_attention
from yalis.kernels.rotary import rotate_and_store
from yalis.kernels.warp_attention import NewTokens

_MOST_TOKENS = 256  # that attend at once, each for itself


class PagedAttention:
    """Keys and values in one tensor each, `[num_layers, num_blocks, block_size, num_kv_heads, head_dim]`."""

    is_capturable = True

    def __init__(
        self,
        shape: CacheShape,
        num_blocks: int,
        device: torch.device,
        *,
        num_heads: int,
        max_num_seqs: int,
        max_model_len: int,
        windows: Sequence[int | None] = (None,),
        is_batch_invariant: bool = False,
    ) -> None:
        """`num_heads` are this rank's; `windows` of the layers, as in `AttentionLayer`.

        With `is_batch_invariant` a token's bits follow from its sequence alone, not from whether it was part
        of a prompt.
        """
        size = (shape.num_layers, num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
        self._keys = torch.empty(size, dtype=shape.dtype, device=device)
        self._values = torch.empty(size, dtype=shape.dtype, device=device)
        self._is_batch_invariant = is_batch_invariant
        num_rows = max(max_num_seqs, _MOST_TOKENS) if is_batch_invariant else max_num_seqs
        few = None
        if device.type == "cuda" and not is_batch_invariant:
            few = few_sequences(device, shape.num_kv_heads)
        self._workspace = DecodeWorkspace.allocate(
            num_rows, max_model_len, num_heads, shape.num_kv_heads, shape.head_dim, device,
            windows=windows, few=few,
        )  # fmt: skip

    def prepare(self, metadata: AttentionMetadata) -> PagedStep:
        # Layers read the plan early: an ordinary launch, the embedding, comes before the first.
        step = PagedStep(
            self._keys, self._values, self._workspace, metadata, self._is_batch_invariant
        )
        if not step.goes_one_by_one:
            plan_decode(metadata.query_starts, metadata.seq_lens, self._workspace)
        return step


@dataclass(frozen=True)
class PagedStep:
    keys: Tensor
    values: Tensor
    workspace: DecodeWorkspace
    metadata: AttentionMetadata
    is_batch_invariant: bool

    @property
    def goes_one_by_one(self) -> bool:
        """Whether tokens of prompts attend as if they were decoded."""
        return self.is_batch_invariant and self.metadata.max_query_len > 1

    def __call__(
        self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        at = self.metadata
        keys, values = self.keys[layer.idx], self.values[layer.idx]
        new = NewTokens(k, v, cos, sin)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        scale = q.shape[-1] ** -0.5
        where = (keys, values, at.block_tables, at.query_starts, at.seq_lens)
        if self._may_turn(layer) and can_turn(q, keys, values, new):
            decode_attention(
                q, *where, self.workspace, out, scale=scale, window=layer.window, new=new
            )
            return out
        rotate_and_store(
            q, k, v, cos, sin, keys, values, at.cache_indices,
            q_weight=layer.q_weight, k_weight=layer.k_weight, eps=layer.eps,
        )  # fmt: skip
        if self.goes_one_by_one:
            self._attend_one_by_one(q, keys, values, out, scale, layer.window)
            return out
        # A chunk of one token is a decode to the kernels: where there are chunks, both are asked.
        decode_attention(
            q, *where, self.workspace, out, scale=scale, window=layer.window,
            in_triton=True if self.is_batch_invariant else None,
        )  # fmt: skip
        if at.max_query_len > 1:
            prefill_attention(q, *where, out, scale=scale, window=layer.window)
        return out

    def _may_turn(self, layer: AttentionLayer) -> bool:
        """Whether new tokens may be stored while others attend. Chunks may be of blocks that another
        sequence of the same step reads; decodes are of their own.
        """
        all_decode = self.metadata.num_decodes == len(self.metadata.seq_lens)
        return all_decode and layer.q_weight is None and not self.is_batch_invariant

    def _attend_one_by_one(
        self, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, scale: float, window: int | None
    ) -> None:
        first = 0
        for at in one_token_each(self.metadata, _MOST_TOKENS):
            rows = slice(first, first + len(at.seq_lens))
            plan_decode(at.query_starts, at.seq_lens, self.workspace)
            decode_attention(
                q[rows], keys, values, at.block_tables, at.query_starts, at.seq_lens, self.workspace,
                out[rows], scale=scale, window=window, in_triton=True,
            )  # fmt: skip
            first = rows.stop
