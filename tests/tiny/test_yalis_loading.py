"""Each rank reads its own part of the checkpoint, and the parts make up the whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from yalis.config import ModelConfig
from yalis.errors import CheckpointError
from yalis.models.decoder import CausalLM
from yalis.parallel.all_reduce import NoAllReduce
from yalis.parallel.group import Placement, TensorParallel
from yalis.testing import config_json, make_checkpoint
from yalis.weights.checkpoint import Checkpoint
from yalis.weights.dummy import DummyWeights, random_weight
from yalis.weights.loader import WeightPart, check_weights, load_weights, weight_parts

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


def whole_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = [safe_open(path, "pt") for path in folder.glob("*.safetensors")]
    return {name: file.get_tensor(name) for file in files for name in list(file.keys())}


@pytest.mark.parametrize("portion", [1000, 64 << 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_rank_reads_its_part_and_no_more(
    dtype: str, portion: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, num_shards=3, dtype=dtype, num_hidden_layers=2)
    config = ModelConfig.from_folder(tmp_path)
    monkeypatch.setattr("yalis.weights.checkpoint._PORTION", portion)
    num_read = []
    preadv = os.preadv

    def counted(file: int, buffers: list[memoryview], offset: int) -> int:
        num_read.append(preadv(file, [buffers[0][:5000]], offset))  # a read may stop early
        return num_read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    model = rank_model(config, 1, 4, "cpu")
    load_weights(model, Checkpoint(tmp_path))
    whole = whole_tensors(tmp_path)
    # A quarter, and the norms.
    assert sum(num_read) < 0.26 * sum(tensor.nbytes for tensor in whole.values())
    for part in weight_parts(model):
        assert torch.equal(part.target, whole[part.name][part.region].float())


def test_what_goes_wrong_while_reading_names_file_and_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, num_shards=1, num_hidden_layers=1)
    [path] = tmp_path.glob("*.safetensors")
    checkpoint, config = Checkpoint(tmp_path), ModelConfig.from_folder(tmp_path)
    for rank in (0, 1):  # whole rows and pieces of rows
        model = rank_model(config, rank, 2, "cpu")
        with monkeypatch.context() as patch:

            def fail(*_: object) -> int:
                raise OSError(errno.EIO, "Input/output error")

            patch.setattr(os, "preadv", fail)
            with pytest.raises(
                CheckpointError, match=rf"{path}: tensor model.* cannot be read .*Input/output"
            ):
                load_weights(model, checkpoint)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=rf"{path} ends before tensor .* does; did it change"):
        load_weights(model, checkpoint)


def test_dummy_weights_depend_on_seed_and_name_alone() -> None:
    def dummy(seed: int, name: str, rows: slice, columns: slice) -> torch.Tensor:
        target = torch.empty(rows.stop - rows.start, columns.stop - columns.start)
        DummyWeights(seed).fill(WeightPart(name, (600, 400), (rows, columns), target))
        return target

    everything, region = (slice(0, 600), slice(0, 400)), (slice(7, 598), slice(39, 400))
    whole = dummy(1, "a", *everything)
    assert torch.equal(dummy(1, "a", *region), whole[region])
    assert not torch.equal(dummy(2, "a", *region), whole[region])
    assert not torch.equal(dummy(1, "b", *region), whole[region])
    assert torch.equal(random_weight("a", (600, 400), 1), whole)


def test_dummy_weights_look_drawn_at_random() -> None:
    noise = random_weight("w", (512, 512), 0) * 512**0.5 / 1.5
    assert noise.mean().abs() < 0.01
    assert noise.std() == pytest.approx(1, abs=0.01)
    # The norm of a random matrix: rows or columns that depend on each other would raise it.
    assert torch.linalg.matrix_norm(noise, 2) < 2.1 * 512**0.5
    assert random_weight("x.norm.weight", (512,), 0).mean() == pytest.approx(1, abs=0.02)
    assert random_weight("x.bias", (512,), 0).abs().max() < 0.2


@pytest.mark.parametrize("name", SHAPES)
def test_dummy_weights_need_a_config_alone(name: str) -> None:
    config = ModelConfig.from_dict(config_json(num_hidden_layers=1, **SHAPES[name]))
    model = rank_model(config, 1, 2, "cpu")
    for part in weight_parts(model):
        part.target.fill_(torch.nan)
    load_weights(model, DummyWeights(0))
    for parameter in model.parameters():
        assert parameter.isfinite().all()


# How many parameters the published checkpoints have.
EXAMPLES = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_248_023_552,
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_configs_have_the_published_shapes(name: str) -> None:
    folder = Path(__file__).parents[2] / "examples" / "configs" / name
    model = rank_model(ModelConfig.from_folder(folder), 0, 1, "meta")
    assert sum(part.target.numel() for part in weight_parts(model)) == EXAMPLES[name]
    assert {path.parent.name for path in folder.parent.glob("*/config.json")} == EXAMPLES.keys()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("portion", [5000, 64 << 20])
def test_a_tied_head_may_be_there_twice_or_under_its_own_name_alone(
    portion: int,
    dtype: torch.dtype | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("yalis.weights.checkpoint._PORTION", portion)
    make_checkpoint(
        tmp_path, num_shards=1, num_hidden_layers=1, tie_word_embeddings=True, dtype="bfloat16"
    )
    [path] = tmp_path.glob("*.safetensors")
    tensors, embedding = load_file(path), "model.embed_tokens.weight"
    want = tensors[embedding]
    tensors["lm_head.weight"] = want.to(dtype or want.dtype, copy=True)
    if dtype is None:
        del tensors[embedding]
    (tmp_path / "model.safetensors.index.json").unlink()
    path.unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    config = ModelConfig.from_folder(tmp_path)
    check_weights(rank_model(config, 0, 1, "meta"), Checkpoint(tmp_path))
    assert not caplog.records
    model = rank_model(config, 1, 2, "cpu")
    load_weights(model, Checkpoint(tmp_path))
    assert torch.equal(model.lm_head.weight, want[256:].float())
    if dtype is not None:
        tensors["lm_head.weight"][-1, -1] += 1
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="has both, and they differ"):
            check_weights(rank_model(config, 0, 1, "meta"), Checkpoint(tmp_path))


def test_progress_counts_every_part(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, num_hidden_layers=1)
    model = rank_model(ModelConfig.from_folder(tmp_path), 0, 1, "cpu")
    seen: list[tuple[str, int, int]] = []
    load_weights(model, Checkpoint(tmp_path), lambda *args: seen.append(args))
    assert [done for _, done, _ in seen] == list(range(1, len(seen) + 1))
    assert {(phase, total) for phase, _, total in seen} == {("loading weights", len(seen))}
