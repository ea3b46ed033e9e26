# SPDX-License-Identifier: Apache-2.0
"""From logits to the next token of each sequence.

A draw is a pure function of the logits' row, the request's parameters, its seed and its tokens so far: no
generator is kept, so what else is in the batch, how many ranks there are and a repeated step change nothing.
On a GPU nothing waits for the device: the parameters go there in one copy, and the results stay there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from yalis.filters import draw, kept_scores, num_to_rank
from yalis.layers.functional import are_finite, likeliest
from yalis.layers.vocabulary import VocabularyHead
from yalis.penalties import Penalties
from yalis.sampling_params import Draw

_MASK = 2**64 - 1
_ID_MASK = 2**32 - 1
# Rows are drawn, and ranked, in portions of this many logits, which bounds the temporaries at about 0.5 GB.
_PORTION = 1 << 24

Table = list[tuple[float, ...]]


@dataclass(frozen=True)
class Logprobs:
    """Log probabilities by the untouched logits, for those rows of a batch that asked for them.

    `rows` are the batch's, m of them. `drawn` `[m]` float32 belongs to the drawn token and `rank` `[m]`
    is its place among all, from 1. `top` and `top_ids`, both `[m, k]`, are the likeliest tokens in order,
    equally likely ones by their ids; k is the most that a row asked for.
    """

    rows: tuple[int, ...]
    drawn: Tensor
    rank: Tensor
    top: Tensor
    top_ids: Tensor


@dataclass(frozen=True)
class Sampled:
    """`token_ids` `[n]` int64, and `is_finite` `[n]` bool: whether all logits of a row were numbers.

    Where they were not, the token id is within the vocabulary and means nothing.
    """

    token_ids: Tensor
    is_finite: Tensor
    logprobs: Logprobs | None = None


class Sampler:
    """Draws tokens, and remembers what each slot has drawn where penalties ask for it."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._penalties = Penalties(max_num_seqs, vocab_size, device)

    def start(self, slot: int, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()) -> None:
        """Let `slot` hold these tokens. Needed before the first draw of a request with penalties only."""
        self._penalties.start(slot, prompt_ids, output_ids)

    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> Sampled:
        """Row i of the `[n, vocab]` logits drawn as `draws[i]` says. The logits stay as they are."""
        token_ids, highest, lowest = likeliest(logits)
        is_finite = are_finite(highest, lowest)
        penalised, banned = _penalised(draws), _banned(draws)
        portions = _portions(draws, logits.shape[-1])
        if not (penalised or banned or portions):
            return Sampled(token_ids, is_finite, _logprobs(logits, token_ids, draws))
        on_device = _stage([penalised, banned, *(table for _, table in portions)], logits.device)
        changed = logits
        if penalised or banned:
            changed = logits.to(torch.float32, copy=True)
        if penalised:
            self._penalties.apply_(changed, on_device[0])
        if banned:
            row, token_id = on_device[1].long().unbind(dim=1)
            changed.index_put_((row, token_id), changed.new_full((), -torch.inf))
        if penalised or banned:
            token_ids = changed.argmax(dim=-1)
        for (num_ranked, _), table in zip(portions, on_device[2:], strict=True):
            rows = table[:, 0].long()
            scores = kept_scores(changed.index_select(0, rows), table[:, 3:], num_ranked)
            token_ids.index_copy_(0, rows, draw(scores, table[:, 1:3])[0])
        if penalised:
            self._penalties.add(on_device[0], token_ids)
        return Sampled(token_ids, is_finite, _logprobs(logits, token_ids, draws))


def can_share(drawn: Draw) -> bool:
    """Whether ranks can draw this together, each from its share of the logits."""
    p = drawn.params
    is_filtered = p.top_k > 0 or p.top_p < 1
    is_changed = p.has_penalties or drawn.banned_token_ids
    return not (is_filtered or is_changed or p.logprobs is not None)


def sample_shares(head: VocabularyHead, share: Tensor, draws: Sequence[Draw]) -> Sampled:
    """`Sampler.sample` where all draws `can_share`, and every rank has a share `[n, width]`. Collective."""
    token_ids, highest, is_finite = head.likeliest(share)
    portions = _portions(draws, share.shape[-1])
    tables = _stage([table for _, table in portions], share.device) if portions else []
    for table in tables:
        rows = table[:, 0].long()
        settings, keys = table[:, 3:], table[:, 1:3]
        drawn = head.draw(share.index_select(0, rows), highest[rows], settings, keys)
        token_ids.index_copy_(0, rows, drawn)
    return Sampled(token_ids, is_finite)


def _penalised(draws: Sequence[Draw]) -> Table:
    """For each row with penalties: row, slot, repetition, presence and frequency penalty."""
    return [
        (row, d.slot, p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
        for row, d in enumerate(draws)
        if (p := d.params).has_penalties
    ]


def _banned(draws: Sequence[Draw]) -> Table:
    """Each row with each token that it must not draw."""
    return [(row, token_id) for row, d in enumerate(draws) for token_id in d.banned_token_ids]


def _portions(draws: Sequence[Draw], vocab_size: int) -> list[tuple[int, Table]]:
    """The rows to draw at random, and their settings, with equal needs together: (num_to_rank, table).

    A row of a table is: row, two keys, temperature, min_p, top_k, top_p.
    """
    table: Table = [
        (row, *draw_keys(d.seed, d.token_idx), p.temperature, p.min_p, max(p.top_k, 0), p.top_p)
        for row, d in enumerate(draws)
        if (p := d.params).temperature > 0
    ]

    def need(row: tuple[float, ...]) -> int:
        return num_to_rank(int(row[5]), row[6], vocab_size)

    def kind(row: tuple[float, ...]) -> int:
        # One row that ranks the whole vocabulary must not make the others do so.
        return (need(row) > 0) + (need(row) == vocab_size)

    most = max(1, _PORTION // vocab_size)
    portions = []
    for _, alike in groupby(sorted(table, key=need), key=kind):
        rows = list(alike)
        for first in range(0, len(rows), most):
            portion = rows[first : first + most]
            portions.append((need(portion[-1]), portion))
    return portions


def _stage(tables: Sequence[Table], device: torch.device) -> list[Tensor]:
    """The tables as float64 tensors on the device, taken there in one copy that nobody waits for."""
    flat = [number for table in tables for row in table for number in row]
    # Pinned memory comes from torch's cache, which keeps it until the copy is done.
    host = torch.tensor(flat, dtype=torch.float64, pin_memory=device.type == "cuda")
    sizes = [len(table) * len(table[0]) if table else 0 for table in tables]
    parts = torch.split(host.to(device, non_blocking=True), sizes)
    return [part.view(max(len(table), 1), -1) for part, table in zip(parts, tables, strict=True)]


def _logprobs(logits: Tensor, token_ids: Tensor, draws: Sequence[Draw]) -> Logprobs | None:
    wanted = {row: d.params.logprobs for row, d in enumerate(draws)}
    most = [num for num in wanted.values() if num is not None]
    if not most:
        return None
    rows = tuple(row for row, num in wanted.items() if num is not None)
    [table] = _stage([[(row,) for row in rows]], logits.device)
    num_top = min(max(most), logits.shape[-1])
    parts = [
        _ranked(logits.index_select(0, index), token_ids[index].unsqueeze(1), num_top)
        for index in torch.split(table[:, 0].long(), max(1, _PORTION // logits.shape[-1]))
    ]
    return Logprobs(rows, *map(torch.cat, zip(*parts, strict=True)))


def _ranked(
    logits: Tensor, drawn_ids: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What Logprobs has of these rows: drawn, rank, top and top_ids."""
    # Rows of whole 16 bytes: where they begin elsewhere, a GPU adds in another order.
    padded = F.pad(logits.float(), (0, -logits.shape[-1] % 4), value=-torch.inf)
    logprobs = padded.log_softmax(dim=-1)
    order = _order(logprobs)
    top_ids = order.topk(num_top, dim=-1, largest=False).values & _ID_MASK
    rank = (order < order.gather(1, drawn_ids)).sum(dim=-1) + 1
    return (
        logprobs.gather(1, drawn_ids).squeeze(1),
        rank,
        logprobs.gather(1, top_ids),
        top_ids,
    )


def _order(logprobs: Tensor) -> Tensor:
    """Int64 of the likeliest first, and of equally likely tokens in their own order: 16-bit logits are often
    equal, and what topk does with them depends on its k and on the number of rows. The lower half is the id.
    """
    ids = torch.arange(logprobs.shape[-1], device=logprobs.device)
    # As integers, the bits of numbers from 0 up are in the numbers' order, and a -0 comes before them.
    return (-logprobs).view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(ids)


def draw_keys(seed: int, token_idx: int) -> tuple[int, int]:
    """What makes the noise of a request's token: two integers of 32 bits with sign, the first odd."""
    mixed = _mix(_mix(seed & _MASK) + token_idx & _MASK)
    return (mixed >> 32 | 1) - 2**31, (mixed & 2**32 - 1) - 2**31


def request_seed(engine_seed: int, request_id: int) -> int:
    """The seed of a request that brings none."""
    return _mix(_mix(engine_seed & _MASK) ^ request_id)


def _mix(value: int) -> int:
    """A 64-bit integer well mixed (the finaliser of the splitmix64 generator)."""
    value = value + 0x9E3779B97F4A7C15 & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
