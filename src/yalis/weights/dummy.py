# SPDX-License-Identifier: Apache-2.0
"""Random weights of a model's shape: for measuring without a checkpoint, and for tests.

A weight is a hash of the seed, its tensor's name and its place in the whole tensor. So ranks that keep
different regions hold parts of the same model, whatever their number, and each makes its own in place.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Set

import torch
from torch import Tensor

from yalis.weights.loader import WeightPart

# What the layers add must outweigh the embedding that they add it to: else the next token depends on the
# last one alone, and with tied embeddings it even repeats it.
_GAIN = 1.5
_EMBEDDING_SCALE = 0.2
# Elements at a time: a GPU wants large launches, a CPU temporaries that stay in its cache.
_GPU_PORTION, _CPU_PORTION = 1 << 24, 1 << 17


class DummyWeights:
    """A source that has every tensor. A weight depends on the seed, the tensor's name and its place alone."""

    num_threads = 1

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def check(self, part: WeightPart) -> None:
        pass

    def warn_of_others(self, used: Set[str]) -> None:
        pass

    def fill(self, part: WeightPart) -> None:
        """Norms near one, biases small, matrices variance-keeping: evenly spread around their mean.

        The scale keeps activations of order one, and greedy text from falling into one repeated token.
        """
        mean, deviation = _distribution(part.name, part.shape)
        digest = hashlib.blake2b(f"{self._seed}/{part.name}".encode(), digest_size=8).digest()
        row_key, column_key = (int.from_bytes(half, "little") for half in (digest[:4], digest[4:]))
        device = part.target.device
        rows, columns = (slice(0, 1), *part.region)[-2:]  # a vector is one row
        row_keys = _mix(torch.arange(rows.start, rows.stop, device=device) + row_key)
        column_keys = _mix(torch.arange(columns.start, columns.stop, device=device) + column_key)
        target = part.target.view(len(row_keys), len(column_keys))
        portion = _GPU_PORTION if device.type == "cuda" else _CPU_PORTION
        num_rows = max(1, portion // max(1, len(column_keys)))
        for some, its_keys in zip(
            torch.split(target, num_rows), torch.split(row_keys, num_rows), strict=True
        ):
            bits = _mix(its_keys.unsqueeze(1) ^ column_keys)
            # The upper 24 bits, which float32 holds exactly: numbers of deviation 2**23 / sqrt(3).
            some.copy_((bits >> 8).float().mul_(deviation * math.sqrt(3) / 2**23).add_(mean))


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The whole tensor of `DummyWeights`, in float32 on the CPU."""
    tensor = torch.empty(shape)
    region = tuple(slice(0, size) for size in shape)
    DummyWeights(seed).fill(WeightPart(name, shape, region, tensor))
    return tensor


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation."""
    if name.endswith("norm.weight"):
        return 1.0, 0.1
    if len(shape) == 1:
        return 0.0, 0.1
    if "embed_tokens" in name:
        return 0.0, _EMBEDDING_SCALE
    return 0.0, _GAIN / math.sqrt(shape[1])


def _mix(keys: Tensor) -> Tensor:
    """Int32 hashes of integers; the upper bits are the better ones."""
    bits = keys.to(torch.int32, copy=True).mul_(0x2C1B3C6D)
    return bits.bitwise_xor_(bits >> 15).mul_(0x297A2D39)
