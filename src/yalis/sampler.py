# SPDX-License-Identifier: Apache-2.0
"""From logits to the next token of each sequence.

A draw is a pure function of the logits' row, the request's seed and the token's number: no generator is
kept, so what else is in the batch, how many ranks there are and a repeated step change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from yalis.sampling_params import Draw

_MASK = 2**64 - 1


def sample(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """`[n, vocab]` logits to `[n]` int64 token ids, row i drawn as `draws[i]` says."""
    token_ids = logits.argmax(dim=-1)
    rows = [i for i, draw in enumerate(draws) if draw.params.temperature > 0]
    if rows:
        chosen = [draws[i] for i in rows]
        index = torch.tensor(rows, device=logits.device)
        uniforms = torch.tensor(
            [uniform(draw.seed, draw.token_idx) for draw in chosen], dtype=torch.float64
        )
        token_ids[index] = _draw(probabilities(logits[index], chosen), uniforms.to(logits.device))
    return token_ids


def probabilities(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """`[n, vocab]` float64: each row's distribution after temperature, then top-k, then top-p.

    Tokens of equal logit are kept or dropped together, so a row's distribution cannot depend on how a
    sort orders them.
    """
    params, everything = [draw.params for draw in draws], logits.shape[-1]
    columns = [[p.temperature, p.top_k if p.top_k > 0 else everything, p.top_p] for p in params]
    settings = torch.tensor(columns, dtype=torch.float64, device=logits.device)
    # The maximum becomes 0 before the division, so that no temperature is too small for it.
    scaled = (logits.double() - logits.amax(dim=-1, keepdim=True)) / settings[:, :1]
    if any(p.top_k > 0 or p.top_p < 1 for p in params):
        ranked = scaled.sort(dim=-1, descending=True).values
        places = torch.arange(ranked.shape[-1], device=logits.device)
        is_kept = places < settings[:, 1:2]
        kept = ranked.masked_fill(~is_kept, -torch.inf).softmax(dim=-1)
        # A token stays while those before it have not yet reached top_p; the first always stays.
        is_kept &= (kept.cumsum(dim=-1) - kept < settings[:, 2:3]) | (settings[:, 2:3] >= 1)
        num_kept = is_kept.sum(dim=-1, keepdim=True)
        scaled = scaled.masked_fill(scaled < ranked.gather(1, num_kept - 1), -torch.inf)
    return scaled.softmax(dim=-1)


def _draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    # Inverse of the cumulative distribution, in the vocabulary's order and in float64: a last-bit
    # difference in the logits moves the bounds by as little, where a sorted order would swap neighbours.
    cumulative = probs.cumsum(dim=-1)
    targets = uniforms.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1)


def uniform(seed: int, token_idx: int) -> float:
    """The number in [0, 1) for a request's token: 48 bits, so its product with 1.0 stays below 1.0."""
    return _mix(_mix(seed & _MASK) + token_idx & _MASK) / 2**48


def request_seed(engine_seed: int, request_id: int) -> int:
    """The seed of a request that brings none."""
    return _mix(_mix(engine_seed & _MASK) ^ request_id)


def _mix(value: int) -> int:
    """48 well-mixed bits of a 64-bit integer (the finaliser of the splitmix64 generator)."""
    value = value + 0x9E3779B97F4A7C15 & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return (value ^ value >> 31) >> 16
