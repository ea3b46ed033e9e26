# SPDX-License-Identifier: Apache-2.0
"""Positions as rotations of query and key: frequencies, and cosines and sines of every position."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from yalis.parallel.group import Placement
from yalis.rope import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """`[head_dim / 2]` float32: the angle per position of each pair of components."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "default":
        return frequencies
    stretched = frequencies / rope.factor
    if rope.kind == "linear":
        return stretched
    if rope.kind == "llama3":
        # Wavelengths that fit often into the original context stay, those that hardly fit are stretched,
        # and between the two bounds the share of each slides with how often they fit.
        num_periods = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = ((num_periods - low) / (high - low)).clamp(0, 1)
    else:
        # yarn (arXiv 2309.00071): as above, but the share slides with the pair's number.
        first, last = rope.yarn_bounds
        pairs = torch.arange(head_dim // 2, dtype=torch.float32)
        # Where theta is very small, they come in the other order, and all is stretched.
        keep = 1 - ((pairs - first) / ((last - first) or 1e-3)).clamp(0, 1)
    return frequencies * keep + stretched * (1 - keep)


class Rotary(nn.Module):
    """Turns `[num_tokens]` positions into the cosines and sines that `functional.prepare_heads` takes.

    They are computed once for all `num_positions`, in float32, and kept in the model's dtype.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, num_positions: int, at: Placement) -> None:
        super().__init__()
        frequencies = inverse_frequencies(rope, head_dim).to(at.device)
        positions = torch.arange(num_positions, dtype=torch.float32, device=at.device)
        angles = torch.outer(positions, frequencies)
        both = torch.stack((angles.cos(), angles.sin()), dim=1) * rope.attention_factor
        self._table = both.to(at.dtype)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each `[num_tokens, head_dim / 2]`."""
        cos, sin = self._table.index_select(0, positions).unbind(dim=1)
        return cos, sin
