"""Requests of every kind over two ranks, with steps prepared ahead: what one rank says, and nothing left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file, save_file

from yalis import LLM, SamplingParams, Update
from yalis.testing import make_checkpoint
from yalis.workers import WorkerGroup

pytestmark = pytest.mark.host

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
# Drawn from few tokens: the last bits of logits, which the batch may change, then hardly ever decide.
DRAWN = SamplingParams(max_tokens=24, temperature=1.0, top_k=8, seed=5)
PROMPTS = ["Once upon a time", "x", "The network is " * 12, "Once upon a table", [5, 300, 6], "01"]
KINDS = [
    replace(DRAWN, n=3, logprobs=2),
    replace(GREEDY, repetition_penalty=1.3, frequency_penalty=0.4),
    replace(DRAWN, min_p=0.05, presence_penalty=1.0, logprobs=0),
    replace(GREEDY, stop="a", min_tokens=8),
    GREEDY,
    replace(DRAWN, min_tokens=20, stop_token_ids=list(range(300, 400))),
]
NARROW = {"max_num_batched_tokens": 11, "kv_cache_memory_bytes": 11 << 14}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Token 300 is poison: its embedding is not a number. It is hardly ever drawn."""
    folder = make_checkpoint(tmp_path_factory.mktemp("m"), num_shards=1, num_hidden_layers=2)
    [shard] = folder.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.embed_tokens.weight"][300] = torch.nan
    tensors["lm_head.weight"][300] = 0
    save_file(tensors, shard, metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def two(model: str) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with LLM(model, tensor_parallel_size=2, all_reduce="torch", **NARROW) as llm:
            assert isinstance(llm._executor, WorkerGroup)
            assert llm._executor.depth == 2
            yield llm


@pytest.fixture(scope="module")
def one(model: str) -> Iterator[LLM]:
    with LLM(model) as llm:
        yield llm


def test_two_ranks_say_what_one_says(one: LLM, two: LLM) -> None:
    for ours, theirs in zip(
        two.generate(PROMPTS, KINDS), one.generate(PROMPTS, KINDS), strict=True
    ):
        for a, b in zip(ours.outputs, theirs.outputs, strict=True):
            assert replace(a, logprobs=None) == replace(b, logprobs=None)
            assert (a.logprobs is None) == (b.logprobs is None)
            for x, y in zip(a.logprobs or (), b.logprobs or (), strict=True):
                assert {i: e.rank for i, e in x.items()} == {i: e.rank for i, e in y.items()}
                assert [e.logprob for e in x.values()] == pytest.approx(
                    [e.logprob for e in y.values()], abs=1e-4
                )


def test_a_request_with_nan_fails_alone(one: LLM, two: LLM) -> None:
    prompts = ["x", [5, 300, 6], "y"]
    outputs = two.generate(prompts, GREEDY)
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert outputs == one.generate(prompts, GREEDY)


def test_requests_come_and_go_in_the_middle(one: LLM, two: LLM) -> None:
    wanted = {prompt: one.generate(prompt, GREEDY)[0] for prompt in ("x", "y", "z")}
    add, updates = two.engine.add, list[Update]()
    ids = {prompt: add(two.make_requests([prompt], GREEDY)[0]) for prompt in ("x", "y")}
    for _ in range(6):
        updates += two.engine.step()
    cancelled = two.engine.cancel(ids["y"])
    assert cancelled is not None
    assert cancelled.finish_reason == "abort"
    assert cancelled.token_ids == wanted["y"].token_ids[: len(cancelled.token_ids)]
    ids["z"] = add(two.make_requests(["z"], GREEDY)[0])
    while two.engine.has_work:
        updates += two.engine.step()
    outputs = {update.request_id: update.output for update in updates if update.output}
    assert outputs == {ids["x"]: wanted["x"], ids["z"]: wanted["z"]}


def test_a_stream_left_early_leaves_nothing_behind(one: LLM, two: LLM) -> None:
    pieces = [update.text for update in islice(two.stream("x", GREEDY), 5)]
    assert two.describe_all_reduce()["backend"] == "torch"  # asked while a step is under way
    assert two.generate("x", GREEDY) == (whole := one.generate("x", GREEDY))
    assert whole[0].text.startswith("".join(pieces))
    pool = two.engine._scheduler._pool
    assert not two.engine.has_work
    assert pool.num_free == pool.num_blocks
