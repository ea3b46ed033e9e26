# SPDX-License-Identifier: Apache-2.0
"""The loop: schedule, run, collect. Whatever computes a batch stands behind `Executor`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from yalis.calls import Calls
from yalis.completion import Completion
from yalis.core import Batch, Request, RowLogprobs, Sequence, StepResult
from yalis.errors import YalisError
from yalis.outputs import RequestMetrics, RequestOutput, Update
from yalis.sampler import request_seed
from yalis.scheduler import Scheduler, Step
from yalis.tokenizer import Tokenizer
from yalis.trace import Trace, no_trace


class Executor(Protocol):
    """Computes batches: in this process, or by telling the ranks to. Steps run in the order of submission."""

    depth: int  # how many steps may be under way; 2 lets one be prepared while another runs
    num_blocks: int  # of cache on every rank

    def submit(self, batch: Batch) -> None:
        """Begin a step. With fewer than `depth` others under way."""
        ...

    def result(self) -> StepResult:
        """What the oldest step under way has drawn. Waits for it."""
        ...

    def drain(self) -> None:
        """Wait for the steps under way and forget what they drew, after an error or an interrupt."""
        ...

    def agree(self, requests: list[Request]) -> None:
        """Raise unless all processes that drive these ranks pass equal requests. Here there is but one."""
        return

    def use_all_reduce(self, name: str) -> None:
        """Let the ranks sum by another backend from now on. With no step under way."""
        ...

    def describe_all_reduce(self) -> dict[str, Any]:
        """What rank 0's all-reduce says of itself."""
        ...

    def close(self) -> None:
        """Let go of the ranks. The executor is not used again."""
        ...


class Engine:
    """Requests in, news of them out, one step at a time.

    Not thread-safe: but for `abandon`, calls raise YalisError in the middle of another. A server keeps the
    engine in one thread, and hands it requests by a queue. Where a call fails half way, or is interrupted,
    every request under way is dropped.

    Under a launcher every rank has an engine, and all of them make the same calls in the same order: what the
    engines decide follows from that and from the drawn tokens, which every rank gets, so they need not talk.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        tokenizer: Tokenizer | None,
        *,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        seed: int,
        trace: Trace = no_trace,
    ) -> None:
        self._executor, self._scheduler, self._tokenizer = executor, scheduler, tokenizer
        self._eos_token_ids = eos_token_ids
        self._max_model_len, self._seed = max_model_len, seed
        self._trace = trace
        self._num_requests = 0
        self._live: dict[int, _Live] = {}
        self._under_way: deque[Step] = deque()
        self.num_drawn_tokens = 0
        self._calls = Calls()

    @property
    def has_work(self) -> bool:
        """Whether `step` has something left to do."""
        return bool(self._live or self._under_way)

    def is_under_way(self, request_id: int) -> bool:
        return request_id in self._live

    def check(self, request: Request) -> None:
        """Raise RequestError when a request could never fit the cache."""
        self._scheduler.check(self._max_len(request))

    def max_new_tokens(self, request: Request) -> int:
        """How many tokens a request can get at most, all its continuations together."""
        return (self._max_len(request) - len(request.token_ids)) * request.params.n

    def add(self, request: Request, *, is_streamed: bool = True) -> int:
        """Queue a checked request; returns its number, by which its news are known.

        Without `is_streamed` its updates have no text before the last one, which costs less. Raises
        RequestError when it could never fit the cache; the others are unharmed.
        """
        self.check(request)
        return self._calls.run(lambda: self._add(request, is_streamed), self._drop_all)

    def _add(self, request: Request, is_streamed: bool) -> int:
        max_len, params = self._max_len(request), request.params
        request_id = self._num_requests
        self._num_requests += 1
        seed = request_seed(self._seed, request_id) if params.seed is None else params.seed
        ends = () if params.ignore_eos else self._eos_token_ids
        sequences = [
            Sequence(
                request_id=request_id,
                index=index,
                prompt_token_ids=request.token_ids,
                params=params,
                seed=seed + index,
                max_len=max_len,
                end_token_ids=(*ends, *params.stop_token_ids),
            )
            for index in range(params.n)
        ]
        completions = [Completion(s, self._tokenizer, is_streamed=is_streamed) for s in sequences]
        self._live[request_id] = _Live(
            request, completions, is_streamed, time.monotonic(), num_unfinished=params.n
        )
        for sequence in sequences:
            self._scheduler.add(sequence)
        return request_id

    def cancel(self, request_id: int) -> RequestOutput | None:
        """Stop a request: what it has so far, or None when it is not under way. No update follows."""
        return self._calls.run(lambda: self._cancel(request_id), self._drop_all)

    def _cancel(self, request_id: int) -> RequestOutput | None:
        live = self._live.pop(request_id, None)
        if live is None:
            return None
        for completion in live.completions:
            sequence = completion.sequence
            if not sequence.is_finished:
                sequence.finish_reason = "abort"
                self._scheduler.retire(sequence)
        return live.output(request_id)

    def abandon(self, request_ids: Iterable[int]) -> None:
        """Cancel these; where a call is under way, at its end. For any thread, and for the garbage collector,
        which may close a stream in the middle of a step.
        """
        self._calls.postpone(
            lambda: [self._cancel(request_id) for request_id in request_ids], self._drop_all
        )

    def settle(self) -> None:
        """Wait for steps that were begun in advance and whose requests have ended. Raises YalisError while
        requests are under way.
        """
        if self._live:
            raise YalisError("requests are under way; finish or cancel them first")
        while self._under_way:
            self.step()

    def step(self) -> list[Update]:
        """Compute one step; the news of it. Empty while prompts are being read."""
        return self._calls.run(self._step, self._drop_all)

    def _step(self) -> list[Update]:
        self._submit()
        step = self._under_way.popleft() if self._under_way else None
        if step is None:
            assert not self._live, "there is work, but nothing that could be scheduled"
            return []
        result = self._executor.result()
        with self._trace("collect"):
            return self._collect(step, result)

    def _drop_all(self) -> None:
        self._live.clear()
        self._under_way.clear()
        self._scheduler.drop_all()
        self._executor.drain()

    def _submit(self) -> None:
        while len(self._under_way) < self._executor.depth:
            with self._trace("schedule"):
                step = self._scheduler.schedule()
            if step is None:
                break
            self._executor.submit(step.batch)
            self._under_way.append(step)

    def _collect(self, step: Step, result: StepResult) -> list[Update]:
        now_s = time.monotonic()
        updates = []
        for place, (sequence, token_id) in enumerate(
            zip(step.drawing, result.token_ids, strict=True)
        ):
            # One that ended while this step was under way: nobody waits for its token.
            if not sequence.is_finished:
                self._scheduler.accept(sequence, token_id)
                self.num_drawn_tokens += 1
                updates.append(self._update(sequence, result.logprobs.get(place), now_s))
        return updates

    def _update(self, sequence: Sequence, logprobs: RowLogprobs | None, now_s: float) -> Update:
        live = self._live[sequence.request_id]
        completion = live.completions[sequence.index]
        num_before = len(sequence.output_token_ids) - 1
        completion.append(logprobs)
        live.first_token_s = live.first_token_s or now_s
        live.last_token_s = now_s
        output = None
        if sequence.is_finished:
            self._scheduler.retire(sequence)
            live.num_unfinished -= 1
            if not live.num_unfinished:
                output = live.output(sequence.request_id)
                del self._live[sequence.request_id]
        has_text = live.is_streamed or sequence.is_finished
        token_ids = tuple(sequence.output_token_ids[num_before:])
        return Update(
            request_id=sequence.request_id,
            index=sequence.index,
            token_ids=token_ids,
            text=completion.take_text() if has_text else "",
            logprobs=completion.last_logprobs() if token_ids else None,
            finish_reason=sequence.finish_reason,
            output=output,
        )

    def _max_len(self, request: Request) -> int:
        most = request.params.max_tokens
        if most is None:
            return self._max_model_len
        return min(len(request.token_ids) + most, self._max_model_len)


@dataclass
class _Live:
    """A request under way."""

    request: Request
    completions: list[Completion]
    is_streamed: bool
    arrival_s: float
    num_unfinished: int  # of the completions
    first_token_s: float | None = None
    last_token_s: float | None = None

    def output(self, request_id: int) -> RequestOutput:
        return RequestOutput(
            prompt=self.request.prompt,
            prompt_token_ids=self.request.token_ids,
            outputs=tuple(completion.output() for completion in self.completions),
            request_id=request_id,
            metrics=RequestMetrics(self.arrival_s, self.first_token_s, self.last_token_s),
        )
