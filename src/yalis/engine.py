# SPDX-License-Identifier: Apache-2.0
"""The loop: schedule, run, collect. Whatever computes a batch stands behind `Executor`."""

from __future__ import annotations

from typing import Any, Protocol

from yalis.core import Batch, Request, RequestOutput, Sequence
from yalis.sampler import request_seed
from yalis.scheduler import Scheduler, make_batch
from yalis.tokenizer import Detokenizer, Tokenizer


class Executor(Protocol):
    """Computes batches: in this process, or by telling the ranks to."""

    def execute(self, batch: Batch) -> list[int]:
        """The next token of each of the batch's sequences."""
        ...

    def agree(self, digest: bytes) -> None:
        """Raise unless every process that drives this executor's ranks passes the same bytes."""
        ...

    def describe_all_reduce(self) -> dict[str, Any]:
        """What rank 0's all-reduce says of itself."""
        ...

    def close(self) -> None:
        """Let go of the ranks. The executor is not used again."""
        ...


class Engine:
    """Requests in, finished sequences out, one step at a time."""

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        tokenizer: Tokenizer | None,
        *,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        seed: int,
    ) -> None:
        self._executor, self._scheduler, self._tokenizer = executor, scheduler, tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_model_len, self._seed = max_model_len, seed
        self._num_requests = 0
        self.num_drawn_tokens = 0
        self._detokenizers: dict[int, Detokenizer] = {}

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def num_tokens_to_draw(self) -> int:
        """How many more tokens the requests under way can ask for; they may stop earlier."""
        return self._scheduler.num_tokens_to_draw

    def add(self, request: Request) -> int:
        """Queue a checked request; returns its number, by which its output is known.

        Raises RequestError when it could never fit the cache; the others are unharmed.
        """
        request_id, params = self._num_requests, request.params
        seed = request_seed(self._seed, request_id) if params.seed is None else params.seed
        max_len = min(len(request.token_ids) + params.max_tokens, self._max_model_len)
        self._scheduler.add(Sequence(request_id, request, seed, max_len))
        self._num_requests += 1
        if self._tokenizer and params.stop_strings:
            self._detokenizers[request_id] = Detokenizer(self._tokenizer, request.token_ids)
        return request_id

    def step(self) -> dict[int, RequestOutput]:
        """Compute one batch; the requests that it finished, by number."""
        sequences = self._scheduler.schedule()
        token_ids = self._executor.execute(make_batch(sequences))
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            self._append(sequence, token_id)
        return {s.request_id: self._output(s) for s in self._scheduler.collect(sequences)}

    def drop_all(self) -> None:
        """Forget every request under way, after an error or an interrupt."""
        self._scheduler.drop_all()
        self._detokenizers.clear()

    def _append(self, sequence: Sequence, token_id: int) -> None:
        sequence.output_token_ids.append(token_id)
        self.num_drawn_tokens += 1
        is_eos = token_id in self._eos_token_ids and not sequence.request.params.ignore_eos
        if self._append_text(sequence, token_id) or is_eos:
            sequence.finish_reason = "stop"
        elif len(sequence) >= sequence.max_len:
            sequence.finish_reason = "length"

    def _append_text(self, sequence: Sequence, token_id: int) -> bool:
        """Look for stop strings while the text grows; True, with the text cut, when one has come up."""
        detokenizer = self._detokenizers.get(sequence.request_id)
        if detokenizer is None:
            return False
        num_before = len(sequence.text)
        sequence.text += detokenizer.append(token_id)
        hits = []
        for stop in sequence.request.params.stop_strings:
            # It may have begun in earlier tokens, but must end in this one's text.
            found = sequence.text.find(stop, max(0, num_before - len(stop) + 1))
            if found >= 0:
                hits.append(found)
        if hits:
            sequence.stopped_text = sequence.text[: min(hits)]
        return bool(hits)

    def _output(self, sequence: Sequence) -> RequestOutput:
        self._detokenizers.pop(sequence.request_id, None)
        text = sequence.stopped_text
        if text is None and self._tokenizer:
            prompt_token_ids = sequence.request.token_ids
            text = self._tokenizer.decode_after(prompt_token_ids, sequence.output_token_ids)
        assert sequence.finish_reason is not None  # the scheduler returns only the finished
        return RequestOutput(
            prompt=sequence.request.prompt,
            prompt_token_ids=sequence.request.token_ids,
            text=text or "",
            token_ids=tuple(sequence.output_token_ids),
            finish_reason=sequence.finish_reason,
        )
