"""`yalis bench`: every number from a real run, on tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from yalis import LLM, bench
from yalis.bench import Workload, percentile, run
from yalis.cli import main
from yalis.config import ModelConfig
from yalis.core import Request
from yalis.errors import ConfigError, YalisError
from yalis.models.decoder import CausalLM
from yalis.parallel.group import Placement, TensorParallel
from yalis.roofline import Work
from yalis.testing import make_checkpoint

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bench") / "tiny"
    make_checkpoint(path, num_hidden_layers=2, num_key_value_heads=4)
    return str(path)


def test_all_reduces_are_measured_side_by_side(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = tmp_path / "rows.jsonl"
    sizes = ["--batch-size", "1", "--batch-size", "3", "--prompt-len", "5", "--output-len", "4"]
    ranks = ["--tensor-parallel-size", "2", "--all-reduce", "torch", "--all-reduce", "nvrar"]
    runs = ["--iterations", "2", "--memory-gbps", "10", "--json", str(file)]
    assert main(["bench", "latency", model, *sizes, *ranks, *runs]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["batch_size"], row["all_reduce"]) for row in rows] == [
        (1, "torch"),
        (1, "nvrar"),
        (3, "torch"),
        (3, "nvrar"),
    ]
    for row in rows:
        # Two runs of four tokens each: three steps between them.
        assert row["num_samples"] == len(row["token_samples_ms"]) == 6
        assert 0 < row["token_ms"] <= row["token_p99_ms"] == max(row["token_samples_ms"])
        assert row["memory_share"] == pytest.approx(row["gbps_per_rank"] / 10, abs=0.01)
        assert row["torch"] == torch.__version__
        assert row["host"]["num_cores"] > 0
        assert row["options"]["tensor_parallel_size"] == 2
        assert row["options"]["dtype"] == "float32"
        assert row["options"]["max_model_len"] == 2048
        assert row["all_reduce_details"]["backend"] == row["all_reduce"]
        assert row["all_reduce_details"]["calls"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_throughput_counts_what_was_asked(model: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lengths = ["--num-prompts", "7", "--prompt-len", "9", "--output-len", "6", "--range-ratio", "0"]
    assert main(["bench", "throughput", model, *lengths, "--json", str(file)]) == 0
    [row] = [json.loads(line) for line in file.read_text().splitlines()]
    # By the rates alone: the time is rounded to milliseconds, and it may be less than ten of them.
    assert row["output_tokens_per_s"] / row["requests_per_s"] == pytest.approx(6, rel=0.001)
    assert row["tokens_per_s"] / row["requests_per_s"] == pytest.approx(15, rel=0.001)
    assert row["elapsed_s"] > 0
    assert row["all_reduce"] == "none"


def test_no_run_begins_with_the_prompts_of_another(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[tuple[int, ...]] = []
    make_requests = bench._requests

    def recorded(*args: Any) -> list[Request]:
        requests = make_requests(*args)
        prompts.extend(request.token_ids for request in requests)
        return requests

    monkeypatch.setattr(bench, "_requests", recorded)
    sizes = ["--batch-size", "1", "--batch-size", "2", "--prompt-len", "40", "--output-len", "2"]
    assert main(["bench", "latency", model, *sizes, "--iterations", "3", "--memory-gbps", "1"]) == 0
    assert len(prompts) == 4 * (1 + 2)
    assert len({prompt[:16] for prompt in prompts}) == len(prompts)


def test_a_run_takes_every_step_once(model: str) -> None:
    with LLM(model, max_num_batched_tokens=8, load_format="dummy") as llm:
        workload = Workload(((12, 5), (3, 5)))  # one prompt's second chunk comes with a decode
        workload.check(llm)
        done = run(llm, workload, seed=0)
        assert done.num_output_tokens == 10
        assert len(done.first_token_s) == 2
        assert 0 < max(done.first_token_s) == done.prefill_s < done.elapsed_s
        assert sum(done.step_s) < done.elapsed_s
        with pytest.raises(ConfigError, match=r"3000 .* max_model_len 2048; .* allows no more"):
            Workload.uniform(1, 2000, 1000).check(llm)
    with (
        LLM(model, max_model_len=64, load_format="dummy") as llm,
        pytest.raises(ConfigError, match=r"65 .* max_model_len 64; .*raise it up to 2048"),
    ):
        Workload.uniform(1, 60, 5).check(llm)


def test_a_run_of_requests_that_fail_is_none(model: str) -> None:
    with LLM(model, load_format="dummy") as llm:
        llm._executor.runner.model.lm_head.weight.fill_(torch.nan)  # type: ignore[attr-defined]
        with pytest.raises(
            YalisError, match=r"after 0 tokens with 'error' \(the model's logits were"
        ):
            run(llm, Workload.uniform(2, 5, 5), seed=0)


def test_all_reduces_can_be_exchanged_between_requests_only(model: str) -> None:
    # Asynchronous: a step that was begun in advance is nobody's request.
    options = {"load_format": "dummy", "async_scheduling": True}
    with LLM(model, all_reduce="torch", **options) as llm:
        stream = llm.stream([1, 2, 3])
        next(stream)
        with pytest.raises(YalisError, match="requests are under way"):
            llm.use_all_reduce("nvrar")
        stream.close()
        llm.use_all_reduce("nvrar")
        with pytest.raises(ConfigError, match="all_reduce is 'smoke'"):
            llm.use_all_reduce("smoke")
        assert llm.options.all_reduce == "nvrar"


def test_random_lengths_stay_in_their_range_and_depend_on_the_seed() -> None:
    first, again, other = (Workload.random(200, 100, 10, 0.3, seed) for seed in (1, 1, 2))
    assert first == again != other
    prompts, outputs = zip(*first.lengths, strict=True)
    assert (min(prompts), max(prompts)) == (70, 130)
    assert (min(outputs), max(outputs)) == (7, 13)
    assert Workload.uniform(2, 10, 3).mean_context == 12.0  # 11, 12 and 13 tokens


@pytest.mark.parametrize("is_tied", [False, True])
def test_work_is_counted_from_the_model_itself(is_tied: bool, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "m", num_key_value_heads=4, tie_word_embeddings=is_tied)
    config = ModelConfig.from_folder(str(tmp_path / "m"))
    at = Placement(TensorParallel.single(), torch.bfloat16, torch.device("meta"))
    model = CausalLM(config, at)
    whole = Work.of(config, torch.bfloat16, 1)
    everything = sum(p.nbytes for p in model.parameters())
    embedding = 0 if is_tied else model.model.embed_tokens.weight.nbytes
    assert whole.weight_bytes == everything - embedding
    layers, heads, kv_heads, dim = 4, 8, 4, 16
    assert whole.kv_bytes_per_token == 2 * layers * kv_heads * dim * 2
    assert whole.attention_flops_per_pair == 4 * layers * heads * dim
    half = Work.of(config, torch.bfloat16, 2)
    assert half.flops_per_token * 2 == whole.flops_per_token
    assert half.kv_bytes_per_token * 2 == whole.kv_bytes_per_token
    assert whole.decode_bytes(3, 10) == whole.weight_bytes + 30 * whole.kv_bytes_per_token
    pairs = 1 + 2 + 3 + 1
    assert whole.prefill_flops([3, 1]) == (
        4 * whole.flops_per_token + pairs * whole.attention_flops_per_pair
    )


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(v) for v in range(100, 0, -1)]
    assert [percentile(values, p) for p in (1, 50, 99, 100)] == [1, 50, 99, 100]
    assert percentile([7.0], 1) == 7.0


def test_launched_ranks_all_end_before_they_measure_what_cannot_be_written(
    model: str, tmp_path: Path
) -> None:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "yalis"]
    line = ["bench", "latency", model, "--output-len", "2", "--json", str(tmp_path / "no" / "rows")]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *line],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "no is no directory that may be written to" in done.stderr
    assert "ready in" not in done.stdout
