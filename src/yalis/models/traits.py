# SPDX-License-Identifier: Apache-2.0
"""In what the families differ. All else is the decoder that they share. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from yalis.errors import ConfigError
from yalis.fields import Fields


@dataclass(frozen=True)
class Traits:
    """`windows` has an entry per layer: how many tokens one sees, itself included; None is all before it.

    An empty `windows` says None for all layers.
    """

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    has_qk_norm: bool = False  # each head of q and k is RMS-normalised before it is rotated
    windows: tuple[int | None, ...] = ()

    def window(self, layer_idx: int) -> int | None:
        return self.windows[layer_idx] if self.windows else None


@dataclass(frozen=True)
class Family:
    """`defaults` are what transformers takes where config.json does not name a field at all."""

    traits: Callable[[Fields], Traits]
    defaults: Mapping[str, int]


def windows(fields: Fields, first: int) -> tuple[int | None, ...]:
    """Of `sliding_window` tokens, in the layers that `layer_types` names, else from layer `first` on.

    A window that is null is none.
    """
    if fields.raw.get("sliding_window") is None:
        return ()
    num_layers, window = fields.count("num_hidden_layers"), fields.count("sliding_window")
    kinds = fields.raw.get("layer_types")
    if kinds is None:
        kinds = [
            "full_attention" if idx < first else "sliding_attention" for idx in range(num_layers)
        ]
    if (
        not isinstance(kinds, list)
        or len(kinds) != num_layers
        or any(kind not in ("full_attention", "sliding_attention") for kind in kinds)
    ):
        raise ConfigError(
            f"{fields.where}: layer_types is {kinds!r}; it must have full_attention or "
            f"sliding_attention for each of {num_layers} layers"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
