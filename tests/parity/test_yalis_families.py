"""Every family, split over 1, 2 and 4 ranks, is the model that transformers runs: logits and greedy text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers_reference import reference_logits, save_random_model

from plain_attention import attend
from thread_ranks import on_ranks
from yalis.config import ModelConfig
from yalis.models.decoder import CausalLM
from yalis.parallel.group import Placement, TensorParallel
from yalis.weights.checkpoint import Checkpoint
from yalis.weights.loader import load_weights

pytestmark = pytest.mark.parity

SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 133}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 2.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "intermediate_size": 91},
    "llama-tied": {"family": "llama", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 14, "rope_parameters": YARN},
    "qwen3-bias": {"family": "qwen3", "head_dim": 14, "attention_bias": True},
    "mistral": {"sliding_window": None, "head_dim": 10},
    "mistral-v0.1": {"family": "mistral", "sliding_window": 20},
    "ministral": {
        "sliding_window": 20,
        "head_dim": 10,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "qwen3-window": {
        "family": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
}


@torch.inference_mode()
def run_rank(
    folder: Path, tp: TensorParallel, token_ids: list[int]
) -> tuple[Tensor | None, Tensor]:
    """The logits after every token, on rank 0, and the likeliest tokens."""
    config = ModelConfig.from_folder(folder)
    model = CausalLM(config, Placement(tp, torch.float32, torch.device("cpu")))
    load_weights(model, Checkpoint(folder))
    ids = torch.tensor(token_ids)
    share = model.lm_head(model(ids, torch.arange(len(ids)), attend))
    logits = model.lm_head.gather(share)
    token_ids, _, is_finite = model.lm_head.likeliest(share)
    assert is_finite.all()
    return logits, token_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = save_random_model(tmp_path, **({"family": name} | SHAPE | FAMILIES[name]))
    prompt = torch.randint(133, (1, 60), generator=torch.Generator().manual_seed(4))
    text = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False
    )[0].tolist()
    assert len(text) == 124
    want = reference_logits(model, text)
    for size in (1, 2, 4):
        results = on_ranks(size, lambda tp: run_rank(tmp_path, tp, text))
        (logits, _), *others = results
        assert all(theirs is None for theirs, _ in others)
        torch.testing.assert_close(logits, want, atol=1e-4, rtol=0)
        for _, token_ids in results:
            assert token_ids[59:-1].tolist() == text[60:]
