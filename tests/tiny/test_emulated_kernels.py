"""yalis's kernels in CUDA C++ on a CPU, launched as on a GPU: their results, addresses and bits."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

if shutil.which("g++") is None:
    pytest.skip("needs g++, which Debian has as g++", allow_module_level=True)

import emulated
import kernel_cases
import kernel_reference
from yalis import LLM, SamplingParams
from yalis.attention import choice
from yalis.kernels import compiled, decode_attention, decode_splits, few_rows, warp_attention
from yalis.layers import functional
from yalis.runner import Runner
from yalis.testing import make_checkpoint


def launch(
    spec: Any, args: ctypes.Structure, device: torch.device, num_blocks: int, num_rows: int = 1
) -> None:
    """`compiled.launch`, but that it returns when the kernel has run."""
    name = "AttentionArgs" if isinstance(spec, warp_attention.Spec) else "Args"
    shared = "char* shared = emulation::shared_of(emulation::cluster_rank());"
    source = spec.source().replace("extern __shared__ __align__(16) char shared[];", shared)
    entry = f"{compiled.ENTRY}(*static_cast<const yalis::{name}*>(args));"
    kernel = emulated._function(source, compiled._CSRC, entry)
    room = max(spec.shared_bytes, 16)
    call = emulated.Call(kernel, ctypes.addressof(args), num_blocks, compiled.NUM_THREADS, 1, room)
    emulated.emulate([[call]] * num_rows)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (few_rows, warp_attention):
        monkeypatch.setattr(module, "launch", launch)
        monkeypatch.setattr(module, "can_run", lambda device: True)
        monkeypatch.setattr(module, "arch_of", lambda device: "none")
        monkeypatch.setattr(module, "num_processors", lambda device: 3)
    monkeypatch.setattr(few_rows, "stream_of", lambda device: 0)
    monkeypatch.setattr(decode_attention, "num_processors", lambda device: 1000)  # all is small
    # Of bfloat16 Triton's interpreter knows nothing.
    monkeypatch.setattr(kernel_cases, "rotate_and_store", kernel_reference.rotate_and_store)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_few_rows(dtype: torch.dtype) -> None:
    kernel_cases.few_rows(torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_that_turns_on_the_way(dtype: torch.dtype) -> None:
    kernel_cases.turned_attentions(torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decodes_are_the_references(dtype: torch.dtype) -> None:
    seq_lens = [1, 0, 257, 40, 700]
    num_new = [min(length, 1) for length in seq_lens]
    at: dict[str, Any] = {"device": torch.device("cpu"), "dtype": dtype}
    for window in (None, 50):
        q, caches, tables, starts, lens = kernel_cases.paged(seq_lens, num_new, 8, 2, 64, **at)
        workspace = decode_splits.DecodeWorkspace.allocate(
            len(seq_lens), max(seq_lens), 8, 2, 64, at["device"], windows=(window,), most_splits=2
        )
        out = torch.zeros(q.shape, **at)
        decode_splits.plan_decode(starts, lens, workspace)
        decode_attention.decode_attention(
            q, *caches, tables, starts, lens, workspace, out, scale=0.125, window=window
        )
        expected = kernel_reference.attention(
            q, *caches, tables, starts, lens, scale=0.125, window=window
        )
        kernel_cases.near(out, expected, units=2, scale=0.5)
        assert not workspace.tickets.any()


@pytest.mark.parametrize(("num_seqs", "turns"), [(2, True), (3, False)])
def test_the_number_of_sequences_chooses_the_kernel(
    num_seqs: int, turns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_attention, "num_processors", lambda device: 8)
    at: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float16}
    seq_lens = [40, 300, 7][:num_seqs]
    q, caches, tables, starts, lens = kernel_cases.paged(seq_lens, [1] * num_seqs, 8, 2, 64, **at)
    rows = kernel_cases.random(num_seqs, 4, 64, seed=3, **at)
    cos, sin = kernel_cases.random(num_seqs, 2, 32, seed=4, **at).unbind(dim=1)
    new = warp_attention.NewTokens(*rows.split(2, dim=1), cos, sin)
    workspace = decode_splits.DecodeWorkspace.allocate(num_seqs, 300, 8, 2, 64, at["device"])
    decode_splits.plan_decode(starts, lens, workspace)
    out = torch.zeros(q.shape, **at)
    where = (*caches, tables, starts, lens, workspace, out)
    asked: list[bool] = []
    monkeypatch.setattr(warp_attention, "attend", lambda *_, **__: asked.append(True))
    assert decode_attention.can_turn(q, *caches, new) == turns
    decode_attention.decode_attention(q, *where, scale=0.125)
    assert bool(asked) == turns
    if not turns:
        with pytest.raises(ValueError, match="can_turn refuses"):
            decode_attention.decode_attention(q, *where, scale=0.125, new=new)
    decode_attention.decode_attention(q, *where, scale=0.125, in_triton=turns)
    assert asked == [True]  # what was asked for, against the number


def test_an_engine_decodes_by_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts by the kernels in Triton, decodes by these: the log probabilities of torch's operations."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    model = make_checkpoint(
        tmp_path,
        dtype="float16",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        **heads,
    )
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, logprobs=0)

    def logprobs() -> list[float]:
        options = {"max_num_seqs": 2, "max_model_len": 64, "kv_cache_memory_bytes": 1 << 19}
        with LLM(str(model), device="cpu", **options) as llm:
            outputs = llm.generate([[5, 6, 7] * 6, [9, 8]], params, use_tqdm=False)
        entries = [(out.token_ids, out.outputs[0].logprobs) for out in outputs]
        return [of[t].logprob for ids, all_of in entries for t, of in zip(ids, all_of, strict=True)]

    expected, turned = logprobs(), []
    attend = warp_attention.attend

    def counted(*args: Any, **options: Any) -> None:
        turned.append(options["new"] is not None)
        attend(*args, **options)

    monkeypatch.setattr(warp_attention, "attend", counted)
    monkeypatch.setattr(functional, "_has_kernels", lambda x: True)
    monkeypatch.setattr(choice, "_why_not_paged", lambda *_: None)
    monkeypatch.setattr(Runner, "_captured", lambda *_: None)
    assert logprobs() == pytest.approx(expected, abs=0.02)
    assert turned.count(True) == 3 * 2  # steps that only decode, times layers
