"""The command line: what it prints, where, and how it says no."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import nvrar
from yalis import LLM, SamplingParams, WorkerError
from yalis.cli import main

pytestmark = pytest.mark.host

LARGE = str(Path(__file__).parents[2] / "examples" / "configs" / "llama-3.1-405b")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cli") / "tiny"
    arguments = ["--layers", "2", "--kv-heads", "4", "--shards", "3", "--vocab", "400", "--tie"]
    assert main(["make-checkpoint", str(path), *arguments]) == 0
    return str(path)


def test_make_checkpoint_writes_a_complete_folder(model: str) -> None:
    names = sorted(path.name for path in Path(model).iterdir())
    assert names == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    "extra", [[], ["--tensor-parallel-size", "2", "--num-nodes", "2"]], ids=["1", "2"]
)
def test_generate_prints_one_json_object_a_line(
    extra: list[str],
    model: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    prompts = ["--prompt", "Once", "--prompt", "x\ny"]
    drawing = [
        "--temperature",
        "0.8",
        "--top-k",
        "50",
        "--top-p",
        "0.9",
        "--seed",
        "3",
        "--stop",
        "zz",
    ]
    assert (
        main(["generate", model, *prompts, *drawing, "--max-tokens", "30", "--json", *extra]) == 0
    )
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    params = SamplingParams(max_tokens=30, temperature=0.8, top_k=50, top_p=0.9, stop=["zz"])
    with LLM(model, seed=3) as llm:
        outputs = llm.generate(["Once", "x\ny"], params)
    for one, output in zip(said, outputs, strict=True):
        assert one["prompt"] == output.prompt
        assert tuple(one["token_ids"]) == output.token_ids
        assert one["text"] == output.text
        assert one["finish_reason"] == output.finish_reason


def test_generate_prints_text_that_cannot_steer_the_terminal(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", model, "--prompt", "a\x1b[2Jb", "--max-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("a\ufffd[2Jb")
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "/no/such", "--prompt", "x"], "/no/such is not a folder"),
        (
            ["generate", LARGE, "--load-format", "dummy", "--prompt", "x"],
            "tokenizer.json is missing",
        ),
        (["generate", "/usr", "--prompt", "x"], "/usr/config.json is missing"),
        (["generate", "MODEL", "--prompt", ""], "prompt 0 is empty"),
        (["generate", "MODEL", "--prompt", "x", "--top-p", "2"], "top_p is 2.0"),
        (["generate", "MODEL", "--prompt", "x", "--tensor-parallel-size", "3"], "does not divide"),
        (["generate", "MODEL", "--prompt", "x", "--dtype", "int8"], "dtype is 'int8'"),
        (["make-checkpoint", "MODEL"], "is not empty"),
        (["make-checkpoint", "/proc/new"], "/proc/new cannot be written: No such file"),
        (["make-checkpoint", "MODEL/new", "--heads", "3"], "--hidden-size 128 over --heads 3"),
        (["make-checkpoint", "MODEL/new", "--hidden-size", "24"], "give a multiple of 16"),
        (
            ["make-checkpoint", "MODEL/new", "--kv-heads", "3"],
            "--kv-heads 3 does not divide --heads 8",
        ),
        (
            ["make-checkpoint", "MODEL/new", "--vocab", "9"],
            "vocab_size is 9; a byte-level tokenizer",
        ),
        (["make-checkpoint", "MODEL/new", "--shards", "99"], "num_shards is 99; give 1 to"),
        (["make-checkpoint", "MODEL/config.json"], "config.json is a file, not a folder"),
        (["make-checkpoint", "MODEL/config.json/x"], "config.json is a file, not a folder"),
        (["generate", "org/name", "--prompt", "x"], "`hf download org/name --local-dir DIR`"),
        (["generate", "MODEL", "--prompt", "x", "--logprobs", "1"], "add --json"),
        (
            ["generate", "MODEL", "--prompt", "x", "--all-reduce-plan", "fast"],
            "all_reduce_plan: 'fast'",
        ),
        (
            ["bench", "latency", "/no/such", "--batch-size", "300"],
            "300 is above --max-num-seqs 256",
        ),
        (
            ["bench", "latency", "/no/such", "--batch-size", "9", "--max-num-batched-tokens", "8"],
            "--batch-size 9 is above --max-num-batched-tokens 8",
        ),
        (
            ["bench", "throughput", "/no/such", "--json", "/nowhere/x"],
            "--json /nowhere/x cannot be",
        ),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_an_error_is_one_line_and_status_two(
    arguments: list[str], message: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.replace("MODEL", model) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("yalis: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not Path(model, "new").exists()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("generate M", ["--prompt"]),
        ("generate M --prompt x --tensor-parallel-size 0", ["'0'", "at least 1"]),
        ("generate M --prompt x --tensor 2", ["unrecognized", "--tensor"]),
        ("generate M --prompt x --all-reduce nccl", ["nccl", "symm-one-shot"]),
        ("generate M --prompt x --max-model-len 0", ["--max-model-len", "'0'", "at least 1"]),
        ("bench latency M --batch-size x", ["--batch-size", "'x'", "whole number of at least 1"]),
        ("bench latency M --batch-size 0", ["--batch-size", "'0'", "whole number of at least 1"]),
        ("bench latency M --warmup -1", ["--warmup", "'-1'", "at least 0"]),
        ("bench latency M --memory-gbps 0", ["--memory-gbps", "'0'", "above 0"]),
        ("bench latency M --memory-gbps inf", ["--memory-gbps", "'inf'", "finite"]),
        ("bench latency M --batch 2", ["unrecognized", "--batch"]),
        ("bench throughput M --range-ratio 1.5", ["--range-ratio", "'1.5'", "from 0 to 1"]),
        ("bench throughput M --range-ratio half", ["--range-ratio", "'half'", "from 0 to 1"]),
        ("make-checkpoint M --dtype int8", ["--dtype", "int8", "bfloat16"]),
        ("make-checkpoint M --layers 0", ["--layers", "'0'", "at least 1"]),
    ],
)
def test_an_option_that_does_not_read_is_one_line(
    command: str, says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(command.split())
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    for word in says:
        assert word in err


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"yalis {nvrar.__version__}\n"


def test_generate_draws_several_and_says_how_likely_their_tokens_were(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    drawing = ["--temperature", "1", "--min-p", "0.01", "--n", "3", "--logprobs", "2"]
    assert (
        main(["generate", model, "--prompt", "Once", *drawing, "--max-tokens", "4", "--json"]) == 0
    )
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["index"] for one in said] == [0, 1, 2]
    for one in said:
        assert len(one["logprobs"]) == len(one["token_ids"]) > 0
        for token_id, likely in zip(one["token_ids"], one["logprobs"], strict=True):
            assert 2 <= len(likely) <= 3
            assert likely[str(token_id)]["logprob"] < 0


def test_a_worker_that_fails_is_quoted_in_full(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise WorkerError("rank 1 failed: KeyError: 'x'\n\nTraceback\n  in its own words")

    monkeypatch.setattr("yalis.cli.make_llm", fail)
    assert main(["generate", model, "--prompt", "x"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("yalis: error: rank 1 failed: KeyError: 'x'")
    assert "in its own words" in err


def test_no_module_of_ours_needs_transformers() -> None:
    code = "import sys, yalis, yalis.cli, yalis.worker; print('transformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def test_verbose_shows_where_it_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "/no/such", "--prompt", "x", "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_cache_is_as_large_as_asked(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", model, "--prompt", "x", "--max-tokens", "2"]
    assert main([*command, "--kv-cache-memory-bytes", "1"]) == 2
    assert "the cache may take 1 bytes on a rank" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--kv-cache-memory-bytes", "much"])
    assert "size 'much'" in capsys.readouterr().err
    assert main([*command, "--kv-cache-memory-bytes", "1M"]) == 0
