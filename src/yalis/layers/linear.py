# SPDX-License-Identifier: Apache-2.0
"""Matrix products whose weight is spread over the ranks: by output (column) or by input (row).

Neither communicates. A column layer followed by a row layer leaves each rank with a share of a sum, and
whoever adds the residual to it sums the shares: that pair is a transformer's attention, and its MLP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yalis.layers.functional import linear, linear_silu_and_mul
from yalis.parallel.group import Placement
from yalis.weights.loader import WeightPart


@dataclass(frozen=True)
class Piece:
    """One of the checkpoint's matrices inside a fused layer: its name, its height, the rows kept here."""

    name: str
    num_rows: int
    rows: range


class ColumnLinear(nn.Module):
    """y = x W^T + b, this rank computing some of the output features.

    `[num_tokens, in_features]` to `[num_tokens, sum of the pieces' kept rows]`. The pieces share one
    matrix product, which is what a small batch is bound by.
    """

    def __init__(
        self, in_features: int, pieces: Sequence[Piece], bias: bool, at: Placement
    ) -> None:
        super().__init__()
        self._in_features = in_features
        self._is_batch_invariant = at.is_batch_invariant
        self._pieces = tuple(pieces)
        self.sizes = [len(piece.rows) for piece in pieces]
        self.weight = at.empty(sum(self.sizes), in_features)
        self.bias = at.empty(sum(self.sizes)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, is_batch_invariant=self._is_batch_invariant)

    def weight_parts(self, path: str) -> Iterator[WeightPart]:
        parent = path.rpartition(".")[0]  # the pieces are its siblings there
        weights = torch.split(self.weight, self.sizes)
        biases = (
            torch.split(self.bias, self.sizes) if self.bias is not None else [None] * len(weights)
        )
        for piece, weight, bias in zip(self._pieces, weights, biases, strict=True):
            rows = slice(piece.rows.start, piece.rows.stop)
            shape = (piece.num_rows, self._in_features)
            name = f"{parent}.{piece.name}"
            yield WeightPart(f"{name}.weight", shape, (rows, slice(0, shape[1])), weight)
            if bias is not None:
                yield WeightPart(f"{name}.bias", shape[:1], (rows,), bias)


class GatedLinear(ColumnLinear):
    """silu(gate) * up of two pieces, gate first: `[num_tokens, in_features]` to `[num_tokens, size]`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_silu_and_mul(
            x, self.weight, self.bias, is_batch_invariant=self._is_batch_invariant
        )


class RowLinear(nn.Module):
    """y = x W^T + b, this rank summing over the input features that it holds.

    `[num_tokens, len(columns)]` to `[num_tokens, out_features]`: a share of y, whose sum over the ranks is y.
    """

    def __init__(
        self, in_features: int, columns: range, out_features: int, bias: bool, at: Placement
    ) -> None:
        super().__init__()
        self._in_features, self._columns = in_features, columns
        self._is_batch_invariant = at.is_batch_invariant
        self.weight = at.empty(out_features, len(columns))
        # On one rank only: it must count once in the sum.
        self.bias = at.empty(out_features) if bias and at.tp.rank == 0 else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, is_batch_invariant=self._is_batch_invariant)

    def weight_parts(self, path: str) -> Iterator[WeightPart]:
        rows = slice(0, self.weight.shape[0])
        columns = slice(self._columns.start, self._columns.stop)
        shape = (rows.stop, self._in_features)
        yield WeightPart(f"{path}.weight", shape, (rows, columns), self.weight)
        if self.bias is not None:
            yield WeightPart(f"{path}.bias", shape[:1], (rows,), self.bias)
