"""From prompt to text as transformers does it: our own checkpoints, tokenizer, greedy search, end tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from yalis import LLM, SamplingParams
from yalis.testing import make_checkpoint
from yalis.tokenizer import Tokenizer

pytestmark = pytest.mark.parity

PROMPTS = ["Once upon a time", "x", "Grüße, 世界! 🙂\n\tcode = {1: 2}", "The network is " * 30]
GREEDY = SamplingParams(max_tokens=64, temperature=0)

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1, "seed": 1},
    "bfloat16-file": {"dtype": "bfloat16", "head_dim": 24, "num_hidden_layers": 2},
}


@torch.inference_mode()
def reference(model: Any, token_ids: tuple[int, ...]) -> tuple[int, ...]:
    ids = torch.tensor([token_ids])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False)
    return tuple(out[0, len(token_ids) :].tolist())


@pytest.mark.parametrize("name", SHAPES)
def test_sixty_four_greedy_tokens_and_their_text(name: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, num_shards=3, **SHAPES[name])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with LLM(str(tmp_path), dtype="float32") as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.prompt == prompt
        assert output.prompt_token_ids == tuple(tokenizer(prompt).input_ids)
        assert output.token_ids == reference(model, output.prompt_token_ids)
        assert output.text == tokenizer.decode(output.token_ids, skip_special_tokens=True)
        assert output.finish_reason == ("stop" if output.token_ids[-1] == 1 else "length")
        assert len(set(output.token_ids)) > len(output.token_ids) / 3  # lively, not one token


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_any_of_several_end_tokens_ends_the_text(where: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    with LLM(str(tmp_path)) as llm:
        [free] = llm.generate("x", SamplingParams(max_tokens=64, temperature=0, ignore_eos=True))
    end = free.token_ids[20]
    path = tmp_path / where
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [510, end]}))
    if where == "config.json":
        (tmp_path / "generation_config.json").unlink()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with LLM(str(tmp_path)) as llm:
        [ended] = llm.generate("x", GREEDY)
        [ignored] = llm.generate("x", SamplingParams(max_tokens=64, temperature=0, ignore_eos=True))
    assert ended.token_ids == reference(model, ended.prompt_token_ids)
    assert ended.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert ended.finish_reason == "stop"
    assert ignored.token_ids == free.token_ids
    assert ignored.finish_reason == "length"


def test_a_tokenizer_without_bos_gets_none(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with LLM(str(tmp_path)) as llm:
        [output] = llm.generate("Once", SamplingParams(max_tokens=1))
    assert output.prompt_token_ids == tuple(
        AutoTokenizer.from_pretrained(tmp_path)("Once").input_ids
    )
    assert output.prompt_token_ids[0] != 0


@pytest.mark.parametrize("switch", ["add_bos_token", "add_eos_token"])
def test_tokenizer_json_has_the_last_word_on_special_tokens(switch: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    for value in (True, False):
        path.write_text(json.dumps(json.loads(path.read_text()) | {switch: value}))
        want = tuple(AutoTokenizer.from_pretrained(tmp_path)("Once").input_ids)
        assert Tokenizer(tmp_path).encode("Once") == list(want)


def test_truncation_and_padding_left_in_tokenizer_json_do_nothing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for prompt in ("x", "Once upon a time there was a small engine"):
        assert Tokenizer(tmp_path).encode(prompt) == theirs(prompt).input_ids


def test_sentencepiece_text_keeps_the_space_between_prompt_and_continuation(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, vocab_size=300)
    pieces = ["<s>", "</s>", "▁", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghij"]
    pieces += [f"▁{a}{b}" for a in "abcd" for b in "efghijk"][: 300 - len(pieces)]
    llama2 = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    llama2.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    parts = tokenizers.decoders
    llama2.decoder = parts.Sequence(
        [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)]
    )
    llama2.save(str(tmp_path / "tokenizer.json"))
    prompt = [3 + 65, *range(270, 280)]
    with LLM(str(tmp_path)) as llm:
        [output] = llm.generate([prompt], SamplingParams(max_tokens=200, temperature=0.0))
    whole = llama2.decode([*prompt, *output.token_ids])
    assert whole == llama2.decode(prompt) + output.text
