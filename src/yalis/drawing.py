# SPDX-License-Identifier: Apache-2.0
"""From a step's logits to its result: how each slot draws, and the tokens' way to ranks and host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from yalis.core import INVALID_TOKEN, Admission, Batch, RowLogprobs, StepResult
from yalis.layers.vocabulary import VocabularyHead
from yalis.parallel.group import TensorParallel
from yalis.sampler import Logprobs, Sampler, can_share, sample_shares
from yalis.sampling_params import Draw
from yalis.staging import Download


@dataclass(frozen=True)
class Drawn:
    """What a step drew: `token_ids` `[num_draws]` int64 on every rank, INVALID_TOKEN where logits were not
    finite. `logprobs` are rank 0's; every rank knows whether some request `wants_logprobs`.
    """

    token_ids: Tensor
    wants_logprobs: bool = False
    logprobs: Logprobs | None = None


class Drawing:
    """Keeps by slot how to draw. Most tokens all ranks draw together; where one needs all logits in one
    place, rank 0 gathers them and draws, and the others are told.
    """

    def __init__(
        self,
        tp: TensorParallel,
        head: VocabularyHead,
        max_num_seqs: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._tp, self._head, self._device = tp, head, device
        self._sampler = Sampler(max_num_seqs, vocab_size, device)
        self._slots: dict[int, Admission] = {}
        self._particular: set[int] = set()  # slots that want more than the likeliest token

    def admit(self, admissions: tuple[Admission, ...]) -> None:
        for admission in admissions:
            self._slots[admission.slot] = admission
            if _is_plain(admission):
                self._particular.discard(admission.slot)
            else:
                self._particular.add(admission.slot)
            if admission.params.has_penalties and self._tp.rank == 0:
                tokens, num_prompt = admission.token_ids, admission.num_prompt_tokens
                self._sampler.start(admission.slot, tokens[:num_prompt], tokens[num_prompt:])

    def is_plain(self, batch: Batch) -> bool:
        """Whether `draw_likeliest` is all that this batch asks for."""
        return self._particular.isdisjoint(batch.slots)

    def draw_likeliest(self, share: Tensor) -> Tensor:
        """The likeliest token of each row, `[n]` as `Drawn.token_ids`. Collective, capturable."""
        token_ids, _, is_finite = self._head.likeliest(share)
        return token_ids.masked_fill(~is_finite, INVALID_TOKEN)

    def draw(self, batch: Batch, share: Tensor | None) -> Drawn:
        """Draw for the batch's drawing rows, of whose logits every rank brings its share; None if there are
        no such rows. Collective.
        """
        if share is None:
            return Drawn(torch.empty(0, dtype=torch.int64, device=self._device))
        if self.is_plain(batch):
            return Drawn(self.draw_likeliest(share))
        draws = self._draws(batch)
        if self._tp.size > 1 and all(map(can_share, draws)):
            sampled = sample_shares(self._head, share, draws)
            return Drawn(sampled.token_ids.masked_fill(~sampled.is_finite, INVALID_TOKEN))
        wants_logprobs = any(draw.params.logprobs is not None for draw in draws)
        logits = self._head.gather(share)
        if logits is None:
            token_ids = torch.empty(len(draws), dtype=torch.int64, device=self._device)
            self._tp.broadcast(token_ids)
            return Drawn(token_ids, wants_logprobs)
        sampled = self._sampler.sample(logits, draws)
        token_ids = sampled.token_ids.masked_fill(~sampled.is_finite, INVALID_TOKEN)
        self._tp.broadcast(token_ids)
        return Drawn(token_ids, wants_logprobs, sampled.logprobs)

    def _draws(self, batch: Batch) -> list[Draw]:
        lengths = list(map(int.__add__, batch.num_cached, (1,) * batch.num_decodes + batch.num_new))
        is_drawing = (True,) * batch.num_decodes + batch.is_drawing
        draws = []
        for slot, length, is_row_drawing in zip(batch.slots, lengths, is_drawing, strict=True):
            if is_row_drawing:
                how = self._slots[slot]
                idx = length - how.num_prompt_tokens
                banned = how.end_token_ids if idx < how.params.min_tokens else ()
                draws.append(Draw(how.params, how.seed, idx, slot, banned))
        return draws


def _is_plain(admission: Admission) -> bool:
    p = admission.params
    is_greedy = p.temperature == 0 and not p.has_penalties and p.logprobs is None
    return is_greedy and not (p.min_tokens and admission.end_token_ids)


class PendingStep:
    """A step's result on its way to the host; `wait` may be called by another thread.

    `check` raises where the result, once there, is not to be trusted.
    """

    def __init__(self, drawn: Drawn, check: Callable[[], None]) -> None:
        self._check = check
        self.wants_logprobs = drawn.wants_logprobs
        self._token_ids = Download(drawn.token_ids)
        self._rows: tuple[int, ...] = ()
        if drawn.logprobs is not None:
            found = drawn.logprobs
            self._rows = found.rows
            # One copy for all: ids and ranks are exact in float64.
            columns = [found.drawn.unsqueeze(1), found.rank.unsqueeze(1), found.top, found.top_ids]
            self._logprobs = Download(torch.cat([c.double() for c in columns], dim=1))

    def wait(self) -> StepResult:
        token_ids = tuple(self._token_ids.wait().tolist())
        self._check()
        if not self._rows:
            return StepResult(token_ids)
        table = self._logprobs.wait().tolist()
        return StepResult(token_ids, dict(zip(self._rows, map(_row_logprobs, table), strict=True)))


def _row_logprobs(row: list[float]) -> RowLogprobs:
    num_top = len(row) // 2 - 1
    top_ids = map(int, row[2 + num_top :])
    return RowLogprobs(row[0], int(row[1]), dict(zip(top_ids, row[2 : 2 + num_top], strict=True)))
