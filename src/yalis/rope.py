# SPDX-License-Identifier: Apache-2.0
"""How positions turn into angles, as config.json asks for it. Pure.

There are two dialects: transformers 5 writes one object, `rope_parameters`; earlier versions wrote
`rope_theta` beside an optional `rope_scaling`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from yalis.errors import ConfigError
from yalis.fields import Fields

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class RopeConfig:
    """`kind` is "default", "linear", "llama3" or "yarn"; the fields after `factor` belong to the last two.

    `attention_factor` multiplies cosine and sine. `yarn_bounds` are the pairs of components between which
    yarn slides from the plain frequency to the stretched one.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    attention_factor: float = 1.0
    yarn_bounds: tuple[float, float] = (0.0, 0.0)


def read_rope(raw: Mapping[str, Any], where: str, max_positions: int, head_dim: int) -> RopeConfig:
    """The rotary settings in a config.json's content. Raises ConfigError for what is not supported."""
    if raw.get("rope_parameters") and raw.get("rope_scaling"):
        without = ({**raw, name: None} for name in ("rope_scaling", "rope_parameters"))
        by_new, by_old = (read_rope(one, where, max_positions, head_dim) for one in without)
        if by_new != by_old:
            raise ConfigError(
                f"{where}: rope_parameters and rope_scaling ask for different rotations (theta "
                f"{by_new.theta:g}, {by_new.kind}; theta {by_old.theta:g}, {by_old.kind}); keep "
                "rope_parameters alone, with all that is meant in it"
            )
        return by_new
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"{where}: rope scaling is {scaling!r}; it must be an object or null")
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise ConfigError(
            f"{where}: rope settings differ by the type of layer, which no supported family does; use a "
            "checkpoint whose rope_parameters are one object"
        )
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = scaling.get("rope_theta")
    theta = raw.get("rope_theta") if theta is None else theta
    fields = Fields({**scaling, "rope_theta": theta}, f"{where} (rope)")
    partial = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ConfigError(
            f"{where}: partial_rotary_factor is {partial!r}; only 1 is supported, where all of a head turns"
        )
    if kind not in KINDS:
        raise ConfigError(f"{where}: rope type is {kind!r}; supported: {', '.join(KINDS)}")
    theta = fields.number("rope_theta", 10000.0)
    # "dynamic" stretches only beyond max_position_embeddings, and no request goes there.
    if kind in ("default", "dynamic"):
        return RopeConfig(theta)
    factor = fields.number("factor")
    if kind == "linear":
        return RopeConfig(theta, kind, factor)
    # Some write it beside the object; transformers believes that one first.
    original = Fields(raw, where).count(_ORIGINAL, fields.count(_ORIGINAL, max_positions))
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        if low >= high:
            raise ConfigError(
                f"{where}: low_freq_factor {low} must be below high_freq_factor {high} in llama3 scaling"
            )
        return RopeConfig(theta, kind, factor, original, low, high)
    return RopeConfig(
        theta,
        kind,
        factor,
        original,
        attention_factor=_yarn_attention_factor(fields, factor),
        yarn_bounds=_yarn_bounds(fields, theta, original, head_dim),
    )


def _yarn_attention_factor(fields: Fields, factor: float) -> float:
    if fields.raw.get("attention_factor") is not None:
        return fields.number("attention_factor")

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if fields.raw.get("mscale") and fields.raw.get("mscale_all_dim"):
        return scale(fields.number("mscale")) / scale(fields.number("mscale_all_dim"))
    return scale(1)


def _yarn_bounds(fields: Fields, theta: float, original: int, head_dim: int) -> tuple[float, float]:
    def pair_that_turns(num_times: float) -> float:  # so often within the original context
        angle = original / (num_times * 2 * math.pi)
        return head_dim * math.log(angle) / (2 * math.log(theta))

    first = pair_that_turns(fields.number("beta_fast", 32))
    last = pair_that_turns(fields.number("beta_slow", 1))
    if fields.flag("truncate", "truncate" not in fields.raw):  # a null is no, here
        first, last = math.floor(first), math.ceil(last)
    return max(first, 0), min(last, head_dim - 1)
