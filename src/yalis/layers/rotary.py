# SPDX-License-Identifier: Apache-2.0
"""Positions as rotations of query and key: default, linear and llama3 frequency scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from yalis.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """`[head_dim / 2]` float32: the angle per position of each pair of components."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        # Wavelengths that fit often into the original context stay, those that hardly fit are stretched by
        # `factor`, and between the two bounds the share of each slides with how often they fit.
        num_periods = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = ((num_periods - low) / (high - low)).clamp(0, 1)
        return frequencies * keep + frequencies / rope.factor * (1 - keep)
    return frequencies


class Rotary(nn.Module):
    """Turns `[num_tokens]` positions into the cosines and sines that `rotate` takes."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device) -> None:
        super().__init__()
        self._frequencies = inverse_frequencies(rope, head_dim).to(device)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each `[num_tokens, 1, head_dim]` in `dtype`; the angle itself is float32."""
        angles = positions.to(torch.float32).unsqueeze(-1) * self._frequencies
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`[num_tokens, num_heads, head_dim]` rotated: component i pairs with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
