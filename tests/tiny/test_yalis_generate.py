"""One rank, the whole way: batches against single prompts, what ends a text, whose seed counts."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import numpy
import pytest
import torch

from yalis import LLM, ConfigError, RequestError, SamplingParams, YalisError
from yalis.testing import make_checkpoint

PROMPTS = ["Once upon a time", "x", "Grüße 🙂", "The network is " * 20, "01"]
DUMMY = {"load_format": "dummy"}
GREEDY = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)  # so small a model is slower on two
    return str(make_checkpoint(tmp_path_factory.mktemp("m"), max_position_embeddings=256))


@pytest.fixture(scope="module")
def llm(model: str) -> Iterator[LLM]:
    with LLM(model) as llm:
        yield llm


def test_a_batch_says_what_each_prompt_says_alone(llm: LLM) -> None:
    together = llm.generate(PROMPTS, GREEDY)
    assert together == [llm.generate(prompt, GREEDY)[0] for prompt in PROMPTS]
    assert [output.prompt for output in together] == PROMPTS


def test_a_seeded_request_does_not_depend_on_what_runs_beside_it(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, top_k=100, top_p=0.95, seed=7)
    [alone] = llm.generate("x", params)
    others = [replace(params, seed=seed, max_tokens=seed) for seed in (3, 50, 20)]
    outputs = llm.generate(["01", "x", PROMPTS[3], "y"], [others[0], params, *others[1:]])
    assert outputs[1] == alone
    assert llm.generate("x", replace(params, seed=8))[0].token_ids != alone.token_ids


def test_unseeded_requests_differ_from_each_other_and_repeat_with_the_engine_seed(
    model: str,
) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0)
    said = []
    for seed in (0, 0, 1):
        with LLM(model, seed=seed) as llm:
            said.append([output.token_ids for output in llm.generate(["x", "x"], params)])
    assert said[0] == said[1]
    assert len({said[0][0], said[0][1], said[2][0], said[2][1]}) == 4


def test_small_limits_change_nothing_but_the_schedule(model: str, llm: LLM) -> None:
    limits = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "kv_cache_memory_bytes": 1 << 20}
    with LLM(model, **limits) as narrow:
        assert narrow.generate(PROMPTS, GREEDY) == llm.generate(PROMPTS, GREEDY)


@pytest.mark.parametrize("num_chars", [1, 2, 3, 7])
def test_a_stop_string_ends_the_text_before_it_wherever_tokens_part(
    llm: LLM, num_chars: int
) -> None:
    [free] = llm.generate("Once", GREEDY)
    num_cut = 0
    for begin in range(5, len(free.text) - num_chars, 4):
        stop = free.text[begin : begin + num_chars]
        if "\ufffd" in stop:
            continue
        [output] = llm.generate("Once", replace(GREEDY, stop=["never in it", stop]))
        assert output.text == free.text[: free.text.index(stop)]
        assert output.finish_reason == "stop"
        assert output.token_ids == free.token_ids[: len(output.token_ids)]
        num_cut += len(output.token_ids) < len(free.token_ids)
    assert num_cut > 5


def test_max_tokens_and_the_models_length_end_it_with_length(llm: LLM) -> None:
    [three] = llm.generate("x", replace(GREEDY, max_tokens=3))
    assert (len(three.token_ids), three.finish_reason) == (3, "length")
    prompt = list(range(2, 252))
    [clipped] = llm.generate([prompt], replace(GREEDY, max_tokens=1000))
    assert (len(clipped.token_ids), clipped.finish_reason) == (6, "length")
    assert llm.generate([prompt], replace(GREEDY, max_tokens=None)) == [clipped]
    [last] = llm.generate([list(range(2, 257))], replace(GREEDY, max_tokens=5))
    assert len(last.token_ids) == 1


def test_prompts_may_be_ids_one_or_many_and_params_one_or_each(llm: LLM) -> None:
    [text] = llm.generate("x", GREEDY)
    ids = list(text.prompt_token_ids)
    numpy_ids = [numpy.int64(token_id) for token_id in ids]
    mapping = {"prompt_token_ids": ids}
    for form in (ids, [ids], (tuple(ids),), numpy_ids, mapping, [mapping]):
        [output] = llm.generate(form, GREEDY)
        assert (output.token_ids, output.text, output.prompt) == (text.token_ids, text.text, None)
    lengths = [
        len(o.token_ids) for o in llm.generate(["x", ids], [GREEDY, replace(GREEDY, max_tokens=2)])
    ]
    assert lengths == [48, 2]
    assert llm.generate({"prompt": "x"}, GREEDY) == [text]
    assert llm.generate([], GREEDY) == []
    assert len(llm.generate("x")[0].token_ids) <= SamplingParams().max_tokens


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt 1 is empty"),
        ([], "prompt 1 is empty"),
        ([5, 512], "token id 512; give integers from 0 to 511"),
        ([-1], "token id -1"),
        ([5, "a"], "token id 'a'"),
        ([True, 5], "token id True"),
        ([5] * 256, "256 tokens, which leaves no room for output within max_model_len 256"),
        (None, "prompt 1 is None"),
        (3.5, "prompt 1 is 3.5"),
        (b"x", "prompt 1 is b'x'"),
        ({"prompt": "x", "multi_modal_data": 0}, "prompt 1 is {'prompt': 'x', 'multi.*alone"),
        ("a\ud83d", "prompt 1 has half a surrogate pair at character 1; give valid Unicode"),
    ],
    ids=str,
)
def test_a_bad_prompt_is_refused_before_any_is_begun(
    llm: LLM, prompt: object, message: str
) -> None:
    drawn = llm.engine.num_drawn_tokens
    with pytest.raises(RequestError, match=message):
        llm.generate(["x", prompt], GREEDY)  # type: ignore[list-item]
    assert llm.engine.num_drawn_tokens == drawn
    assert llm.generate("x", GREEDY)  # the engine is unharmed


@pytest.mark.parametrize("prompts", [None, 7], ids=str)
def test_what_is_no_prompt_at_all(llm: LLM, prompts: object) -> None:
    with pytest.raises(RequestError, match="give a text, a list of token ids, or a list of these"):
        llm.generate(prompts)  # type: ignore[arg-type]


def test_left_out_params_are_the_checkpoints_own(model: str, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "m")
    file = folder / "generation_config.json"
    theirs = {
        "max_new_tokens": 9,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": None,
        "do_sample": True,
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | theirs))
    with LLM(str(folder)) as llm:
        params = SamplingParams(max_tokens=9, temperature=0.6, top_p=0.9)
        assert llm.get_default_sampling_params() == params
        seeded = replace(llm.get_default_sampling_params(), seed=3)
        assert llm.generate("x", seeded)[0] == llm.generate("x", replace(params, seed=3))[0]
        assert len(llm.generate("x")[0].token_ids) == 9
    file.write_text(json.dumps({"temperature": -1}))
    with LLM(str(folder)) as llm:
        llm.generate("x", GREEDY)
        with pytest.raises(ConfigError, match=r"generation_config.json: temperature is -1"):
            llm.generate("x")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_silent_config_leaves_the_type_to_the_weights(dtype: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", num_hidden_layers=1, dtype=dtype)
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in raw.items() if "dtype" not in k}))
    for options, expected in (({}, dtype), ({"dtype": "float32"}, "float32"), (DUMMY, "float32")):
        with LLM(str(folder), **options) as llm:
            assert llm._executor.runner.model.lm_head.weight.dtype == getattr(torch, expected)


def test_wrong_number_of_params(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 sampling_params for 1 prompts"):
        llm.generate(["x"], [GREEDY, GREEDY])
    for wrong in ([{"max_tokens": 3}], {"max_tokens": 3}, 3):
        with pytest.raises(RequestError, match="give SamplingParams, or a list of them"):
            llm.generate(["x"], wrong)  # type: ignore[arg-type]


def test_a_request_that_can_never_fit_the_cache_is_refused_alone(model: str) -> None:
    with LLM(model, kv_cache_memory_bytes=100_000) as llm:
        with pytest.raises(RequestError, match="may take 130 tokens, but the cache holds"):
            llm.generate(["x", [5] * 100], replace(GREEDY, max_tokens=30))
        with pytest.raises(RequestError, match="may take 130 tokens, but the cache holds"):
            llm.stream([5] * 100, replace(GREEDY, max_tokens=30))
        assert llm.generate("x", replace(GREEDY, max_tokens=3))


def test_an_interrupted_generate_leaves_a_working_engine(llm: LLM) -> None:
    def interrupt(phase: str, done: int, total: int) -> None:
        assert (phase, total) == ("generating tokens", 96)
        if done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(["x", "y"], GREEDY, on_progress=interrupt)
    assert llm.generate(PROMPTS[:1], GREEDY)[0].prompt == PROMPTS[0]


def test_an_interrupt_while_requests_are_begun_leaves_none(llm: LLM) -> None:
    expected = llm.generate("x", GREEDY)
    for place in range(1, 100):  # calls, from the first of `_begin` on
        num_calls = 0

        def profile(frame: FrameType, event: str, argument: object) -> None:
            nonlocal num_calls
            if event == "call" and (num_calls or frame.f_code is LLM._begin.__code__):
                num_calls += 1
                if num_calls == place:  # noqa: B023
                    raise KeyboardInterrupt

        sys.setprofile(profile)
        try:
            with pytest.raises(KeyboardInterrupt):
                llm.generate(["x", "y"], replace(GREEDY, max_tokens=3))
        finally:
            sys.setprofile(None)
        assert not llm.engine._live, place
        assert not llm._inboxes, place
    assert llm.generate("x", GREEDY) == expected


def test_a_second_interrupt_leaves_no_result_for_a_later_step(llm: LLM) -> None:
    class Interrupted:
        def wait(self) -> None:
            raise KeyboardInterrupt

    expected = llm.generate("x", GREEDY)
    executor = llm._executor
    executor._under_way.extend([Interrupted(), Interrupted()])  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        executor.drain()
    assert llm.generate("x", GREEDY) == expected


def test_a_closed_llm_says_so(model: str) -> None:
    with LLM(model) as llm:
        pass
    llm.close()
    with pytest.raises(YalisError, match="closed"):
        llm.generate("x")


def test_two_engines_in_one_process_do_not_disturb_each_other(model: str, llm: LLM) -> None:
    with LLM(model, load_format="dummy", seed=9) as other:
        ours, theirs = llm.generate("x", GREEDY), other.generate("x", GREEDY)
        assert ours != theirs
        assert llm.generate("x", GREEDY) == ours
        assert other.generate("x", GREEDY) == theirs
