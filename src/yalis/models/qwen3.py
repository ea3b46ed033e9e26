# SPDX-License-Identifier: Apache-2.0
"""Qwen3, dense: the heads of q and k are normalised, and biases went."""

from __future__ import annotations

from yalis.fields import Fields
from yalis.models.qwen2 import DEFAULTS, qwen_windows
from yalis.models.traits import Family, Traits


def traits(fields: Fields) -> Traits:
    bias = fields.flag("attention_bias")
    return Traits(qkv_bias=bias, o_bias=bias, has_qk_norm=True, windows=qwen_windows(fields))


FAMILY = Family(traits, DEFAULTS | {"head_dim": 128})
