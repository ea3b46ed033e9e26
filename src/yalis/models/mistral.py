# SPDX-License-Identifier: Apache-2.0
"""Mistral and Ministral: no biases; windows in every layer (v0.1), in some (Ministral) or in none."""

from __future__ import annotations

from yalis.fields import Fields
from yalis.models.traits import Family, Traits, windows


# transformers reads layer_types for Ministral alone, and warns of a Mistral that has them; we follow them.
def traits(fields: Fields) -> Traits:
    return Traits(windows=windows(fields, first=0))


# A config.json that says nothing is of v0.1's time.
FAMILY = Family(
    traits,
    {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
)
