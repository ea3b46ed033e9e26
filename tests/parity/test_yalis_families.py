# SPDX-License-Identifier: Apache-2.0
"""Every family, split over 1, 2 and 4 ranks, is the model that transformers runs: logits and greedy text."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_reference import reference_logits, save_random_model
from torch import Tensor

from plain_attention import attend
from yalis.config import ModelConfig
from yalis.models.decoder import CausalLM
from yalis.parallel.all_reduce import AllReduce
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
    "qwen3-window": {
        "family": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
}


class Meeting:
    """Where ranks that are threads leave what each has, and find what all have."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=60)
        self._parts: list[Any] = [None] * size

    def exchange(self, rank: int, part: Any) -> list[Any]:
        self._parts[rank] = part
        self._barrier.wait()
        parts = list(self._parts)
        self._barrier.wait()
        return parts


class ThreadAllReduce(AllReduce):
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self._rank = meeting, rank

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack(self._meeting.exchange(self._rank, x)).sum(dim=0)


@dataclass(frozen=True)
class ThreadParallel(TensorParallel):
    meeting: Meeting | None = None

    def gather(self, x: Tensor) -> Tensor | None:
        assert self.meeting is not None
        parts = self.meeting.exchange(self.rank, x)
        return torch.cat(parts, dim=-1) if self.rank == 0 else None


@torch.inference_mode()
def rank_logits(folder: Path, tp: TensorParallel, token_ids: list[int]) -> Tensor | None:
    config = ModelConfig.from_folder(folder)
    model = CausalLM(config, Placement(tp, torch.float32, torch.device("cpu")))
    load_weights(model, Checkpoint(folder))
    ids = torch.tensor(token_ids)
    return model.compute_logits(model(ids, torch.arange(len(ids)), attend))


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
        meeting = Meeting(size)
        ranks = [
            ThreadParallel(rank, size, ThreadAllReduce(meeting, rank), meeting=meeting)
            for rank in range(size)
        ]
        with ThreadPoolExecutor(size) as pool:
            results = list(pool.map(lambda tp: rank_logits(tmp_path, tp, text), ranks))
        assert results[1:] == [None] * (size - 1)
        torch.testing.assert_close(results[0], want, atol=1e-4, rtol=0)
        assert results[0] is not None
        assert results[0][59:-1].argmax(dim=-1).tolist() == text[60:]
