"""What the parity tests share: a checkpoint that transformers wrote, read by both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from yalis.config import ModelConfig
from yalis.core import Batch, NewBlocks
from yalis.options import EngineOptions
from yalis.parallel.group import TensorParallel
from yalis.runner import Runner

SMALL: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": None,
}


def save_random_model(
    folder: Path, *, family: str = "llama", max_shard_size: str = "60KB", **fields: Any
) -> Any:
    """A transformers model with lively random weights, saved by its own save_pretrained."""
    config = AutoConfig.for_model(family, **(SMALL | fields))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        noise = torch.empty(weight.shape).normal_(generator=generator)
        if name.endswith("norm.weight"):
            weight.data = 1 + 0.2 * noise
        elif weight.dim() == 1:
            weight.data = 0.3 * noise
        else:
            weight.data = noise * 1.5 / weight.shape[1] ** 0.5
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def make_runner(folder: Path, **options: Any) -> Runner:
    options = {"max_num_seqs": 8} | options
    config = ModelConfig.from_folder(folder)
    device = torch.device("cpu")
    return Runner(EngineOptions(str(folder), **options), config, TensorParallel.single(), device)


def make_batch(token_ids: list[list[int]], num_cached: list[int], slots: list[int]) -> Batch:
    """Chunks of several sequences. A slot's blocks lie scattered: every eighth from its own number on."""
    return Batch(
        num_decodes=0,
        slots=tuple(slots),
        num_cached=tuple(num_cached),
        num_new=tuple(map(len, token_ids)),
        token_ids=tuple(token_id for ids in token_ids for token_id in ids),
        is_drawing=(False,) * len(slots),
        new_blocks=tuple(NewBlocks(slot, 0, tuple(range(slot, 128, 8))) for slot in slots),
    )


def all_logits(runner: Runner, batch: Batch) -> torch.Tensor:
    """`[num_tokens, vocab]`: the logits after every token of the batch."""
    with torch.inference_mode():
        head = runner.model.lm_head
        logits = head.gather(head(runner.forward(batch)))
    assert logits is not None
    return logits


@torch.inference_mode()
def reference_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([token_ids])).logits[0]
