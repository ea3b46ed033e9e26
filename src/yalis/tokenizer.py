# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, as the checkpoint's tokenizer.json says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from yalis.errors import CheckpointError

REPLACEMENT = "\ufffd"  # stands for bytes that form no character
# Of the prompt: enough for a decoder to know that it is not at a text's start.
_NUM_CONTEXT_TOKENS = 6
_MAX_TOKENS_OF_CHARACTER = 4
# Text unfinished after this many tokens is broken, and goes out as it is.
_MAX_HELD_BACK = 16


class Tokenizer:
    """A checkpoint's tokenizer. Special tokens around a prompt (BOS) are tokenizer.json's business."""

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder) / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception, whatever is wrong
            raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from None
        # Settings of a training run that some checkpoints carry along: they would cut or fill prompts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @staticmethod
    def exists(folder: str | Path) -> bool:
        return (Path(folder) / "tokenizer.json").exists()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some tokens, special tokens left out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def decode_after(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        """The text that `token_ids` add to a prompt, with the space that a decoder drops at a start."""
        context = _context(self, prompt_token_ids)
        before, whole = self.decode(context), self._decode_cut_off([*context, *token_ids])
        # Broken bytes in the output can change how the prompt's last bytes read; then it stands alone.
        return whole[len(before) :] if whole.startswith(before) else self.decode(token_ids)

    def _decode_cut_off(self, token_ids: Sequence[int]) -> str:
        """As `decode`, but where bytes of the last character lack, the characters before it are read.

        Some decoders give up on all of the bytes that lie together.
        """
        text = self.decode(token_ids)
        if text.endswith(REPLACEMENT):
            for num_last in range(1, _MAX_TOKENS_OF_CHARACTER):
                finished = self.decode(token_ids[:-num_last])
                if not finished.endswith(REPLACEMENT):
                    return text if text.startswith(finished) else finished + REPLACEMENT
        return text


class Detokenizer:
    """The text of a growing list of tokens while it grows, each token decoded a bounded number of times.

    A token's text depends on its neighbours (a character may span tokens, a leading space is dropped at
    a text's start), so each piece is what a short window gains by the token. The pieces join to what
    `decode_after` says, but for bytes that form no character: those are only certain at the end.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = _context(tokenizer, prompt_token_ids)
        self._num_shown = len(self._window)  # tokens of the window whose text is out already
        self.held_back = ""  # what the others read like so far

    def append(self, token_id: int) -> str:
        """The text that has become certain with this token; often "" in the middle of a character."""
        self._window.append(token_id)
        shown = self._tokenizer.decode(self._window[: self._num_shown])
        whole = self._tokenizer.decode(self._window)
        is_certain = len(whole) > len(shown) and not whole.endswith(REPLACEMENT)
        if not is_certain and len(self._window) - self._num_shown <= _MAX_HELD_BACK:
            self.held_back = whole[len(shown) :]
            return ""
        self.held_back = ""
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        return whole[len(shown) :]


def _context(tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, from the beginning of a character where they have one.

    Half a character in front would make some decoders read none of the bytes that follow, in the output too.
    """
    for num_tokens in range(_NUM_CONTEXT_TOKENS, _NUM_CONTEXT_TOKENS + _MAX_TOKENS_OF_CHARACTER):
        context = list(prompt_token_ids[-num_tokens:])
        if not tokenizer.decode(context).startswith(REPLACEMENT):
            break
    return context
