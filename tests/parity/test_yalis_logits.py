"""The model is the one that transformers runs: logits of the same checkpoint, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers_reference import (
    all_logits,
    make_batch,
    make_runner,
    reference_logits,
    save_random_model,
)

pytestmark = pytest.mark.parity

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
QWEN2 = {"family": "qwen2", "num_key_value_heads": 2}
QWEN3 = {"family": "qwen3", "num_key_value_heads": 3, "head_dim": 20}
MISTRAL = {"family": "mistral", "num_key_value_heads": 2, "sliding_window": None}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama2": {},
    "gqa-3": {"num_key_value_heads": 2},
    "one-kv-head": {"num_key_value_heads": 1},
    "one-head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "odd-sizes": {
        "vocab_size": 257,
        "hidden_size": 66,
        "intermediate_size": 67,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
    "wide-heads": {"head_dim": 20, "num_key_value_heads": 3},
    "narrow-heads": {"head_dim": 2},
    "attention-bias": {"attention_bias": True, "num_key_value_heads": 3},
    "mlp-bias": {"mlp_bias": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}},
    "llama3": {"rope_parameters": LLAMA3, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}},
    "yarn": {"rope_parameters": YARN},
    "yarn-in-detail": {
        "head_dim": 64,
        "rope_parameters": YARN
        | {
            "beta_fast": 20,
            "beta_slow": 2,
            "truncate": False,
            "mscale": 0.7,
            "mscale_all_dim": 1.2,
        },
    },
    "yarn-of-a-small-theta": {
        "rope_parameters": YARN | {"rope_theta": 10.0, "original_max_position_embeddings": 40960}
    },
    "yarn-truncate-null": {"rope_parameters": YARN | {"truncate": None}, "head_dim": 32},
    "yarn-factor": {"rope_parameters": YARN | {"attention_factor": 1.3}, "head_dim": 32},
    "qwen2": QWEN2,
    "qwen2-tied": QWEN2 | {"tie_word_embeddings": True, "hidden_size": 60},
    "qwen2-window-off": QWEN2 | {"use_sliding_window": False, "sliding_window": 4},
    "qwen3": QWEN3,
    "qwen3-bias-tied": QWEN3 | {"attention_bias": True, "tie_word_embeddings": True},
    "qwen3-yarn": QWEN3 | {"rope_parameters": YARN},
    "mistral": MISTRAL,
    "mistral-wide-heads": MISTRAL | {"head_dim": 18, "rms_norm_eps": 1e-3},
    "mistral-window": MISTRAL | {"sliding_window": 18},
    "qwen2-window": QWEN2
    | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3-window-of-one": QWEN3
    | {
        "use_sliding_window": True,
        "sliding_window": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
    },
    "mistral-window-unreached": MISTRAL | {"sliding_window": 256},
    "everything": {
        "rope_parameters": LLAMA3 | {"factor": 32.0},
        "tie_word_embeddings": True,
        "head_dim": 10,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "vocab_size": 133,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_a_ragged_batch_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = save_random_model(tmp_path, **CONFIGS[name])
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    runner = make_runner(tmp_path)
    generator = torch.Generator().manual_seed(2)
    vocab_size = model.config.vocab_size
    lengths, slots = [1, 200, 17], [5, 0, 3]
    prompts = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]
    got = all_logits(runner, make_batch(prompts, [0, 0, 0], slots)).split(lengths)
    for logits, prompt in zip(got, prompts, strict=True):
        torch.testing.assert_close(logits, reference_logits(model, prompt), atol=1e-4, rtol=0)
    # Then from the cache: one more token for one, several for another, none for the third.
    more = [[5], [7, 9, 11]]
    got = all_logits(runner, make_batch(more, [1, 17], [5, 3])).split([1, 3])
    for logits, prompt, new in zip(got, (prompts[0], prompts[2]), more, strict=True):
        want = reference_logits(model, prompt + new)[-len(new) :]
        torch.testing.assert_close(logits, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_logits_are_as_close_as_their_type_allows(dtype: str, tmp_path: Path) -> None:
    model = save_random_model(tmp_path, num_key_value_heads=2)
    token_ids = list(range(3, 40))
    exact = reference_logits(model, token_ids)
    theirs = reference_logits(model.to(getattr(torch, dtype)), token_ids).float()
    batch = make_batch([token_ids], [0], [0])
    ours = all_logits(make_runner(tmp_path, dtype=dtype), batch).float()
    # The same precision spent, not the same bits: our error may be no worse than half as much again.
    assert (ours - exact).square().mean().sqrt() < 1.5 * (theirs - exact).square().mean().sqrt()


def test_old_names_in_config_json_mean_the_same_and_one_file_is_enough(tmp_path: Path) -> None:
    model = save_random_model(tmp_path, max_shard_size="1GB", rope_parameters=LLAMA3)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    scaling = raw.pop("rope_parameters")
    raw["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    raw["rope_scaling"] = scaling
    raw["torch_dtype"] = raw.pop("dtype")
    path.write_text(json.dumps(raw))
    token_ids = list(range(100))
    got = all_logits(make_runner(tmp_path), make_batch([token_ids], [0], [0]))
    torch.testing.assert_close(got, reference_logits(model, token_ids), atol=1e-4, rtol=0)
