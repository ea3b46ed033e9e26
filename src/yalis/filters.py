# SPDX-License-Identifier: Apache-2.0
"""The distribution that a row of logits and its settings describe, and a draw from it.

Probabilities are integers, so sums of them are exact and do not depend on who adds in which order: a row
gives the same token in any batch and on any kind of device that computes the same exponentials.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A weight of the likeliest token. Sums over 2**20 tokens stay far below 2**63, and a token less likely
# than 2**-40 of it is never drawn.
_ONE = 2.0**40
_SMALLEST = torch.finfo(torch.float32).tiny


def num_to_rank(top_k: int, top_p: float, vocab_size: int) -> int:
    """How many of a row's largest logits its filters must see in order."""
    if top_k:
        return min(top_k, vocab_size)
    return vocab_size if top_p < 1 else 0


def token_weights(logits: Tensor, settings: Tensor, num_ranked: int) -> Tensor:
    """`[n, vocab]` int64: weights in proportion to the probabilities, after all filters.

    `settings` `[n, 4]`: temperature, min_p, top_k (0 is all), top_p. `num_ranked` is the most that
    `num_to_rank` says of a row. The order is vLLM's: temperature, min_p, top-k, top-p, each seeing only
    what those before it have kept. Tokens of equal logit are kept or dropped together, so the result
    does not depend on how a sort orders them.
    """
    temperature, min_p, top_k, top_p = torch.split(settings.to(torch.float32), 1, dim=1)
    highest = logits.amax(dim=-1, keepdim=True).float()

    def scaled(some: Tensor) -> Tensor:
        # The maximum becomes 0 before the division, so that no temperature is too small for it.
        return (some.float() - highest) / temperature.clamp(min=_SMALLEST)

    lowest = min_p.log()  # of nothing is -inf
    if num_ranked:
        # In the logits' own type, which a sort is through with sooner.
        ranked = scaled(_ranked(logits, num_ranked))
        places = torch.arange(num_ranked, device=logits.device)
        is_kept = ((places < top_k) | (top_k == 0)) & (ranked >= lowest)
        weights = _weights(ranked, is_kept)
        mass = weights.cumsum(dim=-1)
        # A token stays while those before it have not yet reached top_p; the first always stays.
        enough = (settings[:, 3:] * mass[:, -1:]).ceil().long()
        is_kept &= (mass - weights < enough) | (top_p >= 1)
        num_kept = is_kept.sum(dim=-1, keepdim=True).clamp(min=1)
        lowest = ranked.gather(1, num_kept - 1)
    everything = scaled(logits)
    return _weights(everything, everything >= lowest)


def _ranked(logits: Tensor, num_ranked: int) -> Tensor:
    """The largest of each row, in order."""
    if num_ranked < logits.shape[-1]:
        return logits.topk(num_ranked, dim=-1).values
    return logits.sort(dim=-1, descending=True).values


def draw_by_weight(weights: Tensor, uniforms: Tensor) -> Tensor:
    """`[n]` int64 indices into the rows of `weights`, at `uniforms` `[n]` float64 in [0, 1).

    The inverse of the cumulative distribution in the vocabulary's order: a last-bit difference in the
    logits moves its steps by as little, where a sorted order would swap neighbours.
    """
    cumulative = weights.cumsum(dim=-1)
    target = (uniforms.unsqueeze(1) * cumulative[:, -1:]).long()
    token_ids = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return token_ids.clamp(max=weights.shape[-1] - 1)  # a row without any weight


def _weights(scaled: Tensor, is_kept: Tensor) -> Tensor:
    return (scaled.exp() * _ONE).masked_fill(~is_kept, 0).long()
