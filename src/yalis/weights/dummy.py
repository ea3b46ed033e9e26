# SPDX-License-Identifier: Apache-2.0
"""Random weights of a model's shape: for measuring without a checkpoint, and for tests."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

# What the layers add must outweigh the embedding that they add it to: else the next token depends on the
# last one alone, and with tied embeddings it even repeats it.
_GAIN = 1.5
_EMBEDDING_SCALE = 0.2


class DummyWeights:
    """A source that has every tensor. The whole tensor depends on the seed and its name alone.

    So ranks that keep different regions hold parts of the same model, whatever their number.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        pass

    def read(self, name: str, shape: tuple[int, ...], region: tuple[slice, ...]) -> Tensor:
        return random_weight(name, shape, self._seed)[region]


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A float32 tensor for the parameter `name`: norms near one, biases small, matrices variance-keeping.

    The scale keeps activations of order one, and greedy text from falling into one repeated token.
    """
    # One hash of both: torch's generator looks at 32 bits of its seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    noise = torch.empty(shape).normal_(generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * noise
    if len(shape) == 1:
        return 0.1 * noise
    if "embed_tokens" in name:
        return noise * _EMBEDDING_SCALE
    return noise * (_GAIN / math.sqrt(shape[1]))
