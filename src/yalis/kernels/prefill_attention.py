# SPDX-License-Identifier: Apache-2.0
"""Causal attention of many new tokens over a paged cache, which holds their own keys and values already.

Ours, because torch 2.11 has no attention that reads paged memory as it is: `torch.nn.attention.varlen`
takes no block table there, and FlexAttention's paging wants a mask built for every step. Tiles of keys
begin at multiples of TILE whatever the query's place, so a token's bits do not depend on how its prompt
was cut into chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from yalis.kernels.launch import begin, launch_options, wait

_NUM_ROWS = 128
_TILE = 64
_BLOCK_SEQS = 128


def prefill_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int | None = None,
    num_warps: int = 8,
    num_stages: int = 3,
) -> None:
    """Write out for every sequence that has more than one new token; leave other rows alone.

    Shapes as `decode_attention`'s. The new tokens of a sequence are the last of its context; each sees as
    many as `window` says, itself included, or all before it. Capturable: the launch covers any lengths that
    sum to q's rows.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_seqs, num_kv_heads = seq_lens.shape[0], key_cache.shape[2]
    group = num_heads // num_kv_heads
    num_queries = max(_NUM_ROWS // triton.next_power_of_2(group), 1)
    num_tiles = num_tokens // num_queries + num_seqs
    _prefill_kernel[(num_tiles, num_kv_heads)](
        q, key_cache, value_cache, block_tables, query_starts, seq_lens, out,
        num_seqs, window or 0, scale * 1.4426950408889634,
        q.stride(0), block_tables.stride(0), key_cache.stride(0), key_cache.stride(1), key_cache.stride(2),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=key_cache.shape[1],
        NUM_QUERIES=num_queries, BLOCK_GROUP=triton.next_power_of_2(group),
        BLOCK_DIM=triton.next_power_of_2(head_dim), BLOCK_SEQS=_BLOCK_SEQS, TILE=_TILE,
        HAS_WINDOW=window is not None, NUM_STAGES=num_stages, num_warps=num_warps, **launch_options(q.device),
    )  # fmt: skip


# What changes from step to step the compiler does not look at: nothing is compiled while serving.
@triton.jit(do_not_specialize=["num_seqs", "window", "table_stride"])
def _prefill_kernel(
    q, key_cache, value_cache, block_tables, query_starts, seq_lens, out,
    num_seqs, window, scale,
    q_stride, table_stride, cache_block_stride, cache_token_stride, cache_head_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NUM_QUERIES: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_SEQS: tl.constexpr,
    TILE: tl.constexpr, HAS_WINDOW: tl.constexpr, NUM_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    wait(PDL)
    # Longest first: the last tiles of a prompt see the most keys.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    # A sequence's tiles begin at query_start // NUM_QUERIES + its index: room for all, and no sum to make.
    seq = tl.cast(-1, tl.int32)
    for first_seq in range(0, num_seqs, BLOCK_SEQS):
        seqs = first_seq + tl.arange(0, BLOCK_SEQS)
        starts = tl.load(query_starts + seqs, seqs < num_seqs, other=0) // NUM_QUERIES + seqs
        seq += tl.sum(((starts <= tile) & (seqs < num_seqs)).to(tl.int32), 0)
    first_row = tl.load(query_starts + seq)
    num_new = tl.load(query_starts + seq + 1) - first_row
    first_query = (tile - first_row // NUM_QUERIES - seq) * NUM_QUERIES
    if (first_query >= num_new) | (num_new == 1):
        return

    # A row is one query of one head of the group: they share the keys that are read.
    row = tl.arange(0, NUM_QUERIES * BLOCK_GROUP)
    query, member = first_query + row // BLOCK_GROUP, row % BLOCK_GROUP
    dim, token = tl.arange(0, BLOCK_DIM), tl.arange(0, TILE)
    in_dim = dim < HEAD_DIM
    mask = ((query < num_new) & (member < GROUP))[:, None] & in_dim[None, :]
    q_row = (first_row + query).to(tl.int64)
    in_row = (kv_head * GROUP + member)[:, None] * HEAD_DIM + dim[None, :]
    queries = tl.load(q + q_row[:, None] * q_stride + in_row, mask, other=0.0)
    seq_len = tl.load(seq_lens + seq)
    position = seq_len - num_new + query
    block_table = block_tables + seq.to(tl.int64) * table_stride
    head_at = kv_head * cache_head_stride + dim

    peak = tl.full((NUM_QUERIES * BLOCK_GROUP,), float("-inf"), tl.float32)
    norm = tl.zeros((NUM_QUERIES * BLOCK_GROUP,), tl.float32)
    total = tl.zeros((NUM_QUERIES * BLOCK_GROUP, BLOCK_DIM), tl.float32)
    begin_key = 0
    if HAS_WINDOW:  # of the first query, which sees furthest back
        begin_key = tl.maximum(seq_len - num_new + first_query + 1 - window, 0) // TILE * TILE
    end = tl.minimum(seq_len - num_new + first_query + NUM_QUERIES, seq_len)
    for offset in tl.range(begin_key, end, TILE, num_stages=NUM_STAGES):
        key_position = offset + token
        is_there = key_position < end
        block = tl.load(block_table + key_position // BLOCK_SIZE, is_there, other=0).to(tl.int64)
        at = block * cache_block_stride + key_position % BLOCK_SIZE * cache_token_stride
        key_mask = is_there[:, None] & in_dim[None, :]
        key = tl.load(key_cache + at[:, None] + head_at[None, :], key_mask, other=0.0)
        value = tl.load(value_cache + at[:, None] + head_at[None, :], key_mask, other=0.0)
        score = tl.dot(queries, tl.trans(key)) * scale
        is_seen = key_position[None, :] <= position[:, None]
        if HAS_WINDOW:
            is_seen = is_seen & (key_position[None, :] > (position - window)[:, None])
        score = tl.where(is_seen, score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        if HAS_WINDOW:  # the window of a later query may begin in a later tile
            new_peak = tl.maximum(new_peak, -1e30)
        weight = tl.exp2(score - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        norm = norm * shrink + tl.sum(weight, 1)
        total = tl.dot(weight.to(value.dtype), value, total * shrink[:, None])
        peak = new_peak
    out_at = out + q_row[:, None] * (NUM_KV_HEADS * GROUP * HEAD_DIM) + in_row
    tl.store(out_at, (total / norm[:, None]).to(out.dtype.element_ty), mask)
