# SPDX-License-Identifier: Apache-2.0
"""How to continue one prompt: what the user may ask for, checked; and what of it one draw needs. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from yalis.errors import ConfigError, RequestError

# vLLM's default bounds: of alternatives reported beside each token, and of continuations.
MAX_LOGPROBS = 20
MAX_N = 16384

_SEED_BOUND = 2**63
_GENERATION_FIELDS = {"max_new_tokens": "max_tokens"} | {
    name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
}


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt. Names, defaults and bounds follow vLLM's.

    - `n`: how many continuations to draw of the prompt.
    - `max_tokens`: how many tokens each may have; None is as many as the model's length leaves room for.
    - `temperature=0` is greedy: the filters below then change nothing, the penalties still do.
    - `min_p` keeps the tokens at least this fraction as likely as the likeliest; then `top_k` keeps that
      many, where 0 or -1 is all; then `top_p` keeps the likeliest that reach this probability together.
    - `repetition_penalty` divides positive and multiplies negative logits of tokens in prompt or output;
      `presence_penalty` is subtracted once from those in the output, `frequency_penalty` once for each
      time they are there.
    - `seed`: the draws depend on it and on the logits alone, whatever runs beside the request; without one
      the engine derives it from its own seed and the request's number.
    - `stop` ends the text before the first of the given strings, `stop_token_ids` after any of these
      tokens, as an end token of the model does unless `ignore_eos`. None of these tokens can be drawn
      before `min_tokens` others were.
    - `logprobs` reports the log probability of each drawn token and of that many likeliest ones.

    Raises RequestError on a value out of bounds.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    @classmethod
    def from_generation_config(cls, raw: Mapping[str, Any]) -> SamplingParams:
        """What the content of a generation_config.json asks for, as vLLM reads it; defaults for the rest.

        Raises ConfigError for a value out of bounds.
        """
        names = _GENERATION_FIELDS.items()
        asked = {ours: raw[theirs] for theirs, ours in names if raw.get(theirs) is not None}
        try:
            return cls(**asked)
        except RequestError as error:
            raise ConfigError(
                f"generation_config.json: {error}; mend it, or give sampling_params"
            ) from None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(stop, (tuple, list)) or not all(isinstance(s, str) and s for s in stop):
            raise RequestError(f"stop is {self.stop!r}; give a non-empty text or a list of them")
        object.__setattr__(self, "stop", tuple(stop))
        ids = self.stop_token_ids or ()
        if not isinstance(ids, (tuple, list)) or not all(_is_int(i) and i >= 0 for i in ids):
            raise RequestError(
                f"stop_token_ids is {self.stop_token_ids!r}; give a list of token ids of at least 0"
            )
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        self._check_numbers()
        self._check_counts()
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}; give True or False")
        if self.seed is not None and (
            not _is_int(self.seed) or not -_SEED_BOUND <= self.seed < _SEED_BOUND
        ):
            raise RequestError(f"seed is {self.seed!r}; give a 64-bit signed integer or None")

    def _check_counts(self) -> None:
        most = self.max_tokens
        if most is not None and (not _is_int(most) or most < 1):
            raise RequestError(
                f"max_tokens is {most!r}; give an integer of at least 1, or None for no bound but the model's"
            )
        if (
            not _is_int(self.min_tokens)
            or self.min_tokens < 0
            or (most is not None and self.min_tokens > most)
        ):
            raise RequestError(
                f"min_tokens is {self.min_tokens!r}; give an integer from 0 to max_tokens, {most}"
            )
        if not _is_int(self.top_k) or self.top_k < -1:
            raise RequestError(
                f"top_k is {self.top_k!r}; give a positive integer, or 0 to keep every token"
            )
        if self.logprobs is not None and (
            not _is_int(self.logprobs) or not 0 <= self.logprobs <= MAX_LOGPROBS
        ):
            raise RequestError(
                f"logprobs is {self.logprobs!r}; give an integer from 0 to {MAX_LOGPROBS}, or None"
            )
        if not _is_int(self.n) or not 1 <= self.n <= MAX_N:
            raise RequestError(f"n is {self.n!r}; give an integer from 1 to {MAX_N}")
        if self.n > 1 and self.temperature == 0:
            raise RequestError(
                f"n is {self.n} at temperature 0, where all continuations are the same; "
                "give n=1 or a temperature above 0"
            )

    def _check_numbers(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise RequestError(
                f"temperature is {self.temperature!r}; give a finite number of at least 0 (0 is greedy)"
            )
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p!r}; give a number above 0 and at most 1")
        if not _is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise RequestError(f"min_p is {self.min_p!r}; give a number from 0 to 1 (0 is off)")
        if not _is_number(self.repetition_penalty) or not 0 < self.repetition_penalty < math.inf:
            raise RequestError(
                f"repetition_penalty is {self.repetition_penalty!r}; give a finite number above 0 "
                "(1 is off)"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not _is_number(value) or not -2 <= value <= 2:
                raise RequestError(f"{name} is {value!r}; give a number from -2 to 2 (0 is off)")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        assert isinstance(self.stop, tuple)  # __post_init__ made it one
        return self.stop

    @property
    def has_penalties(self) -> bool:
        """Whether a draw depends on the tokens so far."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


@dataclass(frozen=True)
class Draw:
    """What the sampler must know to draw one token: no state, so a step can be repeated on any rank.

    The tokens so far are no part of it: the sampler keeps them on the device, by `slot`.
    """

    params: SamplingParams
    seed: int
    token_idx: int  # how many tokens this request has drawn before: the stream's position
    slot: int = 0  # 0 to max_num_seqs - 1, the request's own while it runs
    banned_token_ids: tuple[int, ...] = ()  # the tokens that would end it before min_tokens


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
