# SPDX-License-Identifier: Apache-2.0
"""What the user gets: news of a request while it runs, and its outputs at the end. Pure; vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Logprob:
    """How likely a token was. `rank` is its place among all tokens, from 1; `decoded_token` is its text."""

    logprob: float
    rank: int
    decoded_token: str | None


TokenLogprobs = Mapping[int, Logprob]
"""By token id: the drawn token, and the likeliest ones that `SamplingParams.logprobs` asked for."""


@dataclass(frozen=True)
class RequestMetrics:
    """When things happened, in seconds of `time.monotonic`; None for what has not."""

    arrival_s: float
    first_token_s: float | None = None
    last_token_s: float | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation.

    `finish_reason` is "stop" (an end token, a stop token or a stop string), "length", "abort" (it was
    cancelled) or "error", and then `error` says why. `stop_reason` is the stop string or stop token that
    came up; None for the model's own end token. None of these is part of `text`. `logprobs` has an entry
    for each token.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error: str | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """The log probability of all its tokens together; None unless `logprobs` were asked for."""
        if self.logprobs is None:
            return None
        return sum(at[i].logprob for i, at in zip(self.token_ids, self.logprobs, strict=True))


@dataclass(frozen=True)
class RequestOutput:
    """What became of one prompt: its `n` continuations. Two are equal when what was said is."""

    prompt: str | None  # None when the user gave token ids
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    request_id: int = field(default=-1, compare=False)
    metrics: RequestMetrics | None = field(default=None, compare=False)

    @property
    def text(self) -> str:
        """The first continuation's, as are the next two."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason


@dataclass(frozen=True)
class Update:
    """What one step added to one continuation.

    `text` is what has become certain and cannot be cut off by a stop string any more; the texts of all
    updates join to the output's, but for bytes that form no character. `output` comes with the request's
    last update.
    """

    request_id: int
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    output: RequestOutput | None = None
