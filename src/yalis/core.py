# SPDX-License-Identifier: Apache-2.0
"""The nouns: what a user asks (Request), what is being worked on (Sequence), what one step computes (Batch)
and brings (StepResult). Pure Python: the scheduler and its tests need no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from yalis.outputs import FinishReason
from yalis.sampling_params import SamplingParams


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it, checked against the model."""

    prompt: str | None  # None when the user gave token ids
    token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class Admission:
    """A slot begins anew: how its tokens are drawn from now on."""

    slot: int
    params: SamplingParams
    seed: int
    num_prompt_tokens: int
    # The tokens that would end it, and must not be drawn before params.min_tokens others.
    end_token_ids: tuple[int, ...] = ()
    # All its tokens so far, where penalties count them; the step's own may be fewer.
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class NewBlocks:
    """Blocks that a slot's table gains, from entry `first_idx` on."""

    slot: int
    first_idx: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """What one step computes, and all that the ranks are told.

    A running sequence has a slot; ranks keep by slot its block table, how to draw for it, and its last drawn
    token. The first `num_decodes` rows continue from that token, whether or not the scheduler knows it yet:
    one new token each. The other rows are chunks of known tokens: row i has `num_new[i - num_decodes]` of
    them, all in `token_ids` end to end. Every row's new tokens go to cache positions `num_cached[i]` and on
    of its slot. All decodes draw a next token, and those chunks that `is_drawing` says.

    A step reads what earlier steps, and its own other rows, have written to blocks that rows share.
    """

    num_decodes: int
    slots: tuple[int, ...]
    num_cached: tuple[int, ...]
    num_new: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    is_drawing: tuple[bool, ...] = ()
    admissions: tuple[Admission, ...] = ()
    new_blocks: tuple[NewBlocks, ...] = ()

    @property
    def num_draws(self) -> int:
        return self.num_decodes + sum(self.is_drawing)


INVALID_TOKEN = -1  # drawn from logits that were not all finite


@dataclass(frozen=True)
class RowLogprobs:
    """Of one drawn token: its log probability and rank, and the likeliest tokens, in order, with theirs.

    There are as many of these as any request of the step asked for.
    """

    drawn: float
    rank: int
    top: Mapping[int, float]


@dataclass(frozen=True)
class StepResult:
    """What a step drew, in the order of its drawing rows; `logprobs` by the place in that order."""

    token_ids: tuple[int, ...]
    logprobs: Mapping[int, RowLogprobs] = field(default_factory=dict)


@dataclass(eq=False)
class Sequence:
    """One continuation under way. Its counters are the only truth about how far it has come.

    Known tokens are the prompt's and those drawn; `num_computed` of them, and of those still being drawn, are
    in the cache once every step that was scheduled has run.
    """

    request_id: int
    index: int  # which of the request's n
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    max_len: int  # prompt and output together never grow past this
    end_token_ids: tuple[int, ...] = ()
    output_token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    # The scheduler's:
    slot: int = -1  # while it runs
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_in_flight: int = 0  # tokens that scheduled steps draw and that are not known yet
    has_drawn: bool = False  # in this slot, so the ranks know its last token
    num_published: int = 0  # of its blocks, and the identity of their content
    content: int = 0

    def __len__(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def can_draw(self) -> bool:
        """Whether the steps under way leave a token to be drawn."""
        return len(self) + self.num_in_flight < self.max_len

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """The known tokens from `start` up to `stop`."""
        num_prompt = len(self.prompt_token_ids)
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        output = self.output_token_ids[max(0, start - num_prompt) : stop - num_prompt]
        return (*self.prompt_token_ids[start:], *output)
