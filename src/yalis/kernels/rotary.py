# SPDX-License-Identifier: Apache-2.0
"""Between the q/k/v product and attention: normalise and rotate heads, store keys and values in the cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from yalis.kernels.launch import begin, launch_options, wait

_HEADS_PER_PROGRAM = 8


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_indices: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate q in place; rotate k and store it, and v, in the paged cache. Capturable.

    q `[num_tokens, num_heads, head_dim]`, k and v `[num_tokens, num_kv_heads, head_dim]`: rows may be
    strided, heads may not. cos and sin `[num_tokens, >= head_dim / 2]` in q's type, of which the first
    half of a head is read. Caches `[num_blocks, block_size, num_kv_heads, head_dim]` of equal strides,
    the last 1. cache_indices `[num_tokens]` int32 or int64: block * block_size + offset of each token,
    negative for a token that is not stored. With `q_weight` and `k_weight` `[head_dim]`, each head is
    RMS-normalised first. Every operation is rounded to q's type, as the separate torch operations would.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if not num_tokens:
        return
    grid = (
        num_tokens,
        triton.cdiv(num_heads, _HEADS_PER_PROGRAM) + triton.cdiv(num_kv_heads, _HEADS_PER_PROGRAM),
    )
    _rotate_and_store_kernel[grid](
        q, k, v, cos, sin, key_cache, value_cache, cache_indices,
        q_weight if q_weight is not None else q, k_weight if k_weight is not None else k, eps,
        q.stride(0), k.stride(0), v.stride(0), cos.stride(0),
        key_cache.stride(0), key_cache.stride(1), key_cache.stride(2),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HALF=head_dim // 2,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2), BLOCK_SIZE=key_cache.shape[1],
        BLOCK_HEADS=_HEADS_PER_PROGRAM, NORMALISES=q_weight is not None,
        num_warps=2,
        enable_fp_fusion=False,  # a fused multiply-add would round once where torch rounds twice
        **launch_options(q.device),
    )  # fmt: skip


@triton.jit
def _rotate(low, high, cos, sin):
    # Each product and sum is rounded by itself: the 16-bit types' own operators do that.
    return low * cos + (-high) * sin, high * cos + low * sin


@triton.jit
def _normalise(low, high, weight, column, mask, eps, HALF: tl.constexpr):
    wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
    square = tl.sum(wide_low * wide_low, 1) + tl.sum(wide_high * wide_high, 1)
    inverse = tl.rsqrt(square / (2 * HALF) + eps)[:, None]
    low_weight = tl.load(weight + column, mask, other=0.0)[None, :]
    high_weight = tl.load(weight + HALF + column, mask, other=0.0)[None, :]
    return (
        (wide_low * inverse).to(low.dtype) * low_weight,
        (wide_high * inverse).to(high.dtype) * high_weight,
    )


@triton.jit
def _rotate_and_store_kernel(
    q, k, v, cos, sin, key_cache, value_cache, cache_indices, q_weight, k_weight, eps,
    q_stride, k_stride, v_stride, angle_stride,
    cache_block_stride, cache_token_stride, cache_head_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_HEADS: tl.constexpr, NORMALISES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    NUM_Q_PROGRAMS: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    column = tl.arange(0, BLOCK_HALF)
    begin(PDL)
    wait(PDL)
    in_half = column < HALF
    c = tl.load(cos + token * angle_stride + column, in_half, other=0.0)[None, :]
    s = tl.load(sin + token * angle_stride + column, in_half, other=0.0)[None, :]
    if part < NUM_Q_PROGRAMS:
        head = part * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        mask = (head < NUM_HEADS)[:, None] & in_half[None, :]
        at = q + token * q_stride + head[:, None] * (2 * HALF) + column[None, :]
        low = tl.load(at, mask, other=0.0)
        high = tl.load(at + HALF, mask, other=0.0)
        if NORMALISES:
            low, high = _normalise(low, high, q_weight, column, in_half, eps, HALF)
        low, high = _rotate(low, high, c, s)
        tl.store(at, low, mask)
        tl.store(at + HALF, high, mask)
    else:
        index = tl.load(cache_indices + token).to(tl.int64)
        if index >= 0:
            head = (part - NUM_Q_PROGRAMS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
            mask = (head < NUM_KV_HEADS)[:, None] & in_half[None, :]
            source = head[:, None] * (2 * HALF) + column[None, :]
            target = (index // BLOCK_SIZE) * cache_block_stride
            target += (index % BLOCK_SIZE) * cache_token_stride
            target += head[:, None] * cache_head_stride + column[None, :]
            low = tl.load(k + token * k_stride + source, mask, other=0.0)
            high = tl.load(k + token * k_stride + HALF + source, mask, other=0.0)
            v_low = tl.load(v + token * v_stride + source, mask, other=0.0)
            v_high = tl.load(v + token * v_stride + HALF + source, mask, other=0.0)
            if NORMALISES:
                low, high = _normalise(low, high, k_weight, column, in_half, eps, HALF)
            low, high = _rotate(low, high, c, s)
            tl.store(key_cache + target, low, mask)
            tl.store(key_cache + HALF + target, high, mask)
            tl.store(value_cache + target, v_low, mask)
            tl.store(value_cache + HALF + target, v_high, mask)
