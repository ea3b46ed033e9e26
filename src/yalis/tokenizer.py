# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, as the checkpoint's tokenizer.json says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from yalis.errors import CheckpointError

_REPLACEMENT = "\ufffd"
# Of the prompt: enough for a decoder to know that it is not at a text's start.
_NUM_CONTEXT_TOKENS = 6
# A character spans at most four tokens; text unfinished after this many is broken, and goes out as it is.
_MAX_HELD_BACK = 16


class Tokenizer:
    """A checkpoint's tokenizer. Special tokens around a prompt (BOS) are tokenizer.json's business."""

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder) / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception, whatever is wrong
            raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from None

    @staticmethod
    def exists(folder: str | Path) -> bool:
        return (Path(folder) / "tokenizer.json").exists()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some tokens, special tokens left out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)


class Detokenizer:
    """The text of a growing list of tokens, each token decoded a bounded number of times.

    A token's text depends on its neighbours (a character may span tokens, a leading space is dropped at
    a text's start), so each piece is what a short window gains by the token.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt_token_ids[-_NUM_CONTEXT_TOKENS:])
        self._num_shown = len(self._window)  # tokens of the window whose text is out already

    def append(self, token_id: int) -> str:
        """The text that has become certain with this token; often "" in the middle of a character."""
        self._window.append(token_id)
        return self._advance(is_last=False)

    def finish(self) -> str:
        """What was held back: the replacement sign of a character that never became whole."""
        return self._advance(is_last=True)

    def _advance(self, *, is_last: bool) -> str:
        shown = self._tokenizer.decode(self._window[: self._num_shown])
        whole = self._tokenizer.decode(self._window)
        is_last |= len(self._window) - self._num_shown > _MAX_HELD_BACK
        if not is_last and (len(whole) <= len(shown) or whole.endswith(_REPLACEMENT)):
            return ""
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        return whole[len(shown) :]
