"""What cannot work is refused by name, with the remedy, and before any process starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from yalis import LLM, CheckpointError, ConfigError, RequestError, SamplingParams, YalisError
from yalis.testing import make_checkpoint

Damage = Callable[[Path], object]
INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("sound") / "m", num_hidden_layers=2)


@pytest.fixture
def model(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint to damage, in a process that may not start workers."""

    def forbidden(*_: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr("yalis.workers.ProcessGroup", forbidden)
    return Path(shutil.copytree(sound, tmp_path / "m"))


def edit(name: str, **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        raw = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in raw.items() if v != "REMOVE"}))

    return damage


def write(name: str, content: str | bytes) -> Damage:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def truncate(name: str, num_bytes: int) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:num_bytes])


def change_tensor(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Damage:
    """Change the shard's first matrix; None takes it out."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / FIRST)
        name = "model.layers.0.mlp.gate_proj.weight"
        folder_has = name in tensors
        if not folder_has:
            tensors = load_file(folder / SECOND)
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed
        save_file(tensors, folder / (FIRST if folder_has else SECOND))

    return damage


def remap(name: str, file_name: str | None) -> Damage:
    def damage(folder: Path) -> None:
        raw = json.loads((folder / INDEX).read_text())
        raw["weight_map"].pop(name)
        if file_name:
            raw["weight_map"][name] = file_name
        (folder / INDEX).write_text(json.dumps(raw))

    return damage


LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}

BROKEN: dict[str, tuple[Damage, str]] = {
    "no config": (lambda m: (m / "config.json").unlink(), r"config.json is missing"),
    "config not json": (write("config.json", "{"), r"config.json cannot be read as JSON"),
    "config not an object": (write("config.json", "[]"), r"holds a list, not a JSON object"),
    "config binary": (write("config.json", b"\xff\xfe\x00"), r"config.json cannot be read"),
    "generation config": (write("generation_config.json", "x"), r"generation_config.json cannot be"),
    "no shard": (lambda m: (m / SECOND).unlink(), rf"{SECOND} is missing, though {INDEX}"),
    "truncated data": (truncate(SECOND, 20_000), rf"{SECOND} \(20000 bytes\) is truncated or damaged"),
    "truncated header": (truncate(FIRST, 5), rf"{FIRST} \(5 bytes\) is truncated or damaged"),
    "empty shard": (truncate(FIRST, 0), rf"{FIRST} \(0 bytes\) is truncated or damaged"),
    "a git-lfs pointer": (write(FIRST, "version https://git-lfs.github.com/spec/v1\n" * 3), FIRST),
    "index not json": (write(INDEX, "{{"), rf"{INDEX} cannot be read as JSON"),
    "index without map": (write(INDEX, "{}"), rf'{INDEX} has no "weight_map"'),
    "index of numbers": (write(INDEX, '{"weight_map": {"a": 1}}'), rf'{INDEX} has no "weight_map"'),
    "index leads away": (write(INDEX, '{"weight_map": {"a": "../b"}}'), r'has no "weight_map"'),
    "index lacks tensor": (remap("model.norm.weight", None), r"tensor model.norm.weight is missing"),
    "index errs": (remap("model.norm.weight", FIRST), r"does not hold tensor model.norm.weight, though"),
    "no weights": (lambda m: (m / INDEX).unlink(), r"has neither model.safetensors nor .*save_pretrained"),
    "wrong shape": (change_tensor(lambda t: t[:5].clone()), r"gate_proj.weight has shape \[5, 128\], "
                    r"where config.json asks for \[352, 128\]"),
    "wrong rank": (change_tensor(lambda t: t.flatten()), r"gate_proj.weight has shape \[45056\]"),
    "wrong dtype": (change_tensor(lambda t: t.to(torch.int8)), r"gate_proj.weight has dtype I8; "
                    "supported: F16"),
    "tensor gone": (change_tensor(lambda t: None), r"does not hold tensor model.layers.0.mlp.gate"),
    "tied heads differ": (edit("config.json", tie_word_embeddings=True),
                          r"ties lm_head.weight to model.embed_tokens.weight .* differ; set tie_word_emb"),
    "no tied head": (edit("config.json", num_hidden_layers=3), r"tensor model.layers.2.* is missing"),
    "tokenizer": (write("tokenizer.json", "{}"), r"tokenizer.json cannot be read"),
    "architecture": (edit("config.json", architectures=["MambaForCausalLM"]),
                     r"architectures is \['MambaForCausalLM'\].*supported: LlamaForCausalLM, Mistral"),
    "architectures no list": (edit("config.json", architectures=5), r"architectures is 5"),
    "architectures of lists": (edit("config.json", architectures=[["x"]]), r"architectures is \[\['x'\]\]"),
    "another architecture's fields": (
        edit("config.json", architectures=["GPT2LMHeadModel"], hidden_size="REMOVE"), "GPT2LMHeadModel"),
    "no architecture": (edit("config.json", architectures="REMOVE", model_type="gpt2"), "gpt2"),
    "no hidden size": (edit("config.json", hidden_size="REMOVE"), r"hidden_size is missing"),
    "size a text": (edit("config.json", hidden_size="big"), r"hidden_size is 'big'"),
    "no layers": (edit("config.json", num_hidden_layers=0), r"num_hidden_layers is 0"),
    "kv heads": (edit("config.json", num_key_value_heads=3), r"num_attention_heads is 8, which .* 3"),
    "odd head_dim": (edit("config.json", head_dim=7), r"head_dim is 7; .* even"),
    "no head_dim": (edit("config.json", hidden_size=100), r"hidden_size 100 is not a multiple"),
    "activation": (edit("config.json", hidden_act="gelu"), r"hidden_act is 'gelu'; only 'silu'"),
    "rope kind": (edit("config.json", rope_scaling={"type": "longrope", "factor": 2}),
                  r"rope type is 'longrope'; supported: default, linear, dynamic, llama3, yarn"),
    "half a head turns": (edit("config.json", partial_rotary_factor=0.5), r"factor is 0.5; only 1"),
    "quantised": (edit("config.json", quantization_config={"bits": 4}), r"is quantised .*; use one in"),
    "layer types": (edit("config.json", architectures=["Qwen2ForCausalLM"], use_sliding_window=True,
                         layer_types=["full_attention"]), r"layer_types is \['full_attention'\]; it must"),
    "head norms": (edit("config.json", architectures=["Qwen3ForCausalLM"], head_dim=16),
                   r"tensor model.layers.0.self_attn.q_norm.weight is missing"),
    "biases": (edit("config.json", architectures=["Qwen2ForCausalLM"]),
               r"tensor model.layers.0.self_attn.q_proj.bias is missing"),
    "no window": (edit("config.json", architectures=["MistralForCausalLM"], sliding_window=0),
                  r"sliding_window is 0"),
    "theta": (edit("config.json", rope_theta=0), r"rope_theta is 0; it must be a number above 0"),
    "no end": (edit("config.json", rope_scaling={"type": "linear", "factor": float("inf")}),
               r"factor is inf; it must be"),
    "unreadable": (lambda m: ((m / FIRST).unlink(), (m / FIRST).mkdir()), rf"{FIRST} cannot be read"),
    "rope factor": (edit("config.json", rope_scaling={"type": "linear"}), r"factor is None"),
    "rope bounds": (edit("config.json", rope_scaling=LLAMA3), r"low_freq_factor 4.0 must be below"),
    "rope by layers": (edit("config.json", rope_parameters={"full_attention": {"rope_theta": 1e6}}),
                       r"rope settings differ by the type of layer"),
    "rope a text": (edit("config.json", rope_scaling="linear"), r"rope scaling is 'linear'"),
    "flag": (edit("config.json", tie_word_embeddings="yes"), r"tie_word_embeddings is 'yes'"),
    "dtype": (edit("config.json", torch_dtype="int4"), r"dtype is 'int4'; supported"),
    "eos": (edit("generation_config.json", eos_token_id="</s>"), r"eos_token_id is '</s>'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_named(name: str, model: Path) -> None:
    damage, message = BROKEN[name]
    damage(model)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        LLM(str(model), tensor_parallel_size=2)
    assert isinstance(caught.value, ValueError)


def test_weights_that_the_model_has_no_place_for_are_told(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with LLM(str(model)):
        assert not caplog.records
    edit("config.json", num_hidden_layers=1)(model)
    with LLM(str(model)):
        [record] = caplog.records
    assert "holds 9 tensors that config.json gives no place (model.layers.1." in record.getMessage()


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"tensor_parallel_size": 3}, r"size 3 does not divide .* 8 attention heads; use one of 1, 2, 4, 8"),
    ({"tensor_parallel_size": 16}, r"size 16 is more than the model's 8 attention heads"),
    ({"tensor_parallel_size": 0}, r"tensor_parallel_size is 0; give an integer of at least 1"),
    ({"tensor_parallel_size": "2"}, r"tensor_parallel_size is '2'"),
    ({"pipeline_parallel_size": 2}, r"pipeline_parallel_size is 2; only 1"),
    ({"tensor_parallel_size": 4, "num_nodes": 3}, r"4 is not a multiple of num_nodes 3"),
    ({"num_nodes": 2}, r"1 is not a multiple of num_nodes 2"),
    ({"all_reduce": "nccl"}, r"all_reduce is 'nccl'; choose one of nvrar, torch, symm-one-shot"),
    ({"all_reduce": "symm-one-shot"}, r"needs CUDA symmetric memory, and the device is cpu"),
    ({"all_reduce": "symm-two-shot", "device": "cuda", "dtype": "float16"},
     r"adds float32 and bfloat16, and dtype is float16; use dtype=.bfloat16."),
    ({"tensor_parallel_size": 4, "all_reduce_plan": "split:3"}, r"all_reduce_plan: .*"),
    ({"tensor_parallel_size": 4, "all_reduce_plan": "fast"}, r"all_reduce_plan: .*"),
    ({"all_reduce_plan": "fast"}, r"all_reduce_plan: .*'fast'"),
    ({"all_reduce_plan": "split:2"}, r"all_reduce_plan: plan 'split:2' is for 2 ranks"),
    ({"all_reduce_plan": None}, r"all_reduce_plan is None; give a word"),
    ({"all_reduce": "torch", "all_reduce_plan": "nvrar"}, r"all_reduce_plan is 'nvrar', but"),
    ({"all_reduce": "torch", "tensor_parallel_size": 2, "batch_invariant": True},
     r"all_reduce is 'torch', whose sums depend"),
    ({"batch_invariant": "yes"}, r"batch_invariant is 'yes'"),
    ({"dtype": "fp8"}, r"dtype is 'fp8'; choose one of auto, float32"),
    ({"load_format": "gguf"}, r"load_format is 'gguf'"),
    ({"device": "tpu"}, r"device is 'tpu'"),
    ({"max_model_len": 4096}, r"max_model_len 4096 is above .* 2048; lower it"),
    ({"max_model_len": 0}, r"max_model_len is 0"),
    ({"max_num_seqs": -1}, r"max_num_seqs is -1"),
    ({"seed": 1.5}, r"seed is 1.5"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=lambda value: str(value)[:40])
def test_a_bad_option_is_named(options: dict[str, Any], message: str, model: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(str(model), **options)


def test_more_gpus_than_there_are(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 ranks on this host need a GPU each, and it has 1"):
        LLM(str(model), tensor_parallel_size=2, device="cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match='sees no GPU on this host; set device="cpu"'):
        LLM(str(model), device="cuda")


def test_key_value_heads_that_can_be_neither_split_nor_replicated(model: Path) -> None:
    edit("config.json", num_attention_heads=12, num_key_value_heads=3, head_dim=4)(model)
    with pytest.raises(
        ConfigError, match=r"size 2 and the model's 3 key-value.*use one of 1, 3, 6, 12"
    ):
        LLM(str(model), tensor_parallel_size=2, load_format="dummy")


@pytest.mark.parametrize("path", ["/no/such/folder", "config.json"])
def test_a_path_that_is_no_folder(path: str, model: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder; give the path"):
        LLM(str(model / path))


def test_a_name_on_the_hub_is_not_downloaded() -> None:
    name = "meta-llama/Llama-3.1-8B"
    with pytest.raises(CheckpointError, match=f"`hf download {name} --local-dir DIR`"):
        LLM(name)
    with pytest.raises(CheckpointError, match="is not a folder") as caught:
        LLM("/no/such")
    assert "hf download" not in str(caught.value)


def test_end_tokens_that_are_no_tokens_are_left_out(model: Path) -> None:
    edit("generation_config.json", eos_token_id=[-1, 512, 7])(model)
    with LLM(str(model)) as llm:
        llm.engine.add(llm.make_requests([5])[0])
        llm.engine.step()
        [sequence] = llm.engine._scheduler._running
        # As an index, -1 would be the last token, and keep that from being drawn before min_tokens.
        assert sequence.end_token_ids == (7,)


def test_text_without_a_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with LLM(str(model)) as llm:
        with pytest.raises(
            RequestError, match=r"prompt 0 is a text, but .*tokenizer.json is missing"
        ):
            llm.generate("x")
        with pytest.raises(RequestError, match=r"stop strings need .*tokenizer.json"):
            llm.generate([5], SamplingParams(stop="x"))
        [output] = llm.generate([5], SamplingParams(max_tokens=3, ignore_eos=True))
        assert (len(output.token_ids), output.text) == (3, "")


SAMPLING: list[dict[str, Any]] = [
    {"max_tokens": 0}, {"max_tokens": -5}, {"max_tokens": 2.0},
    {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")},
    {"temperature": "hot"}, {"top_k": -2}, {"top_k": 1.5}, {"top_k": True}, {"top_p": 0},
    {"top_p": 1.01}, {"top_p": float("nan")}, {"seed": "x"}, {"seed": 2**63}, {"stop": [""]},
    {"stop": [3]}, {"stop": ""},
    {"stop": 5}, {"stop_token_ids": [-1]}, {"stop_token_ids": 3}, {"stop_token_ids": ["x"]},
    {"min_tokens": -1}, {"min_tokens": 17}, {"min_p": -0.1}, {"min_p": 1.1}, {"min_p": None},
    {"repetition_penalty": 0}, {"repetition_penalty": float("inf")}, {"presence_penalty": 2.1},
    {"frequency_penalty": -2.1}, {"frequency_penalty": "x"}, {"logprobs": -1}, {"logprobs": 21},
    {"n": 0}, {"n": 1.0}, {"ignore_eos": 1},
]  # fmt: skip


@pytest.mark.parametrize("values", SAMPLING, ids=str)
def test_a_bad_sampling_value_is_named(values: dict[str, Any]) -> None:
    [name] = values
    with pytest.raises(RequestError, match=rf"{name} is .*; give"):
        SamplingParams(**values)


def test_sampling_values_at_their_bounds_are_good() -> None:
    SamplingParams(
        seed=-(2**63), stop_token_ids=[0], max_tokens=1, min_tokens=1, logprobs=20, top_k=-1
    )
    SamplingParams(seed=2**63 - 1, top_p=1, min_p=1, presence_penalty=2, frequency_penalty=-2)
    SamplingParams(presence_penalty=-2, frequency_penalty=2, logprobs=0, top_k=0, min_p=0)


def test_several_greedy_continuations_would_be_one() -> None:
    with pytest.raises(RequestError, match=r"n is 2 at temperature 0, .*; give n=1"):
        SamplingParams(n=2, temperature=0)


def test_every_error_is_a_yalis_error_and_tells_where_to_look(model: Path) -> None:
    (model / SECOND).unlink()
    with pytest.raises(YalisError, match=str(model / SECOND)):
        LLM(str(model))
