"""The engine on a GPU: its tokens beside transformers', graphs beside eager steps, ranks beside one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import gpus
from yalis import LLM, SamplingParams, WorkerError
from yalis.outputs import RequestOutput
from yalis.testing import make_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpus.COUNT == 0, reason=gpus.NEED),
    pytest.mark.timeout(240),
]

PROMPTS = [[(7 * i + 3 * j + i * j) % 500 + 4 for j in range(1 + 9 * i)] for i in range(8)]
GREEDY = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
# All prompts fill a step: it is captured as it is, and not padded to what cuBLAS computes otherwise.
OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": sum(map(len, PROMPTS))}
OPTIONS |= {"dtype": "bfloat16", "kv_cache_memory_bytes": 64 << 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("engine") / "llama"
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_key_value_heads": 2, "head_dim": 64}
    return str(make_checkpoint(path, dtype="bfloat16", **shape))


@dataclass(frozen=True)
class Reference:
    """transformers' model in exact arithmetic, as far as that goes, and in the type of ours."""

    exact: Any
    rounded: Any

    @classmethod
    def of(cls, folder: str) -> Reference:
        from transformers import AutoModelForCausalLM

        read = AutoModelForCausalLM.from_pretrained
        models = [
            read(folder, dtype=dtype).eval().cuda() for dtype in (torch.float32, torch.bfloat16)
        ]
        return cls(*models)


@pytest.fixture(scope="module")
def reference(model: str) -> Reference:
    return Reference.of(model)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks have a GPU each, or share the only one."""
    if gpus.WHY_NO_RANKS:
        pytest.skip(gpus.WHY_NO_RANKS)
    for name, value in gpus.variables().items():
        monkeypatch.setenv(name, value)
    if gpus.ARE_SHARED:
        monkeypatch.setattr("yalis.workers.require_gpus", lambda num_ranks: None)


def serve(model: str, params: Any = GREEDY, **options: Any) -> list[RequestOutput]:
    with LLM(model, device="cuda", **(OPTIONS | options)) as llm:
        return llm.generate(PROMPTS, params, use_tqdm=False)


@torch.inference_mode()
def check(outputs: list[RequestOutput], reference: Reference) -> None:
    """Every token is, but for the roundings of bfloat16, the likeliest after those before it.

    Where no logit is off by more than e, the one drawn is at most 2 e below the highest; e is what
    transformers' own model in bfloat16 shows on the same tokens.
    """
    gaps, error = [], 0.0
    for output in outputs:
        num_prompt = len(output.prompt_token_ids)
        tokens = torch.tensor([*output.prompt_token_ids, *output.token_ids], device="cuda")
        logits = reference.exact(tokens.unsqueeze(0)).logits[0, num_prompt - 1 : -1]
        rounded = reference.rounded(tokens.unsqueeze(0)).logits[0, num_prompt - 1 : -1]
        error = max(error, (rounded - logits).abs().max().item())
        drawn = logits.gather(1, tokens[num_prompt:].unsqueeze(1)).squeeze(1)
        assert len(drawn) == len(output.token_ids) == GREEDY.max_tokens
        gaps.append(logits.amax(1) - drawn)
    gap = torch.cat(gaps)
    others = (gap > 0).float().mean()
    report = f"greatest gap {gap.max():.4f}, error {error:.4f}, not the likeliest {others:.4f}"
    print(report)
    assert gap.max() <= 2 * error, report
    assert others < 0.1, report


def token_ids(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def test_float32_has_the_tokens_of_transformers(model: str, reference: Reference) -> None:
    for output in serve(model, dtype="float32"):
        prompt = torch.tensor([output.prompt_token_ids], device="cuda")
        with torch.inference_mode():
            theirs = reference.exact.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=GREEDY.max_tokens,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
            )
        assert output.token_ids == tuple(theirs[0, prompt.shape[1] :].tolist())


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graphs"])
def test_bfloat16_is_within_its_roundings(
    enforce_eager: bool, model: str, reference: Reference
) -> None:
    check(serve(model, enforce_eager=enforce_eager), reference)


def test_graphs_have_the_bits_of_eager_steps(model: str) -> None:
    assert token_ids(serve(model)) == token_ids(serve(model, enforce_eager=True))


def test_chunks_preemption_and_padding_change_nothing_but_roundings(
    model: str, reference: Reference
) -> None:
    # Eight requests that grow to 112 tokens at most, over room for four of those; steps of 24 tokens.
    per_block = 2 * 4 * 2 * 64 * 16 * 2  # keys and values, layers, heads, head_dim, tokens, bytes
    small = {"max_num_batched_tokens": 24, "kv_cache_memory_bytes": (4 * 7 + 1) * per_block}
    check(serve(model, **small), reference)
    check(serve(model, max_num_seqs=5, enable_prefix_caching=False), reference)
    check(serve(model, max_num_batched_tokens=512), reference)


@pytest.mark.parametrize("num_ranks", [1, 2], ids=["one rank", "two ranks"])
def test_batch_invariant_requests_have_the_bits_they_have_alone(
    num_ranks: int, model: str, request: pytest.FixtureRequest
) -> None:
    if num_ranks > 1:
        request.getfixturevalue("shared")
    options = {"batch_invariant": True, "tensor_parallel_size": num_ranks}
    params = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True, logprobs=0)
    few_blocks = (4 * 6 + 1) * 2 * 4 * 2 * 64 * 16 * 2 // num_ranks  # for four requests of eight
    alone = serve(model, params, max_num_seqs=1, enable_prefix_caching=False, **options)
    for other in (
        serve(model, params, **options),
        serve(
            model, params, max_num_batched_tokens=24, kv_cache_memory_bytes=few_blocks, **options
        ),
    ):
        for one, among in zip(alone, other, strict=True):
            assert one.token_ids == among.token_ids
            assert one.outputs[0].logprobs == among.outputs[0].logprobs


def test_draws_of_every_kind_are_the_same_in_graphs(model: str) -> None:
    kinds = [
        GREEDY,
        SamplingParams(max_tokens=30, seed=1),
        SamplingParams(max_tokens=30, seed=2, top_k=5, temperature=0.7),
        SamplingParams(max_tokens=30, seed=3, top_p=0.8),
        SamplingParams(max_tokens=30, seed=4, min_p=0.1, n=2),
        SamplingParams(max_tokens=30, temperature=0, repetition_penalty=1.3),
        SamplingParams(max_tokens=30, temperature=0, min_tokens=20),
        SamplingParams(max_tokens=30, temperature=0, logprobs=3),
    ]
    # All nine sequences in the first step.
    num_tokens = sum(map(len, PROMPTS)) + len(PROMPTS[4])
    one = {"max_num_seqs": 9, "max_num_batched_tokens": num_tokens, "enable_prefix_caching": False}
    graphs, eager = serve(model, kinds, **one), serve(model, kinds, enforce_eager=True, **one)
    assert token_ids(graphs) == token_ids(eager)
    assert len(graphs[6].token_ids) >= 20
    logprobs = graphs[7].outputs[0].logprobs
    assert logprobs is not None
    assert all(len(entry) >= 3 for entry in logprobs)


def test_a_step_waits_for_nothing(model: str) -> None:
    options = {"dtype": "bfloat16", "max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20}
    with LLM(model, device="cuda", **options) as llm:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        torch.cuda.set_sync_debug_mode(
            "error"
        )  # of events, which results are waited for by, it says nothing
        try:
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# Prompts and outputs have more tokens than Mistral's window.
@pytest.mark.parametrize(
    ("family", "fields"), [("qwen2", {}), ("qwen3", {}), ("mistral", {"sliding_window": 20})]
)
def test_other_families_are_within_the_roundings(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    # A folder of its own to import from; on CPUs it holds these models to float32.
    sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
    from transformers_reference import save_random_model

    shape = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 2, "num_hidden_layers": 4, "vocab_size": 512} | fields
    if family != "qwen2":
        shape["head_dim"] = 64
    theirs = save_random_model(tmp_path, family=family, max_shard_size="1GB", **shape)
    theirs.bfloat16().save_pretrained(tmp_path)  # for both the same numbers
    check(serve(str(tmp_path)), Reference.of(str(tmp_path)))


@pytest.mark.parametrize("all_reduce", ["nvrar", "torch", "symm-one-shot", "symm-two-shot"])
@pytest.mark.usefixtures("shared")
def test_two_ranks_are_within_the_roundings(
    all_reduce: str, model: str, reference: Reference
) -> None:
    check(serve(model, tensor_parallel_size=2, all_reduce=all_reduce), reference)


@pytest.mark.usefixtures("shared")
def test_all_reduces_are_exchanged_with_their_graphs(model: str, reference: Reference) -> None:
    options = {"dtype": "bfloat16", "max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20}
    with LLM(model, device="cuda", tensor_parallel_size=2, **options) as llm:
        first = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        check(first, reference)
        for name in ("torch", "nvrar"):
            llm.use_all_reduce(name)
            outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
            check(outputs, reference)
        assert token_ids(outputs) == token_ids(first)


LAUNCHED = """
import json, os, sys
from yalis import LLM, SamplingParams

model, folder, prompts, options = *sys.argv[1:3], *map(json.loads, sys.argv[3:])
params = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
with LLM(model, device="cuda", tensor_parallel_size=2, **options) as llm:
    tokens = [output.token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
with open(f"{folder}/{os.environ['RANK']}.json", "w") as file:
    json.dump(tokens, file)
"""


@pytest.mark.usefixtures("shared")
def test_launched_ranks_have_the_tokens_of_workers(model: str, tmp_path: Path) -> None:
    workers = [list(tokens) for tokens in token_ids(serve(model, tensor_parallel_size=2))]
    (script := tmp_path / "script.py").write_text(LAUNCHED)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    given = [model, str(tmp_path), json.dumps(PROMPTS), json.dumps(OPTIONS)]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *given],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == workers


@pytest.mark.usefixtures("shared")
def test_a_rank_killed_in_decode_is_named_and_none_stays(model: str) -> None:
    llm = LLM(model, device="cuda", tensor_parallel_size=2, **OPTIONS)
    pids = llm._executor.pids

    def kill(phase: str, done: int, total: int) -> None:
        if done == 10:
            os.kill(pids[1], signal.SIGKILL)

    params = SamplingParams(max_tokens=900, temperature=0, ignore_eos=True)
    begin_s = time.monotonic()
    with pytest.raises(WorkerError, match=rf"rank 1 \(pid {pids[1]}\) was killed by signal 9"):
        llm.generate(PROMPTS[1], params, on_progress=kill)
    assert time.monotonic() - begin_s < 20
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    llm.close()
