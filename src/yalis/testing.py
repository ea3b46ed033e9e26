# SPDX-License-Identifier: Apache-2.0
"""Makes a small random checkpoint in the Hugging Face layout, for the demo and for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

from yalis.config import ModelConfig
from yalis.errors import ConfigError
from yalis.models.decoder import CausalLM
from yalis.parallel.group import Placement, TensorParallel
from yalis.tokenizer import Tokenizer
from yalis.weights.dummy import random_weight
from yalis.weights.loader import WeightPart, weight_parts

_SPECIAL_TOKENS = ("<s>", "</s>")

# What the tokenizer learns its merges from; any prose would do.
_PROSE = """
A model too large for one machine is cut into parts. Each part computes what it can from the numbers that it
holds, and then the parts must agree: every one of them adds what the others found to what it found itself.
This adding together is called an all-reduce, and a language model needs two of them in every layer, for
every single token. When a text is written one token at a time, the messages are small, so it matters less
how much a cable can carry than how soon the first word arrives at its other end. The machines within one
cabinet speak to each other quickly; between cabinets there is a longer way. A good plan therefore adds up
what is near before it sends anything far, and sends far only what is needed there, and only as often as
doubling demands: with two partners one exchange, with four partners two, with eight partners three.
The people who build such machines like to say that the network is the computer. The people who use them would
like to know, before they wait, how long they will wait. Once upon a time there was a small engine that could
read a checkpoint, take a prompt, and continue it with great confidence and no sense whatsoever, because its
weights had been drawn at random. It was nevertheless useful: whatever it said, it had to say the same thing
on one rank, on two ranks, and on four. The quick brown fox jumps over the lazy dog. 0123456789.
"""


def make_checkpoint(
    folder: str | Path,
    *,
    num_shards: int = 2,
    seed: int = 0,
    dtype: str = "float32",
    **overrides: Any,
) -> Path:
    """Write a checkpoint of random weights into `folder` and return its path.

    Its files are those of a checkpoint that transformers saved: config.json, generation_config.json,
    tokenizer.json (a byte-level BPE, so any text survives the round trip), tokenizer_config.json, and
    `num_shards` safetensors files with their index. `overrides` replace fields of config.json. A
    vocabulary larger than the built-in prose can teach leaves its last ids without a text.

    Raises ConfigError, and has written nothing then, for what no model can have.
    """
    folder = Path(folder)
    raw = config_json(dtype, **overrides)
    config = ModelConfig.from_dict(raw)
    parts = _weight_parts(config, num_shards)
    _check_vocabulary(config.vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", raw)
    ends = {"bos_token_id": raw["bos_token_id"], "eos_token_id": raw["eos_token_id"]}
    _write_json(folder / "generation_config.json", ends)
    _write_tokenizer(folder, config.vocab_size)
    _write_weights(
        folder, config, parts, num_shards, seed, _textless_ids(folder, config.vocab_size)
    )
    return folder


def config_json(dtype: str = "float32", **overrides: Any) -> dict[str, Any]:
    """The content of a small model's config.json; `overrides` replace fields."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": dtype,
    } | overrides


def _textless_ids(folder: Path, vocab_size: int) -> list[int]:
    """The tokens that are no text by themselves: broken bytes, control characters, special tokens."""
    tokenizer = Tokenizer(folder)
    texts = [tokenizer.decode([token_id]) for token_id in range(vocab_size)]
    return [i for i, text in enumerate(texts) if not text.isprintable() or text in ("", "\ufffd")]


def _weight_parts(config: ModelConfig, num_shards: int) -> list[WeightPart]:
    """The model's tensors, which `num_shards` files can hold."""
    at = Placement(TensorParallel.single(), torch.float32, torch.device("meta"))
    parts = list(weight_parts(CausalLM(config, at)))
    if not 1 <= num_shards <= len(parts):
        raise ConfigError(
            f"num_shards is {num_shards}; give 1 to {len(parts)}, the number of tensors"
        )
    return parts


def _write_weights(
    folder: Path,
    config: ModelConfig,
    parts: list[WeightPart],
    num_shards: int,
    seed: int,
    textless_ids: list[int],
) -> None:
    file_of: dict[str, str] = {}
    num_bytes = 0
    for shard in range(num_shards):
        tensors: dict[str, Tensor] = {
            part.name: random_weight(part.name, part.shape, seed).to(getattr(torch, config.dtype))
            for part in parts[shard::num_shards]
        }
        # Small rows give small logits: the text is nonsense, but made of words.
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        if head in tensors:
            tensors[head][textless_ids] *= 0.1
        name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        file_of |= dict.fromkeys(tensors, name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(file_of.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _check_vocabulary(vocab_size: int) -> None:
    smallest = len(tokenizers.pre_tokenizers.ByteLevel.alphabet()) + len(_SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ConfigError(
            f"vocab_size is {vocab_size}; a byte-level tokenizer needs at least {smallest}: every byte "
            "and the special tokens"
        )


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_PROSE], trainer)
    bos, eos = _SPECIAL_TOKENS
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    _write_json(folder / "tokenizer_config.json", about)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
