# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalisation, alone and at the end of an all-reduce. Its weight is on every rank."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from yalis.layers.functional import rms_norm
from yalis.parallel.group import Placement
from yalis.weights.loader import WeightPart


class RMSNorm(nn.Module):
    """`[..., size]` to the same, each vector divided by its root mean square, then weighted."""

    def __init__(self, size: int, eps: float, at: Placement) -> None:
        super().__init__()
        self._eps = eps
        self._all_reduce = at.tp.all_reduce
        self.weight = at.empty(size)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self._eps)

    def of_sum(self, partial: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """`(norm(s), s)` with s = the ranks' `partial` summed, plus `residual`. Collective.

        All are `[num_tokens, size]`; `residual`, like both results, is equal on all ranks.
        """
        return self._all_reduce.add_rms_norm(partial, residual, self.weight, self._eps)

    def weight_parts(self, path: str) -> Iterator[WeightPart]:
        shape = tuple(self.weight.shape)
        region = tuple(slice(0, size) for size in shape)
        yield WeightPart(f"{path}.weight", shape, region, self.weight)
