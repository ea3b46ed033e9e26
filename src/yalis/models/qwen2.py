# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and Qwen2.5: biases on q, k and v alone."""

from __future__ import annotations

from yalis.fields import Fields
from yalis.models.traits import Family, Traits, windows

DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def traits(fields: Fields) -> Traits:
    return Traits(qkv_bias=True, windows=qwen_windows(fields))


def qwen_windows(fields: Fields) -> tuple[int | None, ...]:
    """Off unless config.json turns them on."""
    if not fields.flag("use_sliding_window"):
        return ()
    return windows(fields, first=fields.count("max_window_layers", least=0))


FAMILY = Family(traits, DEFAULTS)
