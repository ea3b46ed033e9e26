# SPDX-License-Identifier: Apache-2.0
"""Which backend attends: our kernels where they can, else torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from yalis.attention import AttentionBackend, CacheShape
from yalis.attention.sdpa import SdpaAttention
from yalis.device import has_kernels


def make_attention(
    shape: CacheShape,
    num_blocks: int,
    device: torch.device,
    *,
    num_heads: int,
    max_num_seqs: int,
    max_model_len: int,
    windows: Sequence[int | None],
    is_batch_invariant: bool = False,
) -> AttentionBackend:
    """A backend with its cache of `num_blocks`. `num_heads` are this rank's; `windows` as in `Traits`.

    With `is_batch_invariant` a token's bits follow from its sequence alone; of a backend that is not
    capturable, if it is given one token at a time.
    """
    reason = _why_not_paged(shape, device)
    if reason is None:
        from yalis.attention.paged import PagedAttention

        return PagedAttention(
            shape,
            num_blocks,
            device,
            num_heads=num_heads,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            windows=windows or (None,),
            is_batch_invariant=is_batch_invariant,
        )
    if reason:
        logging.getLogger("yalis").warning(
            "attention runs one sequence at a time and without CUDA graphs: %s", reason
        )
    return SdpaAttention(shape, num_blocks, device)


def _why_not_paged(shape: CacheShape, device: torch.device) -> str | None:
    """None if the kernels serve; empty where nobody would expect it."""
    if device.type != "cuda" or not has_kernels():
        return ""
    if shape.dtype == torch.float32:
        return 'the dtype is float32; use dtype="bfloat16"'
    return None
