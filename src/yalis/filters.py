# SPDX-License-Identifier: Apache-2.0
"""The distribution that a row of logits and its settings describe, and a draw from it.

Every row is drawn by itself, so equal logits give the same token in any batch. The last bits of logits, which
a batch may change, decide a draw hardly more often than they decide which token is the likeliest.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What the likeliest token weighs where top-p adds up. Sums over 2**20 tokens stay far below 2**63.
_ONE = 2.0**40
_SMALLEST = torch.finfo(torch.float32).tiny


def num_to_rank(top_k: int, top_p: float, vocab_size: int) -> int:
    """How many of a row's largest logits its filters must see in order."""
    if top_k:
        return min(top_k, vocab_size)
    return vocab_size if top_p < 1 else 0


def kept_scores(
    logits: Tensor, settings: Tensor, num_ranked: int, highest: Tensor | None = None
) -> Tensor:
    """`[n, vocab]` float32: logarithms of the probabilities but for a constant of each row; -inf where a
    filter drops the token.

    `settings` `[n, 4]`: temperature, min_p, top_k (0 is all), top_p. `num_ranked` is the most that
    `num_to_rank` says of a row. The order is vLLM's: temperature, min_p, top-k, top-p, each seeing only
    what those before it have kept. Tokens of equal logit are kept or dropped together, so the result
    does not depend on how a sort orders them. Where `logits` are a share of the vocabulary, no row may
    ask to be ranked, and `highest` `[n, 1]` float32 is that of all.
    """
    temperature, min_p, top_k, top_p = torch.split(settings.to(torch.float32), 1, dim=1)
    if highest is None:
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
        # Integers, so that the sums are exact and do not depend on who adds in which order.
        weights = (ranked.exp() * _ONE).masked_fill(~is_kept, 0).long()
        mass = weights.cumsum(dim=-1)
        # A token stays while those before it have not yet reached top_p; the first always stays.
        enough = (settings[:, 3:] * mass[:, -1:]).ceil().long()
        is_kept &= (mass - weights < enough) | (top_p >= 1)
        num_kept = is_kept.sum(dim=-1, keepdim=True).clamp(min=1)
        lowest = ranked.gather(1, num_kept - 1)
    scores = scaled(logits)
    return scores.masked_fill_(scores < lowest, -torch.inf)


def _ranked(logits: Tensor, num_ranked: int) -> Tensor:
    """The largest of each row, in order."""
    if num_ranked < logits.shape[-1]:
        return logits.topk(num_ranked, dim=-1).values
    return logits.sort(dim=-1, descending=True).values


def draw(scores: Tensor, keys: Tensor, first_id: int = 0) -> tuple[Tensor, Tensor]:
    """`[n]` int64 tokens, each in proportion to the exponentials of its row of `scores`, none above 0.

    `keys` `[n, 2]`, integers of 32 bits with sign, the first odd, make the row's noise: an exponential number
    for each token. The token wins whose weight, divided by it, is the highest (Gumbel-max, without its
    logarithms). Noise is a token's own, so a change of the logits' last bits matters only where two are
    as close as that; in an inverted cumulative sum it would move all tokens behind it. `scores` may be those
    of a share of the vocabulary, from `first_id` on: of all shares' winners that wins whose place,
    the second result, `[n]` float32 and at most 0, is the lowest.
    """
    factor, offset = torch.split(keys.int(), 1, dim=1)
    ids = torch.arange(
        first_id, first_id + scores.shape[-1], dtype=torch.int32, device=scores.device
    )
    bits = ids * factor
    # Two rounds of xor-shift and multiply (constants: Wellons' lowbias32) spread what differs over all bits.
    bits.add_(offset)
    for shift, constant in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        bits.bitwise_xor_(bits >> shift).mul_(constant)
    bits.bitwise_xor_(bits >> 16).bitwise_and_(0x7FFFFFFF)
    # Fine-grained near 0, where rare tokens win, and neither 0 nor 1, also where float32 rounds up.
    step = 2.0**-31 * (1 - 2.0**-24)
    negative = torch.rsub(bits.float(), -step / 2, alpha=step)
    places = scores.exp().div_(negative.log1p_())
    winner = places.argmin(dim=-1, keepdim=True)
    return (winner + first_id).squeeze(1), places.gather(1, winner).squeeze(1)
