# SPDX-License-Identifier: Apache-2.0
"""The two ends of the model, spread over the ranks by vocabulary: ids to vectors, vectors to logits.

A vocabulary that the ranks do not divide is padded at its end; the padding's logits are cut off.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yalis.filters import draw, kept_scores
from yalis.layers.functional import are_finite, likeliest, linear
from yalis.parallel.group import Placement
from yalis.parallel.split import padded_split
from yalis.weights.loader import WeightPart


class _VocabularyShard(nn.Module):
    _twin: str | None = None

    def __init__(self, vocab_size: int, hidden_size: int, at: Placement) -> None:
        super().__init__()
        self._tp = at.tp
        self._is_batch_invariant = at.is_batch_invariant
        self._vocab_size, self._hidden_size = vocab_size, hidden_size
        self._rows, width = padded_split(vocab_size, at.tp.size, at.tp.rank)
        self.weight = at.empty(width, hidden_size)
        self.weight[len(self._rows) :].zero_()  # padding: finite, so that it cannot poison a sum

    def weight_parts(self, path: str) -> Iterator[WeightPart]:
        region = (slice(self._rows.start, self._rows.stop), slice(0, self._hidden_size))
        shape = (self._vocab_size, self._hidden_size)
        yield WeightPart(
            f"{path}.weight", shape, region, self.weight[: len(self._rows)], self._twin
        )


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
    """`[n, hidden]` to `[n, width]`: this rank's share of the logits, padded to the ranks' common width."""

    _is_tied = False

    def tie(self, embedding: VocabularyEmbedding, name: str) -> None:
        """Share the embedding's weight, and load none of our own, which checkpoints may have as `name`."""
        self.weight, embedding._twin = embedding.weight, name
        self._is_tied = True

    def forward(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight, is_batch_invariant=self._is_batch_invariant)

    def gather(self, share: Tensor) -> Tensor | None:
        """All logits, `[n, vocab_size]`, on rank 0; None elsewhere. Collective.

        To one rank only: one draws, so no two can ever disagree about a token.
        """
        logits = self._tp.gather(share)
        return None if logits is None else logits[:, : self._vocab_size]

    def likeliest(self, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The token of each row's highest logit, `[n]` int64, the first of equal ones; that logit, `[n]`
        float32; and whether all logits of the row are finite, `[n]` bool. Equal on all ranks. Collective,
        capturable.
        """
        size, rank, num_mine = self._tp.size, self._tp.rank, len(self._rows)
        if size == 1:
            token_ids, highest, lowest = likeliest(share)
            return token_ids, highest.float(), are_finite(highest, lowest)
        # Each rank tells what it found in a column of its own, zeros in the others': a sum of few bytes, and
        # exact, for float32 holds token ids up to 2**24.
        found = share.new_zeros((len(share), size, 3), dtype=torch.float32)
        if num_mine:
            token_ids, highest, lowest = likeliest(share[:, :num_mine])
            for idx, column in enumerate((highest, token_ids + self._rows.start, lowest)):
                found[:, rank, idx] = column
        else:  # nothing but padding
            found[:, rank, 0] = torch.finfo(torch.float32).min
        highest, token_ids, lowest = self._tp.all_reduce(found).unbind(dim=-1)
        best = highest.argmax(dim=1, keepdim=True)
        is_finite = are_finite(highest, lowest).all(dim=1)
        winner = [found.gather(1, best).squeeze(1) for found in (token_ids, highest)]
        return winner[0].long(), winner[1], is_finite

    def draw(self, share: Tensor, highest: Tensor, settings: Tensor, keys: Tensor) -> Tensor:
        """`[n]` int64 tokens, those that `filters.draw` draws from all logits, on every rank. Collective.

        `settings` `[n, 4]` as in `filters.kept_scores`, of which none asks to be ranked; `highest` from
        `likeliest`.
        """
        num_mine, first_id = len(self._rows), self._rows.start
        # The lowest place wins, which is at most 0.
        found = share.new_zeros((len(share), self._tp.size, 2), dtype=torch.float32)
        found[:, self._tp.rank, 0] = 1
        if num_mine:
            scores = kept_scores(share[:, :num_mine], settings, 0, highest.unsqueeze(1))
            for idx, column in enumerate(reversed(draw(scores, keys, first_id))):
                found[:, self._tp.rank, idx] = column
        places, token_ids = self._tp.all_reduce(found).unbind(dim=-1)
        best = places.argmin(dim=1, keepdim=True)
        return token_ids.gather(1, best).squeeze(1).long()

    def weight_parts(self, path: str) -> Iterator[WeightPart]:
        return iter(()) if self._is_tied else super().weight_parts(path)
