# SPDX-License-Identifier: Apache-2.0
"""Measures an LLM: how long a token takes, and how many come in all."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from yalis.core import Request
from yalis.errors import ConfigError, YalisError
from yalis.llm import LLM
from yalis.outputs import RequestMetrics, RequestOutput
from yalis.sampling_params import SamplingParams


@dataclass(frozen=True)
class Workload:
    """Requests that arrive together: the lengths of their prompts and outputs, in tokens."""

    lengths: tuple[tuple[int, int], ...]

    @classmethod
    def uniform(cls, batch_size: int, prompt_len: int, output_len: int) -> Workload:
        return cls(((prompt_len, output_len),) * batch_size)

    @classmethod
    def random(
        cls, num_prompts: int, prompt_len: int, output_len: int, range_ratio: float, seed: int
    ) -> Workload:
        """Lengths evenly spread over `range_ratio` of the given ones to either side."""
        draw = random.Random(seed)

        def length(mean: int) -> int:
            spread = int(mean * range_ratio)
            return max(1, draw.randint(mean - spread, mean + spread))

        return cls(tuple((length(prompt_len), length(output_len)) for _ in range(num_prompts)))

    def check(self, llm: LLM) -> None:
        """Raise ConfigError when outputs would be cut short."""
        longest = max(prompt + output for prompt, output in self.lengths)
        if longest > llm.max_model_len:
            most = llm.config.max_position_embeddings
            bound = f"max_model_len {llm.max_model_len}; use shorter ones"
            bound += (
                f", or raise it up to {most}"
                if llm.max_model_len < most
                else "; the model allows no more"
            )
            raise ConfigError(
                f"prompt and output together have {longest} tokens, more than {bound}"
            )

    @property
    def mean_context(self) -> float:
        """Tokens that a sequence sees in a decode step, on average over all of them."""
        steps = sum(output for _, output in self.lengths)
        return sum(p * o + o * (o + 1) / 2 for p, o in self.lengths) / steps


@dataclass(frozen=True)
class Run:
    """One run of a workload, in seconds."""

    elapsed_s: float
    first_token_s: tuple[float, ...]  # of each request, since all arrived
    step_s: tuple[float, ...]  # between consecutive steps that brought a token to every request
    num_output_tokens: int

    @property
    def prefill_s(self) -> float:
        """Until every request had its first token."""
        return max(self.first_token_s)


def run(llm: LLM, workload: Workload, seed: int | str) -> Run:
    """Serve the workload once, greedily and to its full lengths.

    `seed` and the lengths draw the prompts' tokens; a run before with both the same left them in the KV
    cache.

    Collective under a launcher. Raises YalisError when a request ends before its length.
    """
    requests = _requests(llm, workload, seed)
    engine, num_requests = llm.engine, len(requests)
    for request in requests:
        engine.check(request)
    metrics: list[RequestMetrics] = []
    start_s = time.monotonic()
    for request in requests:
        engine.add(request, is_streamed=False)
    step_s: list[float] = []
    last_full_s, num_tokens = None, 0
    while engine.has_work:
        updates = engine.step()
        now_s = time.monotonic()
        num_tokens += len(updates)
        for output in (update.output for update in updates if update.output):
            _require_full_length(output)
            assert output.metrics is not None
            metrics.append(output.metrics)
        if len(updates) < num_requests:
            last_full_s = None
            continue
        if last_full_s is not None:
            step_s.append(now_s - last_full_s)
        last_full_s = now_s
    first = tuple(m.first_token_s - start_s for m in metrics if m.first_token_s is not None)
    return Run(time.monotonic() - start_s, first, tuple(step_s), num_tokens)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _require_full_length(output: RequestOutput) -> None:
    [completion] = output.outputs
    if completion.finish_reason != "length":
        raise YalisError(
            f"a request ended after {len(completion.token_ids)} tokens with {completion.finish_reason!r} "
            f"({completion.error}), so its times would mean nothing"
        )


def _requests(llm: LLM, workload: Workload, seed: int | str) -> list[Request]:
    # With the lengths, so that a larger batch does not begin with the prompts of a smaller one.
    draw, vocab_size = random.Random(f"{seed} {workload.lengths}"), llm.config.vocab_size
    return [
        Request(
            None,
            tuple(draw.choices(range(vocab_size), k=num_prompt)),
            SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True),
        )
        for num_prompt, num_output in workload.lengths
    ]
