# SPDX-License-Identifier: Apache-2.0
"""Each rank reads its own part of the checkpoint, and the parts make up the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from yalis.config import ModelConfig
from yalis.models.decoder import CausalLM
from yalis.parallel.all_reduce import NoAllReduce
from yalis.parallel.group import Placement, TensorParallel
from yalis.testing import make_checkpoint
from yalis.weights.checkpoint import Checkpoint
from yalis.weights.dummy import DummyWeights
from yalis.weights.loader import load_weights, weight_parts

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd": {"vocab_size": 307, "intermediate_size": 91, "head_dim": 10, "attention_bias": True,
            "mlp_bias": True, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1, "vocab_size": 259},
    "narrow": {"intermediate_size": 3},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 6, "tie_word_embeddings": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
}  # fmt: skip


def rank_model(config: ModelConfig, rank: int, num_ranks: int, device: str) -> CausalLM:
    tp = TensorParallel(rank, num_ranks, NoAllReduce())
    return CausalLM(config, Placement(tp, torch.float32, torch.device(device)))


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_every_weight_is_on_one_rank_or_on_all_its_replicas(
    name: str, num_ranks: int, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, num_hidden_layers=1, **SHAPES[name])
    config = ModelConfig.from_folder(tmp_path)
    counts: dict[str, torch.Tensor] = {}
    for rank in range(num_ranks):
        for part in weight_parts(rank_model(config, rank, num_ranks, "meta")):
            count = counts.setdefault(part.name, torch.zeros(part.shape, dtype=torch.int))
            count[part.region] += 1
            assert count[part.region].shape == part.target.shape
    stored: set[str] = set()
    for path in tmp_path.glob("*.safetensors"):
        stored.update(safe_open(path, "pt").keys())
    assert counts.keys() == stored
    for tensor_name, count in counts.items():
        copies = 1
        if "norm" in tensor_name:
            copies = num_ranks
        elif "k_proj" in tensor_name or "v_proj" in tensor_name:
            copies = max(1, num_ranks // config.num_key_value_heads)
        assert (count == copies).all(), tensor_name


def test_a_rank_reads_no_more_than_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, num_shards=3)
    config = ModelConfig.from_folder(tmp_path)
    num_read = []
    read = Checkpoint.read

    def counted(self: Checkpoint, *args: Any) -> torch.Tensor:
        tensor = read(self, *args)
        num_read.append(tensor.numel())
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)
    model = rank_model(config, 1, 4, "cpu")
    load_weights(model, Checkpoint(tmp_path))
    total = sum(part.target.numel() for part in weight_parts(rank_model(config, 0, 1, "meta")))
    assert sum(num_read) < 0.26 * total  # a quarter, and the norms
    whole = {
        key: file.get_tensor(key)
        for file in (safe_open(path, "pt") for path in tmp_path.glob("*.safetensors"))
        for key in list(file.keys())
    }
    for part in weight_parts(model):
        assert torch.equal(part.target, whole[part.name][part.region])


def test_dummy_weights_depend_on_seed_and_name_alone() -> None:
    shape, region = (6, 4), (slice(2, 5), slice(0, 3))
    whole = DummyWeights(1).read("a", shape, (slice(0, 6), slice(0, 4)))
    assert torch.equal(DummyWeights(1).read("a", shape, region), whole[region])
    assert not torch.equal(DummyWeights(2).read("a", shape, region), whole[region])
    assert not torch.equal(DummyWeights(1).read("b", shape, region), whole[region])


def test_progress_counts_every_part(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, num_hidden_layers=1)
    model = rank_model(ModelConfig.from_folder(tmp_path), 0, 1, "cpu")
    seen: list[tuple[str, int, int]] = []
    load_weights(model, Checkpoint(tmp_path), lambda *args: seen.append(args))
    assert [done for _, done, _ in seen] == list(range(1, len(seen) + 1))
    assert {(phase, total) for phase, _, total in seen} == {("loading weights", len(seen))}
