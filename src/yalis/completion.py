# SPDX-License-Identifier: Apache-2.0
"""One continuation as the user sees it: its text while it grows, and what ends it."""

from __future__ import annotations

from itertools import islice

from yalis.core import INVALID_TOKEN, RowLogprobs, Sequence
from yalis.outputs import CompletionOutput, Logprob, TokenLogprobs
from yalis.tokenizer import REPLACEMENT, Detokenizer, Tokenizer

_NOT_FINITE = (
    "the model's logits were NaN or infinite; look at the weights and their type (float16 overflows where "
    "bfloat16 does not)"
)


class Completion:
    """Takes the tokens of one sequence, decides when it is finished, and makes its output.

    Text is made token by token only when somebody reads it so, or for stop strings; else once at the end.
    """

    def __init__(
        self, sequence: Sequence, tokenizer: Tokenizer | None, *, is_streamed: bool
    ) -> None:
        self.sequence = sequence
        self._tokenizer = tokenizer
        self._stop_strings = sequence.params.stop_strings
        self._detokenizer: Detokenizer | None = None
        if tokenizer and (is_streamed or self._stop_strings):
            self._detokenizer = Detokenizer(tokenizer, sequence.prompt_token_ids)
        self._text = ""  # what is certain so far
        self._num_shown = 0  # characters of it that `take_text` has given out
        self._num_searched = 0  # characters in which stop strings have been looked for
        self._stopped_text: str | None = None  # the text before the stop string that came up
        self._stop_reason: str | int | None = None
        self._error: str | None = None
        self._logprobs: list[TokenLogprobs] = []

    def append(self, logprobs: RowLogprobs | None) -> None:
        """Look at the sequence's newest token; sets its `finish_reason` when that was the last one."""
        sequence, params = self.sequence, self.sequence.params
        token_id = sequence.output_token_ids[-1]
        if token_id == INVALID_TOKEN:
            sequence.output_token_ids.pop()
            sequence.finish_reason, self._error = "error", _NOT_FINITE
            return
        if logprobs is not None:
            self._logprobs.append(self._token_logprobs(token_id, logprobs))
        if token_id in sequence.end_token_ids:
            sequence.finish_reason = "stop"
            if token_id in params.stop_token_ids:
                self._stop_reason = token_id
        elif self._grow_text(token_id):
            sequence.finish_reason = "stop"
        elif len(sequence) >= sequence.max_len:
            sequence.finish_reason = "length"

    def take_text(self) -> str:
        """The text that has become certain since the last call: all of it once the sequence is finished."""
        if self.sequence.is_finished:
            final = self._final_text()
            # Broken bytes may read otherwise in the whole; what was given out cannot be taken back.
            if self._detokenizer and not final.startswith(self._text[: self._num_shown]):
                final = self._text + self._detokenizer.held_back
            begin, self._num_shown = self._num_shown, len(final)
            return final[begin:]
        end = len(self._text) - self._num_held_back()
        begin, self._num_shown = self._num_shown, max(self._num_shown, end)
        return self._text[begin : self._num_shown]

    def last_logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        return tuple(self._logprobs[-1:]) if self._logprobs else None

    def output(self) -> CompletionOutput:
        sequence = self.sequence
        assert sequence.finish_reason is not None
        wants_logprobs = sequence.params.logprobs is not None
        return CompletionOutput(
            index=sequence.index,
            text=self._final_text(),
            token_ids=tuple(sequence.output_token_ids),
            finish_reason=sequence.finish_reason,
            stop_reason=self._stop_reason,
            logprobs=tuple(self._logprobs) if wants_logprobs else None,
            error=self._error,
        )

    def _grow_text(self, token_id: int) -> bool:
        """True when a stop string has come up."""
        if self._detokenizer is None:
            return False
        self._text += self._detokenizer.append(token_id)
        # Whole characters before broken ones count too: the text may end with these.
        text = self._text + self._detokenizer.held_back.rstrip(REPLACEMENT)
        num_before, self._num_searched = self._num_searched, len(text)
        if len(self.sequence.output_token_ids) <= self.sequence.params.min_tokens:
            return False
        hits = []
        for stop in self._stop_strings:
            # It may have begun in earlier tokens, but must end in this one's text.
            found = text.find(stop, max(0, num_before - len(stop) + 1))
            if found >= 0:
                hits.append((found, stop))
        if hits:
            begin, self._stop_reason = min(hits, key=lambda hit: hit[0])
            self._stopped_text = text[:begin]
        return bool(hits)

    def _num_held_back(self) -> int:
        """How many last characters may turn out to be the beginning of a stop string."""
        longest = max(map(len, self._stop_strings), default=0)
        for length in range(min(longest - 1, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-length:]) for stop in self._stop_strings):
                return length
        return 0

    def _final_text(self) -> str:
        if self._stopped_text is not None:
            return self._stopped_text
        if self._tokenizer is None:
            return ""
        token_ids = self.sequence.output_token_ids
        if self.sequence.finish_reason == "stop":
            token_ids = token_ids[:-1]  # the token that ended it is no part of the text
        return self._tokenizer.decode_after(self.sequence.prompt_token_ids, token_ids)

    def _token_logprobs(self, token_id: int, row: RowLogprobs) -> TokenLogprobs:
        likeliest = islice(row.top.items(), self.sequence.params.logprobs)
        entries = {token_id: (row.drawn, row.rank)}
        entries |= {token: (logprob, rank) for rank, (token, logprob) in enumerate(likeliest, 1)}
        decode = self._tokenizer.decode if self._tokenizer else lambda _: None
        return {token: Logprob(*entry, decode([token])) for token, entry in entries.items()}
