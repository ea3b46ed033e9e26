# SPDX-License-Identifier: Apache-2.0
"""The nouns: what a user asks (Request), what is being worked on (Sequence), what one step computes (Batch),
and what the user gets (RequestOutput). Pure Python: the scheduler and its tests need no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from typing import Literal

from yalis.errors import RequestError

FinishReason = Literal["stop", "length"]

_SEED_BOUND = 2**63


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt. Names and defaults follow vLLM's.

    `temperature=0` is greedy. `top_k` of 0 or -1 keeps every token. `seed` makes a request reproducible
    whatever runs beside it; without one the engine derives it from its own seed and the request's number.
    `stop` ends the text before the first of the given strings. Raises RequestError on a value out of bounds.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | SequenceABC[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(stop, (tuple, list)) or not all(isinstance(s, str) and s for s in stop):
            raise RequestError(f"stop is {self.stop!r}; give a non-empty text or a list of them")
        object.__setattr__(self, "stop", tuple(stop))
        if not _is_int(self.max_tokens) or self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens!r}; give an integer of at least 1")
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise RequestError(
                f"temperature is {self.temperature!r}; give a finite number of at least 0 (0 is greedy)"
            )
        if not _is_int(self.top_k) or self.top_k < -1:
            raise RequestError(
                f"top_k is {self.top_k!r}; give a positive integer, or 0 to keep every token"
            )
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p!r}; give a number above 0 and at most 1")
        if self.seed is not None and (
            not _is_int(self.seed) or not -_SEED_BOUND <= self.seed < _SEED_BOUND
        ):
            raise RequestError(f"seed is {self.seed!r}; give a 64-bit signed integer or None")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        assert isinstance(self.stop, tuple)  # __post_init__ made it one
        return self.stop


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it, checked against the model."""

    prompt: str | None  # None when the user gave token ids
    token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class Draw:
    """What the sampler must know to draw one token: no state, so a step can be repeated on any rank."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    token_idx: int  # how many tokens this request has drawn before: the stream's position


@dataclass(frozen=True)
class Batch:
    """What one step computes: the new tokens of some sequences laid end to end, with nothing between them.

    `token_ids` has one entry per new token; the other fields one per sequence. The step writes the keys
    and values of sequence i from cache position `starts[i] + num_cached[i]` on, and draws its next token.
    """

    token_ids: tuple[int, ...]
    num_new: tuple[int, ...]
    num_cached: tuple[int, ...]
    starts: tuple[int, ...]
    draws: tuple[Draw, ...]


@dataclass(eq=False)
class Sequence:
    """One request under way. Its counters are the only truth about how far it has come."""

    request_id: int
    request: Request
    seed: int
    max_len: int  # prompt and output together never grow past this
    start: int = -1  # of its keys and values in the cache; set by the scheduler on admission
    num_cached: int = 0  # tokens whose keys and values are there; advanced by the scheduler
    output_token_ids: list[int] = field(default_factory=list)
    text: str = ""  # grown by the engine while there are stop strings to look for
    stopped_text: str | None = None  # the text before the stop string that came up
    finish_reason: FinishReason | None = None

    def __len__(self) -> int:
        return len(self.request.token_ids) + len(self.output_token_ids)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def pending_token_ids(self) -> list[int]:
        """The tokens that the cache does not hold yet: the prompt at first, then the last drawn token."""
        prompt = self.request.token_ids
        if self.num_cached >= len(prompt):
            return self.output_token_ids[self.num_cached - len(prompt) :]
        return [*prompt[self.num_cached :], *self.output_token_ids]

    def draw(self) -> Draw:
        p = self.request.params
        return Draw(p.temperature, max(p.top_k, 0), p.top_p, self.seed, len(self.output_token_ids))


@dataclass(frozen=True)
class RequestOutput:
    """What became of one prompt. `finish_reason` is "stop" (an end token or a stop string) or "length"."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
