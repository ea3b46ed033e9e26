# SPDX-License-Identifier: Apache-2.0
"""Llama 2, 3 and 3.x: the plain decoder, with biases where config.json asks for them."""

from __future__ import annotations

from yalis.fields import Fields
from yalis.models.traits import Family, Traits


def traits(fields: Fields) -> Traits:
    bias = fields.flag("attention_bias")
    return Traits(qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias"))


FAMILY = Family(traits, {"max_position_embeddings": 2048})
