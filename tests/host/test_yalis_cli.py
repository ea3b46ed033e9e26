# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, where, and how it says no."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
        (["generate", "MODEL", "--prompt", ""], "prompt 0 is empty"),
        (["generate", "MODEL", "--prompt", "x", "--top-p", "2"], "top_p is 2.0"),
        (["generate", "MODEL", "--prompt", "x", "--tensor-parallel-size", "3"], "does not divide"),
        (["generate", "MODEL", "--prompt", "x", "--dtype", "int8"], "dtype is 'int8'"),
        (["make-checkpoint", "MODEL"], "is not empty"),
        (["make-checkpoint", "MODEL/new", "--heads", "3"], "hidden_size 128 is not a multiple"),
        (["make-checkpoint", "MODEL/config.json/x"], "Not a directory"),
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
