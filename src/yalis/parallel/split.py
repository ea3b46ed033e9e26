# SPDX-License-Identifier: Apache-2.0
"""Which part of a dimension a rank holds. Pure: the same answer on every rank, no torch."""

from __future__ import annotations


def even_split(size: int, num_ranks: int, rank: int) -> range:
    """The contiguous indices of `rank`, the first `size % num_ranks` ranks holding one more.

    Uneven shares are fine where the parts meet in a sum (a row-parallel layer's input): every rank
    contributes a tensor of the same shape, however many columns it summed over.
    """
    share, extra = divmod(size, num_ranks)
    first = rank * share + min(rank, extra)
    return range(first, first + share + (rank < extra))


def padded_split(size: int, num_ranks: int, rank: int) -> tuple[range, int]:
    """The indices of `rank` and the width that every rank's shard is padded to.

    For parts that meet side by side (a gather wants equal shapes): all padding comes after index
    `size - 1`, so the gathered tensor is cut to `size` and nothing moves.
    """
    width = -(-size // num_ranks)
    return range(min(rank * width, size), min((rank + 1) * width, size)), width


def kv_head_split(num_kv_heads: int, num_ranks: int, rank: int) -> range:
    """The key-value heads of `rank`: an even share, or one head that several ranks replicate.

    Query heads are split in order, so rank r's queries belong to the head at r * num_kv_heads /
    num_ranks. One of the two numbers must divide the other.
    """
    if num_kv_heads >= num_ranks:
        return even_split(num_kv_heads, num_ranks, rank)
    head = rank * num_kv_heads // num_ranks
    return range(head, head + 1)
