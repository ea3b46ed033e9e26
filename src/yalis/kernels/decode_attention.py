# SPDX-License-Identifier: Apache-2.0
"""Attention of one new token per sequence over a paged cache (flash-decoding), in one launch.

A fixed number of programs share the splits of all sequences (decode_splits.py), so one captured launch
serves any lengths, and none is idle while another has a long context. Of a sequence's splits the program
that ends last adds all partial results, in order: the bits follow from the sequence, the kernel and the
length of splits, not from what runs beside it or who ends last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from yalis.kernels import warp_attention
from yalis.kernels.compiled import num_processors
from yalis.kernels.decode_splits import EVERYTHING, DecodeWorkspace, split_length
from yalis.kernels.launch import begin, launch_options, wait
from yalis.kernels.warp_attention import NewTokens

_TILE = 64


def decode_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    workspace: DecodeWorkspace,
    out: Tensor,
    *,
    scale: float,
    window: int | None = None,
    new: NewTokens | None = None,
    num_programs: int | None = None,
    num_stages: int = 3,
    in_triton: bool | None = None,
) -> None:
    """Write out for every sequence that has one new token, the last of its context; leave other rows alone.

    q `[num_tokens, num_heads, head_dim]` with strided rows; out the same, contiguous. Caches
    `[num_blocks, block_size, num_kv_heads, head_dim]` of equal strides, the last 1. block_tables
    `[num_seqs, max_num_blocks]` int32. query_starts `[num_seqs + 1]` int32: a sequence's first row in q;
    seq_lens `[num_seqs]` int32: its context with the new token, 0 for a sequence that is padding.
    `window` is one of the workspace's. `plan_decode` comes before, on the same stream. Capturable.

    With `new`, which `can_turn` must let pass, q is turned on the way, `new.k` turned and stored, and `new.v`
    stored; every sequence then has one new token. All but these is read early: an ordinary launch, such as
    any of torch's, must lie between whatever wrote it, the plan included, and this call.

    None as `in_triton` takes the faster kernel, which follows from the number of sequences; True the one
    below, False that of `warp_attention` wherever it can run. Raises ValueError for `new` without the latter.
    """
    split_starts, split = workspace.split_starts[window], workspace.split_for(len(seq_lens))
    can_warp = not in_triton and warp_attention.takes(q, key_cache, value_cache)
    if can_warp and (in_triton is False or _is_small(seq_lens.shape[0], key_cache)):
        warp_attention.attend(
            q, key_cache, value_cache, block_tables, query_starts, seq_lens,
            split_starts, workspace.tickets, workspace.sums, workspace.norms, out,
            split=split, most_splits=workspace.most_splits, window=window or EVERYTHING,
            scale=scale, new=new, num_programs=num_programs,
        )  # fmt: skip
        return
    if new is not None:
        raise ValueError("new tokens are given that can_turn refuses; call rotate_and_store before")
    num_seqs = seq_lens.shape[0]
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = key_cache.shape[2]
    group = num_heads // num_kv_heads
    num_programs = num_programs or _num_programs(q.device, num_kv_heads)
    _decode_kernel[(num_kv_heads, num_programs)](
        q, key_cache, value_cache, block_tables, query_starts, seq_lens,
        split_starts, workspace.tickets, workspace.sums, workspace.norms, out,
        num_seqs, window or EVERYTHING, scale * 1.4426950408889634,
        q.stride(0), block_tables.stride(0), block_tables.shape[1],
        key_cache.stride(0), key_cache.stride(1), key_cache.stride(2),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=key_cache.shape[1],
        BLOCK_GROUP=max(triton.next_power_of_2(group), 16), BLOCK_DIM=triton.next_power_of_2(head_dim),
        BLOCK_SEQS=workspace.room, SPLIT=split, MOST_SPLITS=workspace.most_splits, TILE=_TILE,
        NUM_STAGES=num_stages,
        num_warps=4, **launch_options(q.device),
    )  # fmt: skip


def can_turn(q: Tensor, key_cache: Tensor, value_cache: Tensor, new: NewTokens) -> bool:
    """Whether `decode_attention` does what `rotate_and_store` does, without norms of heads, on the way.

    q has a row for each sequence.
    """
    return (
        warp_attention.takes(q, key_cache, value_cache)
        and warp_attention.takes_new(new)
        and _is_small(q.shape[0], key_cache)
    )


def few_sequences(device: torch.device, num_kv_heads: int) -> int:
    """Of up to how many sequences short contexts leave multiprocessors free, so that latency counts."""
    return num_processors(device) // (2 * num_kv_heads)


def _is_small(num_seqs: int, key_cache: Tensor) -> bool:
    return num_seqs <= few_sequences(key_cache.device, key_cache.shape[2])


def _num_programs(device: torch.device, num_kv_heads: int) -> int:
    """How many programs share the splits of one key-value head: two for every multiprocessor in all."""
    if device.type != "cuda":
        return 4
    return -(-2 * num_processors(device) // num_kv_heads)


@triton.jit(do_not_specialize=["num_seqs", "window", "table_stride", "table_width"])
def _decode_kernel(
    q, key_cache, value_cache, block_tables, query_starts, seq_lens,
    split_starts, tickets, sums, norms, out,
    num_seqs, window, scale,
    q_stride, table_stride, table_width, cache_block_stride, cache_token_stride, cache_head_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_SEQS: tl.constexpr,
    SPLIT: tl.constexpr, MOST_SPLITS: tl.constexpr, TILE: tl.constexpr, NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    seqs = tl.arange(0, BLOCK_SEQS)
    begin(PDL)
    wait(PDL)
    # All that a split needs to be found is read at once, not one after the other.
    starts = tl.load(split_starts + seqs, seqs < num_seqs, other=2147483647)
    lens = tl.load(seq_lens + seqs, seqs < num_seqs, other=0)
    rows = tl.load(query_starts + seqs, seqs < num_seqs, other=0)
    num_all_splits = tl.load(split_starts + num_seqs)
    for split in range(tl.program_id(1), num_all_splits, tl.num_programs(1)):
        # A sequence without splits begins where the next one does: the last that begins so early has it.
        is_before = starts <= split
        seq = tl.sum(is_before.to(tl.int32), 0) - 1
        first_split = tl.max(tl.where(is_before, starts, 0), 0)
        num_splits = (
            tl.minimum(tl.min(tl.where(is_before, num_all_splits, starts), 0), num_all_splits)
            - first_split
        )
        is_it = seqs == seq
        q_row = tl.sum(tl.where(is_it, rows, 0), 0).to(tl.int64)
        seq_len = tl.sum(tl.where(is_it, lens, 0), 0)
        num_seen = tl.minimum(seq_len, window)
        length = split_length(num_seen, SPLIT, MOST_SPLITS)
        start = seq_len - num_seen + (split - first_split) * length
        total, peak, norm = _attend(
            q + q_row * q_stride, key_cache, value_cache, block_tables + seq.to(tl.int64) * table_stride,
            table_width, start, tl.minimum(start + length, seq_len), scale, kv_head,
            cache_block_stride, cache_token_stride, cache_head_stride,
            GROUP, HEAD_DIM, BLOCK_SIZE, BLOCK_GROUP, BLOCK_DIM, TILE, NUM_STAGES,
        )  # fmt: skip
        group, dim = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_DIM)
        mask = (group < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
        head = kv_head * GROUP + group
        out_at = out + (q_row * NUM_KV_HEADS * GROUP + head[:, None]) * HEAD_DIM + dim[None, :]
        if num_splits == 1:
            tl.store(out_at, (total / norm[:, None]).to(out.dtype.element_ty), mask)
        else:
            split_head = tl.cast(split, tl.int64) * NUM_KV_HEADS * GROUP + head
            tl.store(sums + split_head[:, None] * HEAD_DIM + dim[None, :], total, mask)
            tl.store(norms + split_head * 2, peak, group < GROUP)
            tl.store(norms + split_head * 2 + 1, norm, group < GROUP)
            # All threads' stores come before the ticket, and the ticket before the last one's loads.
            tl.debug_barrier()
            ticket_at = tickets + seq * NUM_KV_HEADS + kv_head
            if tl.atomic_add(ticket_at, 1, sem="acq_rel", scope="gpu") == num_splits - 1:
                tl.store(ticket_at, 0)
                merged = _merge(
                    sums, norms, first_split, num_splits, kv_head,
                    NUM_KV_HEADS, GROUP, HEAD_DIM, BLOCK_GROUP, BLOCK_DIM,
                )  # fmt: skip
                tl.store(out_at, merged.to(out.dtype.element_ty), mask)


@triton.jit
def _attend(
    q, key_cache, value_cache, block_table, table_width, start, end, scale, kv_head,
    cache_block_stride, cache_token_stride, cache_head_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr, TILE: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One split: sums of values weighted by exponentials, the greatest score and the sum of exponentials."""
    group, dim, token = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_DIM), tl.arange(0, TILE)
    in_dim = dim < HEAD_DIM
    q_at = q + (kv_head * GROUP + group)[:, None] * HEAD_DIM + dim[None, :]
    query = tl.load(q_at, (group < GROUP)[:, None] & in_dim[None, :], other=0.0)
    head_at = kv_head * cache_head_stride + dim
    peak = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_GROUP,), tl.float32)
    total = tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32)
    for offset in tl.range(start, end, TILE, num_stages=NUM_STAGES):
        position = offset + token
        is_there = position < end
        # Bounded by the table, not by the end, which is still on its way.
        entry = position // BLOCK_SIZE
        block = tl.load(block_table + entry, entry < table_width, other=0).to(tl.int64)
        at = block * cache_block_stride + position % BLOCK_SIZE * cache_token_stride
        mask = is_there[:, None] & in_dim[None, :]
        key = tl.load(key_cache + at[:, None] + head_at[None, :], mask, other=0.0)
        value = tl.load(value_cache + at[:, None] + head_at[None, :], mask, other=0.0)
        score = tl.dot(query, tl.trans(key)) * scale
        score = tl.where(is_there[None, :], score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        norm = norm * shrink + tl.sum(weight, 1)
        total = tl.dot(weight.to(value.dtype), value, total * shrink[:, None])
        peak = new_peak
    return total, peak, norm


@triton.jit
def _merge(
    sums, norms, first_split, num_splits, kv_head,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """The attention of one sequence's group of heads, from all of its splits in order."""
    group, dim = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_DIM)
    mask = (group < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    head = kv_head * GROUP + group
    peak = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_GROUP,), tl.float32)
    total = tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32)
    for split in tl.range(first_split, first_split + num_splits, num_stages=4):
        at = tl.cast(split, tl.int64) * NUM_KV_HEADS * GROUP + head
        # Past the first-level cache, which does not see what other programs write.
        split_peak = tl.load(norms + at * 2, group < GROUP, other=0.0, cache_modifier=".cg")
        split_norm = tl.load(norms + at * 2 + 1, group < GROUP, other=1.0, cache_modifier=".cg")
        split_total = tl.load(
            sums + at[:, None] * HEAD_DIM + dim[None, :], mask, other=0.0, cache_modifier=".cg"
        )
        new_peak = tl.maximum(peak, split_peak)
        shrink, share = tl.exp2(peak - new_peak), tl.exp2(split_peak - new_peak)
        norm = norm * shrink + split_norm * share
        total = total * shrink[:, None] + split_total * share[:, None]
        peak = new_peak
    return total / norm[:, None]
