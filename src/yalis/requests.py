# SPDX-License-Identifier: Apache-2.0
"""What the user may ask: prompts and their parameters, all checked before any is begun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, cast

from yalis.core import Request
from yalis.errors import RequestError
from yalis.sampling_params import SamplingParams
from yalis.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, or as in vLLM `{"prompt": text}` or `{"prompt_token_ids": ids}`."""


def check_requests(
    prompts: Prompt | Sequence[Prompt],
    sampling_params: SamplingParams | Sequence[SamplingParams],
    *,
    tokenizer: Tokenizer | None,
    folder: str,
    vocab_size: int,
    max_model_len: int,
) -> list[Request]:
    """One request for each prompt, in order. RequestError names the prompt that cannot be served."""
    listed = _as_list(prompts)
    params = _per_prompt(sampling_params, len(listed))
    if tokenizer is None and any(p.stop_strings for p in params):
        raise RequestError(f"stop strings need {folder}/tokenizer.json, which is missing; add it")
    for token_id in {token_id for p in params for token_id in p.stop_token_ids}:
        if token_id >= vocab_size:
            raise RequestError(
                f"stop_token_ids has {token_id}; give integers from 0 to {vocab_size - 1}, the model's "
                "vocabulary"
            )
    requests = []
    for idx, (prompt, its_params) in enumerate(zip(listed, params, strict=True)):
        content = _content(prompt) if isinstance(prompt, Mapping) else prompt
        text = content if isinstance(content, str) else None
        token_ids = _token_ids(idx, content, tokenizer, folder)
        _check_token_ids(idx, token_ids, vocab_size, max_model_len)
        requests.append(Request(text, tuple(map(int, token_ids)), its_params))
    return requests


def _content(prompt: Mapping[str, Any]) -> object:
    """The text or the token ids; the prompt itself when it is not one of vLLM's two."""
    names = [name for name in ("prompt", "prompt_token_ids") if name in prompt]
    return prompt[names[0]] if len(prompt) == len(names) == 1 else prompt


def _token_ids(
    idx: int, prompt: object, tokenizer: Tokenizer | None, folder: str
) -> tuple[int, ...]:
    if isinstance(prompt, (list, tuple)):
        return tuple(prompt)
    if not isinstance(prompt, str):
        raise RequestError(
            f"prompt {idx} is {prompt!r}; give a text, a list of token ids, or one of these in a mapping "
            'of "prompt" or "prompt_token_ids" alone'
        )
    if tokenizer is None:
        raise RequestError(
            f"prompt {idx} is a text, but {folder}/tokenizer.json is missing; add it, or give token ids"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"prompt {idx} has half a surrogate pair at character {error.start}; give valid Unicode, e.g. "
            'by prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")'
        ) from None
    return tuple(tokenizer.encode(prompt)) if prompt else ()


def _check_token_ids(
    idx: int, token_ids: tuple[int, ...], vocab_size: int, max_model_len: int
) -> None:
    if not token_ids:
        raise RequestError(f"prompt {idx} is empty; give at least one token")
    for token_id in token_ids:
        if not _is_int(token_id) or not 0 <= token_id < vocab_size:
            raise RequestError(
                f"prompt {idx} has token id {token_id!r}; give integers from 0 to {vocab_size - 1}, "
                "the model's vocabulary"
            )
    if len(token_ids) >= max_model_len:
        raise RequestError(
            f"prompt {idx} has {len(token_ids)} tokens, which leaves no room for output within "
            f"max_model_len {max_model_len}; shorten it, or raise max_model_len if the model allows more"
        )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise RequestError(
            f"prompts is a {type(prompts).__name__}; give a text, a list of token ids, or a list of these"
        )
    if prompts and all(map(_is_int, prompts)):
        return [cast("Sequence[int]", prompts)]
    return cast("list[Prompt]", list(prompts))


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)  # numpy's integers too


def _per_prompt(
    given: SamplingParams | Sequence[SamplingParams], num_prompts: int
) -> list[SamplingParams]:
    if isinstance(given, SamplingParams):
        return [given] * num_prompts
    is_list = isinstance(given, (list, tuple))
    if not is_list or not all(isinstance(params, SamplingParams) for params in given):
        raise RequestError(f"sampling_params is {given!r}; give SamplingParams, or a list of them")
    if len(given) != num_prompts:
        raise RequestError(
            f"{len(given)} sampling_params for {num_prompts} prompts; give one for all or one for each"
        )
    return list(given)
