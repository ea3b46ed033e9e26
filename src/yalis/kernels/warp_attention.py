# SPDX-License-Identifier: Apache-2.0
"""Decode attention in CUDA C++ (csrc/decode_attention.cuh): all of a split's keys and values at once.

A block holds 256 tokens of one key-value head in registers, so a short context takes one trip to memory.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from yalis.kernels.compiled import ENTRY, NUMBERS, arch_of, can_run, launch, num_processors


@dataclass(frozen=True)
class Spec:
    """Everything that the machine code depends on, apart from the sources."""

    dtype: torch.dtype
    head_dim: int
    group: int  # query heads that share a key-value head
    turns: bool  # q and the new keys, and stores the new tokens
    arch: str

    @property
    def shared_bytes(self) -> int:
        return 0

    def source(self) -> str:
        # With so many registers a block of few_rows.cuh fits on the multiprocessor beside one of this.
        return f"""#include "decode_attention.cuh"
using Kernel = yalis::DecodeAttention<yalis::{NUMBERS[self.dtype]}, {self.head_dim}, {self.group},
                                      {str(self.turns).lower()}>;
static_assert(sizeof(yalis::AttentionArgs) == {ctypes.sizeof(_Args)},
              "kernels/warp_attention.py packs the arguments differently");
extern "C" __global__ void __maxnreg__(192)
{ENTRY}(const __grid_constant__ yalis::AttentionArgs args) {{
    __shared__ Kernel::Shared shared;
    Kernel(args, shared).run();
}}
"""


class _Args(ctypes.Structure):
    """``AttentionArgs`` of csrc/decode_attention.cuh."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("q", "keys", "values")),
        *((name, ctypes.c_uint64) for name in ("new_keys", "new_values", "cos", "sin")),
        *((name, ctypes.c_uint64) for name in ("tables", "query_starts", "seq_lens")),
        *((name, ctypes.c_uint64) for name in ("split_starts", "tickets", "sums", "norms", "out")),
        *((name, ctypes.c_uint64) for name in ("q_stride", "new_stride", "angle_stride")),
        *((name, ctypes.c_uint64) for name in ("token_stride", "head_stride", "table_stride")),
        *((name, ctypes.c_uint32) for name in ("num_seqs", "num_kv_heads", "block_size")),
        *((name, ctypes.c_uint32) for name in ("split", "most_splits", "window")),
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True)
class NewTokens:
    """What a step brings to the cache, not yet turned: a row for each of q, as for `rotate_and_store`."""

    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor


def takes_new(new: NewTokens) -> bool:
    """Whether the kernel can turn and store these, where `takes` says that it can attend."""
    rows = (new.k, new.v, new.cos, new.sin)
    return (
        new.k.stride() == new.v.stride()
        and new.cos.stride() == new.sin.stride()
        and new.k.stride(1) == new.k.shape[2]
        and all(tensor.stride(-1) == 1 and tensor.stride(0) % 8 == 0 for tensor in rows)
        and all(tensor.data_ptr() % 16 == 0 for tensor in rows)
    )


def takes(q: Tensor, key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether the kernel is for these: 16-bit types, usual heads, a cache without gaps between blocks."""
    num_heads, head_dim = q.shape[1:]
    return (
        q.dtype in NUMBERS
        and head_dim in (64, 128)
        and num_heads <= 8 * key_cache.shape[2]
        and q.stride(1) == head_dim
        and q.stride(0) % 8 == 0
        and key_cache.stride(0) == key_cache.shape[1] * key_cache.stride(1)
        and all(stride % 8 == 0 for stride in key_cache.stride()[:3])
        and all(tensor.data_ptr() % 16 == 0 for tensor in (q, key_cache, value_cache))
        and can_run(q.device)
    )


def attend(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    split_starts: Tensor,
    tickets: Tensor,
    sums: Tensor,
    norms: Tensor,
    out: Tensor,
    *,
    split: int,
    most_splits: int,
    window: int,
    scale: float,
    new: NewTokens | None = None,
    num_programs: int | None = None,
) -> None:
    """`decode_attention` with its workspace's tensors, in splits of at least `split` tokens. Capturable.

    With `new` it also does what `rotate_and_store` does, bit for bit, but leaves q as it is.
    """
    num_kv_heads, block_size = key_cache.shape[2], key_cache.shape[1]
    # A block for each multiprocessor, which holds but one: more would wait for their turn.
    num_programs = num_programs or max(num_processors(q.device) // num_kv_heads, 1)
    rows = (new.k, new.v, new.cos, new.sin) if new else ()
    tensors = (
        block_tables, query_starts, seq_lens, split_starts, tickets, sums, norms, out,
    )  # fmt: skip
    args = _Args(
        *(tensor.data_ptr() for tensor in (q, key_cache, value_cache)),
        *([tensor.data_ptr() for tensor in rows] or (0,) * 4),
        *(tensor.data_ptr() for tensor in tensors),
        2 * q.stride(0),
        2 * new.k.stride(0) if new else 0,
        2 * new.cos.stride(0) if new else 0,
        2 * key_cache.stride(1),
        2 * key_cache.stride(2),
        block_tables.stride(0),
        seq_lens.shape[0],
        num_kv_heads,
        block_size,
        split,
        most_splits,
        window,
        scale * 1.4426950408889634,
    )
    group = q.shape[1] // num_kv_heads
    spec = Spec(q.dtype, q.shape[2], group, new is not None, arch_of(q.device))
    launch(spec, args, q.device, num_kv_heads, num_programs)
