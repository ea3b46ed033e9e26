"""Requests on a real, small model: what is shared, cut up, streamed, cancelled or broken changes no token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from yalis import LLM, RequestError, SamplingParams, Update, YalisError
from yalis.core import Batch
from yalis.inputs import StepShape, Uploaded
from yalis.runner import Runner
from yalis.scheduler import Scheduler
from yalis.testing import make_checkpoint

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
# Drawn from few tokens: the last bits of logits, which the batch may change, then hardly ever decide.
DRAWN = replace(GREEDY, temperature=1.0, top_k=8, seed=5)
BEGINNING = "A model too large for one machine is cut into parts. "
PROMPTS = [BEGINNING, BEGINNING + "Each", "x", BEGINNING * 3, BEGINNING + "Each part", "01"]
POISON = 300  # a token id whose embedding is not a number, and which is hardly ever drawn


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)  # so small a model is slower on two
    folder = make_checkpoint(tmp_path_factory.mktemp("m"), num_shards=1, num_hidden_layers=2)
    [shard] = folder.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.embed_tokens.weight"][POISON] = torch.nan
    tensors["lm_head.weight"][POISON] = 0
    save_file(tensors, shard, metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def llm(model: str) -> Iterator[LLM]:
    with LLM(model) as llm:
        yield llm


@pytest.fixture(scope="module")
def plain(model: str) -> list[Any]:
    """Every prompt by itself, in one piece, with nothing shared."""
    said = []
    with LLM(model, enable_prefix_caching=False, max_num_seqs=1, async_scheduling=False) as llm:
        for params in (GREEDY, DRAWN):
            said.append([llm.generate(prompt, params)[0] for prompt in PROMPTS])
            assert {output.finish_reason for output in said[-1]} == {"length"}
    return said


OPTIONS: dict[str, dict[str, Any]] = {
    "together": {},
    "chunks of 7": {"max_num_batched_tokens": 7},
    "chunks of 7, not shared": {"max_num_batched_tokens": 7, "enable_prefix_caching": False},
    "one by one": {"max_num_seqs": 1},
    "blocks of 1": {"block_size": 1},
    "blocks of 5, prepared ahead": {"block_size": 5, "async_scheduling": True},
    "preempted": {"kv_cache_memory_bytes": 9 << 14, "async_scheduling": True},
    "preempted, not ahead": {"kv_cache_memory_bytes": 9 << 14, "max_num_batched_tokens": 30},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_schedule_changes_no_token(
    name: str, model: str, plain: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    preempted: list[Scheduler] = []
    preempt = Scheduler._preempt_last
    monkeypatch.setattr(Scheduler, "_preempt_last", lambda s: (preempted.append(s), preempt(s)))
    with LLM(model, **OPTIONS[name]) as llm:
        for _ in range(2):  # the second time with all beginnings known
            assert llm.generate(PROMPTS, GREEDY) == plain[0]
            assert llm.generate(PROMPTS, DRAWN) == plain[1]
    assert bool(preempted) == name.startswith("preempted")


def test_a_known_beginning_is_not_computed_again(llm: LLM) -> None:
    computed: list[int] = []
    execute = llm._executor.runner.execute  # type: ignore[attr-defined]

    def spy(batch: Any) -> Any:
        computed.append(batch.num_decodes + sum(batch.num_new))
        return execute(batch)

    llm._executor.runner.execute = spy  # type: ignore[attr-defined]
    prompt = list(range(2, 202))
    for _ in range(2):
        llm.generate([prompt], replace(GREEDY, max_tokens=1))
    llm._executor.runner.execute = execute  # type: ignore[attr-defined]
    assert computed == [200, 200 - 192]


def test_a_stream_says_piece_by_piece_what_generate_says(llm: LLM) -> None:
    [free] = llm.generate(BEGINNING, GREEDY)
    for params in (GREEDY, DRAWN, replace(GREEDY, stop=["zzz", free.text[9:12]])):
        [output] = llm.generate(BEGINNING, params)
        updates = list(llm.stream(BEGINNING, params))
        assert updates[-1].output == output
        assert all(update.output is None for update in updates[:-1])
        assert [t for update in updates for t in update.token_ids] == list(output.token_ids)
        assert "".join(update.text for update in updates) == output.text
        assert sum(bool(update.text) for update in updates) > 1
        assert [u.finish_reason for u in updates[-2:]] == [None, output.finish_reason]


def test_no_part_of_a_stop_string_is_streamed(llm: LLM) -> None:
    [free] = llm.generate("Once", GREEDY)
    for begin in range(4, len(free.text) - 8, 5):
        stop = free.text[begin : begin + 6]
        if "\ufffd" in stop:
            continue
        shown = ""
        for update in llm.stream("Once", replace(GREEDY, stop=stop)):
            shown += update.text
            assert free.text[: free.text.index(stop)].startswith(shown)
        assert shown == free.text[: free.text.index(stop)]
        assert update.output is not None
        assert update.output.outputs[0].stop_reason == stop


def test_streams_and_generate_take_turns(llm: LLM) -> None:
    wanted = [[u.token_ids for u in llm.stream(prompt, GREEDY)] for prompt in PROMPTS[:3]]
    streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS[:3]]
    got: list[list[tuple[int, ...]]] = [[], [], []]
    for _ in range(10):
        for stream, pieces in zip(streams, got, strict=True):
            pieces.append(next(stream).token_ids)
    [between] = llm.generate("x", DRAWN)
    for stream, pieces in zip(streams, got, strict=True):
        pieces += [update.token_ids for update in stream]
    assert got == wanted
    assert between == llm.generate("x", DRAWN)[0]


def test_a_closed_stream_is_a_cancelled_request(llm: LLM) -> None:
    stream = llm.stream(BEGINNING, replace(GREEDY, max_tokens=500))
    next(stream)
    assert llm.engine.has_work
    stream.close()  # type: ignore[attr-defined]
    while llm.engine.has_work:
        assert llm.engine.step() == []
    pool = llm.engine._scheduler._pool
    assert pool.num_free == pool.num_blocks


def test_a_stream_whose_request_is_gone_says_so(llm: LLM) -> None:
    stream = llm.stream("x", GREEDY)
    llm.engine.cancel(next(stream).request_id)
    with pytest.raises(YalisError, match="was cancelled, or dropped"):
        list(stream)


def test_a_stream_is_checked_when_it_is_asked_for(llm: LLM) -> None:
    with pytest.raises(RequestError, match="prompt 0 is empty"):
        llm.stream("", GREEDY)


def test_the_step_api_serves_who_comes_late(llm: LLM) -> None:
    [one] = llm.generate(BEGINNING, GREEDY)
    [two] = llm.generate("x", GREEDY)
    begun = {p: llm.make_requests([p], GREEDY)[0] for p in (BEGINNING, "x")}
    first = llm.engine.add(begun[BEGINNING])
    updates: list[Update] = []
    for _ in range(5):
        updates += llm.engine.step()
    second = llm.engine.add(begun["x"])
    while llm.engine.has_work:
        updates += llm.engine.step()
    outputs = {update.request_id: update.output for update in updates if update.output}
    assert outputs == {first: one, second: two}


@pytest.mark.parametrize("ahead", [True, False])
def test_a_request_with_nan_fails_alone(ahead: bool, model: str, plain: list[Any]) -> None:
    bad = [5, POISON, 6]
    with LLM(model, async_scheduling=ahead) as llm:
        for _ in range(2):
            outputs = llm.generate([PROMPTS[0], bad, PROMPTS[2], bad * 10], GREEDY)
            assert [outputs[0], outputs[2]] == [plain[0][0], plain[0][2]]
            for output in (outputs[1], outputs[3]):
                assert (output.finish_reason, output.token_ids, output.text) == ("error", (), "")
                assert "logits were NaN or infinite" in str(output.outputs[0].error)


def test_n_continuations_differ_and_each_repeats(llm: LLM) -> None:
    params = replace(DRAWN, n=3, seed=11)
    [output] = llm.generate(BEGINNING, params)
    assert len({completion.text for completion in output.outputs}) == 3
    for index, completion in enumerate(output.outputs):
        [alone] = llm.generate(BEGINNING, replace(params, n=1, seed=11 + index))
        assert completion == replace(alone.outputs[0], index=index)
    seen: dict[int, str] = {}
    for update in llm.stream(BEGINNING, params):
        seen[update.index] = seen.get(update.index, "") + update.text
    assert [seen[i] for i in range(3)] == [completion.text for completion in output.outputs]


def test_stop_tokens_end_it_and_min_tokens_keep_them_away(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    [free] = llm.generate("Once", GREEDY)
    end = free.token_ids[6]
    assert end not in free.token_ids[:6]
    params = replace(GREEDY, stop_token_ids=[end])
    [stopped] = llm.generate("Once", params)
    assert stopped.token_ids == free.token_ids[:7]
    assert free.text.startswith(stopped.text)
    assert len(stopped.text) < len(llm.generate("Once", replace(GREEDY, max_tokens=7))[0].text)
    assert (stopped.finish_reason, stopped.outputs[0].stop_reason) == ("stop", end)
    monkeypatch.setattr(
        llm.engine, "_eos_token_ids", (end,)
    )  # an end token that is no special token
    [ended] = llm.generate("Once", replace(GREEDY, ignore_eos=False))
    assert (ended.token_ids, ended.text) == (stopped.token_ids, stopped.text)
    assert (ended.finish_reason, ended.outputs[0].stop_reason) == ("stop", None)
    [kept] = llm.generate("Once", replace(params, min_tokens=12))
    assert end not in kept.token_ids[:12]
    assert kept.token_ids[:6] == free.token_ids[:6]
    assert len(kept.token_ids) >= 12
    with pytest.raises(RequestError, match="stop_token_ids has 512; give integers from 0 to 511"):
        llm.generate("Once", replace(GREEDY, stop_token_ids=[512]))


@torch.inference_mode()
def test_penalties_are_those_of_the_definition_through_preemption_and_known_beginnings(
    model: str,
) -> None:
    params = replace(GREEDY, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-2.0)
    said = []
    for options in ({}, OPTIONS["preempted"]):
        with LLM(model, **options) as llm:
            said += [llm.generate(PROMPTS, params) for _ in range(2)]
    assert said[0] == said[1] == said[2] == said[3]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for request in said[0]:
        ids, output = list(request.prompt_token_ids), torch.zeros(512)  # how often each was drawn
        for token_id in request.token_ids:
            logits = reference(torch.tensor([ids])).logits[0, -1]
            scaled = torch.where(logits > 0, logits / 1.5, logits * 1.5)
            logits[ids] = scaled[ids]
            assert token_id == (logits + 2 * output - 0.5 * (output > 0)).argmax()
            ids.append(token_id)
            output[token_id] += 1


@torch.inference_mode()
def test_logprobs_are_those_of_transformers(model: str, llm: LLM) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    outputs = llm.generate(["x", BEGINNING], [replace(DRAWN, logprobs=3), DRAWN])
    assert outputs[1].outputs[0].logprobs is outputs[1].outputs[0].cumulative_logprob is None
    [completion] = outputs[0].outputs
    assert completion.logprobs is not None
    prompt = list(outputs[0].prompt_token_ids)
    logits = reference(torch.tensor([prompt + list(completion.token_ids)])).logits[0]
    want = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
    assert len(completion.logprobs) == len(completion.token_ids)
    for row, token_id, logprobs in zip(
        want, completion.token_ids, completion.logprobs, strict=True
    ):
        order = row.argsort(descending=True).tolist()
        assert set(logprobs) == {token_id, *order[:3]}
        for token, entry in logprobs.items():
            assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert order[entry.rank - 1] == token
    drawn = want.gather(1, torch.tensor(completion.token_ids).unsqueeze(1))
    assert completion.cumulative_logprob == pytest.approx(float(drawn.sum()), abs=1e-3)
    streamed = [u.logprobs or () for u in llm.stream("x", replace(DRAWN, logprobs=3))]
    assert [[*part] for parts in streamed for part in parts] == [[*p] for p in completion.logprobs]


def test_no_memory_for_a_block_is_refused(model: str) -> None:
    with pytest.raises(
        ValueError, match=r"may take 100 bytes .* two blocks of 16 tokens need 32768"
    ):
        LLM(model, kv_cache_memory_bytes=100)


def test_the_largest_step_can_be_run_before_there_is_a_cache(llm: LLM) -> None:
    runner = llm._executor.runner  # type: ignore[attr-defined]
    attention, inputs = runner._attention, runner._inputs
    runner._warm_up()  # what a GPU does to learn how much memory it leaves
    runner._attention, runner._inputs = attention, inputs


class EightRows:
    """Pads as graphs captured for eight sequences do, and computes what they replay."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.padded = runner, list[int]()
        self.upload, runner._inputs.upload = runner._inputs.upload, self.spy  # type: ignore[method-assign]

    def spy(self, batch: Batch, shape: StepShape | None = None) -> Uploaded:
        self.uploaded = self.upload(batch, shape)
        return self.uploaded

    def shape_for(self, batch: Batch) -> StepShape | None:
        if batch.num_new:
            return None
        self.padded.append(8 - batch.num_decodes)
        return StepShape(8, 8, False)

    def replay(self, shape: StepShape) -> Any:
        return self.runner.compute(self.uploaded)


def test_rows_that_pad_a_batch_change_nothing(llm: LLM) -> None:
    wanted = [llm.generate(PROMPTS, params) for params in (GREEDY, DRAWN)]
    with LLM(llm.options.model, async_scheduling=True) as padding:
        runner = padding._executor.runner  # type: ignore[attr-defined]
        rows = runner._graphs = EightRows(runner)
        assert [padding.generate(PROMPTS, params) for params in (GREEDY, DRAWN)] == wanted
    assert max(rows.padded) > 0
