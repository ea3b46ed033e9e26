# SPDX-License-Identifier: Apache-2.0
"""The two ends of the model, spread over the ranks by vocabulary: ids to vectors, vectors to logits.

A vocabulary that the ranks do not divide is padded at its end; the padding's logits are cut off.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from yalis.layers.functional import linear
from yalis.parallel.group import Placement
from yalis.parallel.split import padded_split
from yalis.weights.loader import WeightPart


class _VocabularyShard(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int, at: Placement) -> None:
        super().__init__()
        self._tp = at.tp
        self._vocab_size, self._hidden_size = vocab_size, hidden_size
        self._rows, width = padded_split(vocab_size, at.tp.size, at.tp.rank)
        self.weight = at.empty(width, hidden_size)
        self.weight[len(self._rows) :].zero_()  # padding: finite, so that it cannot poison a sum

    def weight_parts(self, path: str) -> Iterator[WeightPart]:
        region = (slice(self._rows.start, self._rows.stop), slice(0, self._hidden_size))
        shape = (self._vocab_size, self._hidden_size)
        yield WeightPart(f"{path}.weight", shape, region, self.weight[: len(self._rows)])


class VocabularyEmbedding(_VocabularyShard):
    """`[num_tokens]` ids to `[num_tokens, hidden]` vectors, equal on all ranks. Collective."""

    def forward(self, token_ids: Tensor) -> Tensor:
        if self._tp.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self._rows.start
        is_elsewhere = (local < 0) | (local >= len(self._rows))
        vectors = F.embedding(local.masked_fill(is_elsewhere, 0), self.weight)
        # Exactly one rank contributes each row, so the sum adds zeros and no rounding.
        return self._tp.all_reduce(vectors.masked_fill_(is_elsewhere.unsqueeze(-1), 0))


class VocabularyHead(_VocabularyShard):
    """`[n, hidden]` to `[n, vocab_size]` logits on rank 0, None elsewhere. Collective.

    Gathered to one rank only: one rank draws the token, so no two can ever disagree about it.
    """

    _is_tied = False

    def tie(self, embedding: VocabularyEmbedding) -> None:
        """Share the embedding's weight, and load none of our own."""
        self.weight = embedding.weight
        self._is_tied = True

    def forward(self, hidden: Tensor) -> Tensor | None:
        logits = self._tp.gather(linear(hidden, self.weight))
        return None if logits is None else logits[:, : self._vocab_size]

    def weight_parts(self, path: str) -> Iterator[WeightPart]:
        return iter(()) if self._is_tied else super().weight_parts(path)
