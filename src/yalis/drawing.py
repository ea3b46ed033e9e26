# SPDX-License-Identifier: Apache-2.0
"""From a step's logits to its result: how each slot draws, and the tokens' way to ranks and host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from yalis.core import INVALID_TOKEN, Admission, Batch, RowLogprobs, StepResult
from yalis.parallel.group import TensorParallel
from yalis.sampler import Logprobs, Sampled, Sampler, draw_likeliest
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
    """Rank 0 draws, for it alone has the logits; then all have the tokens. Keeps by slot how to draw."""

    def __init__(
        self, tp: TensorParallel, max_num_seqs: int, vocab_size: int, device: torch.device
    ) -> None:
        self._tp, self._device = tp, device
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

    def draw_likeliest(self, logits: Tensor | None, num_rows: int) -> Tensor:
        """The likeliest token of each row, `[num_rows]` as `Drawn.token_ids`. Collective, capturable."""
        return self._shared(None if logits is None else draw_likeliest(logits), num_rows)

    def draw(self, batch: Batch, logits: Tensor | None) -> Drawn:
        """Draw for the batch's drawing rows, of which rank 0 brings the logits. Collective."""
        if not batch.num_draws:
            return Drawn(torch.empty(0, dtype=torch.int64, device=self._device))
        draws = self._draws(batch)
        sampled = None if logits is None else self._sampler.sample(logits, draws)
        wants_logprobs = any(draw.params.logprobs is not None for draw in draws)
        token_ids = self._shared(sampled, len(draws))
        return Drawn(token_ids, wants_logprobs, sampled.logprobs if sampled else None)

    def _shared(self, sampled: Sampled | None, num_rows: int) -> Tensor:
        """Rank 0's tokens on every rank."""
        if sampled is None:
            token_ids = torch.empty(num_rows, dtype=torch.int64, device=self._device)
        else:
            token_ids = sampled.token_ids.masked_fill(~sampled.is_finite, INVALID_TOKEN)
        self._tp.broadcast(token_ids)
        return token_ids

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
    """A step's result on its way to the host; `wait` may be called by another thread."""

    def __init__(self, drawn: Drawn) -> None:
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
        if not self._rows:
            return StepResult(token_ids)
        table = self._logprobs.wait().tolist()
        return StepResult(token_ids, dict(zip(self._rows, map(_row_logprobs, table), strict=True)))


def _row_logprobs(row: list[float]) -> RowLogprobs:
    num_top = len(row) // 2 - 1
    top_ids = map(int, row[2 + num_top :])
    return RowLogprobs(row[0], int(row[1]), dict(zip(top_ids, row[2 : 2 + num_top], strict=True)))
