# SPDX-License-Identifier: Apache-2.0
"""Mistral: no biases; v0.1 sees a window of 4096 tokens in every layer, later ones everything."""

from __future__ import annotations

from yalis.fields import Fields
from yalis.models.traits import Traits


def traits(fields: Fields) -> Traits:
    # An explicit null means no window; a config.json that says nothing is of v0.1's time.
    if fields.raw.get("sliding_window", 4096) is None:
        return Traits()
    window = fields.count("sliding_window", 4096)
    return Traits(windows=(window,) * fields.count("num_hidden_layers"))
