# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalisation; every rank holds the whole of its weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yalis.parallel.group import Placement
from yalis.weights.loader import WeightPart


class RMSNorm(nn.Module):
    """`[..., size]` to the same, each vector divided by its root mean square, then weighted."""

    def __init__(self, size: int, eps: float, at: Placement) -> None:
        super().__init__()
        self._eps = eps
        self.weight = at.empty(size)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self._eps)
        # The checkpoints' own order: normalise in fp32, round, then weight in the 16-bit type.
        return self.weight * F.rms_norm(x.float(), self.weight.shape, None, self._eps).to(x.dtype)

    def weight_parts(self, path: str) -> Iterator[WeightPart]:
        shape = tuple(self.weight.shape)
        region = tuple(slice(0, size) for size in shape)
        yield WeightPart(f"{path}.weight", shape, region, self.weight)
