# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and Qwen2.5: biases on q, k and v alone."""

from __future__ import annotations

from yalis.fields import Fields
from yalis.models.traits import Traits, qwen_windows


def traits(fields: Fields) -> Traits:
    return Traits(qkv_bias=True, windows=qwen_windows(fields))
