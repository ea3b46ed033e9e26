# SPDX-License-Identifier: Apache-2.0
"""The nouns: what a user asks (Request), what is being worked on (Sequence), what one step computes (Batch),
and what the user gets (RequestOutput). Pure Python: the scheduler and its tests need no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from yalis.sampling_params import Draw, SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it, checked against the model."""

    prompt: str | None  # None when the user gave token ids
    token_ids: tuple[int, ...]
    params: SamplingParams


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
        return Draw(self.request.params, self.seed, len(self.output_token_ids))


@dataclass(frozen=True)
class RequestOutput:
    """What became of one prompt. `finish_reason` is "stop" (an end token or a stop string) or "length"."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
