# SPDX-License-Identifier: Apache-2.0
"""Which sequences the next step works on. Thinks in requests; pure Python.

The policy: admit waiting requests, in order, while they fit, and give the newly admitted a step for
their prompts; else let every running sequence have its next token. Cache space is handed out in one
direction and returned when all have finished. Another policy replaces this file and nothing else.
"""

from __future__ import annotations

from collections import deque

from yalis.core import Batch, Sequence
from yalis.errors import RequestError


class Scheduler:
    def __init__(
        self, *, max_num_seqs: int, max_num_batched_tokens: int, num_cache_tokens: int
    ) -> None:
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._num_cache_tokens = num_cache_tokens
        self._num_reserved_tokens = 0
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_tokens_to_draw(self) -> int:
        return sum(seq.max_len - len(seq) for seq in (*self._waiting, *self._running))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises RequestError when it could never fit the cache, even alone."""
        if sequence.max_len > self._num_cache_tokens:
            raise RequestError(
                f"prompt and output may take {sequence.max_len} tokens, but the cache holds "
                f"{self._num_cache_tokens}; lower max_tokens or raise kv_cache_memory_bytes"
            )
        self._waiting.append(sequence)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step; all their pending tokens are to be computed."""
        return self._admit() or list(self._running)

    def collect(self, sequences: list[Sequence]) -> list[Sequence]:
        """Take back a computed step: advance the counters, retire and return the finished."""
        for sequence in sequences:
            sequence.num_cached = len(sequence) - 1  # all but the token just drawn
        finished = [sequence for sequence in sequences if sequence.is_finished]
        self._running = [sequence for sequence in self._running if not sequence.is_finished]
        if not self._running:
            self._num_reserved_tokens = 0
        return finished

    def drop_all(self) -> None:
        """Forget every request: the caller that waited for them is gone."""
        self._waiting.clear()
        self._running.clear()
        self._num_reserved_tokens = 0

    def _admit(self) -> list[Sequence]:
        admitted: list[Sequence] = []
        num_tokens = 0
        while self._waiting and len(self._running) < self._max_num_seqs:
            sequence = self._waiting[0]
            num_tokens += len(sequence)
            # A prompt longer than the step's budget still goes, but alone.
            if admitted and num_tokens > self._max_num_batched_tokens:
                break
            if self._num_reserved_tokens + sequence.max_len > self._num_cache_tokens:
                break
            sequence.start = self._num_reserved_tokens
            self._num_reserved_tokens += sequence.max_len
            admitted.append(self._waiting.popleft())
            self._running.append(sequence)
        return admitted


def make_batch(sequences: list[Sequence]) -> Batch:
    """The step's work as one value, which is all that the ranks are told."""
    pending = [sequence.pending_token_ids() for sequence in sequences]
    return Batch(
        token_ids=tuple(token_id for ids in pending for token_id in ids),
        num_new=tuple(len(ids) for ids in pending),
        num_cached=tuple(sequence.num_cached for sequence in sequences),
        starts=tuple(sequence.start for sequence in sequences),
        draws=tuple(sequence.draw() for sequence in sequences),
    )
