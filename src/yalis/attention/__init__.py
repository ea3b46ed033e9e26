# SPDX-License-Identifier: Apache-2.0
"""Attention over the cache of keys and values: what a model asks for, whoever computes it.

A backend owns the cache, because its layout is the backend's own business.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from yalis.core import Batch


class AttentionStep(Protocol):
    """Attention for one batch; the same for all layers."""

    def __call__(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v of the new tokens, then attend from q to everything its sequence has stored.

        q `[num_tokens, num_heads, head_dim]`; k and v `[num_tokens, num_kv_heads, head_dim]`; returns
        q's shape. Causal: a token sees its own sequence, up to itself, and nothing else.
        """
        ...


class AttentionBackend(Protocol):
    def prepare(self, batch: Batch) -> AttentionStep:
        """What the layers of one step share, computed once."""
        ...
