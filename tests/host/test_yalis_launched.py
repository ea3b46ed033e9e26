"""Under torchrun and srun every rank runs the same script and gets the same outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from yalis import LLM, SamplingParams
from yalis.testing import make_checkpoint

pytestmark = pytest.mark.host

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

SCRIPT = """
import json, os, sys
from yalis import LLM, RequestError, SamplingParams

model, folder = sys.argv[1:]
rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID")))
greedy = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
drawn = SamplingParams(max_tokens=24, temperature=1.0, min_p=0.01, ignore_eos=True)
said = []
for all_reduce, num_nodes in (("nvrar", 2), ("torch", 1), ("nvrar", 1)):
    with LLM(model, tensor_parallel_size=2, num_nodes=num_nodes, all_reduce=all_reduce) as llm:
        said.append([output.token_ids for output in llm.generate(["Once", "x"], greedy)])
        said.append([output.token_ids for output in llm.generate(["Once", "x"], drawn)])
        try:
            llm.generate(["Once", "x"][rank], greedy)
        except RequestError as error:
            said.append(str(error))
with LLM(model, tensor_parallel_size=2, all_reduce="torch", async_scheduling=True) as llm:
    params = SamplingParams(max_tokens=9, temperature=1.0, top_k=8, seed=3, n=2, logprobs=1)
    updates = list(llm.stream("Once", params))
    texts = ["".join(u.text for u in updates if u.index == index) for index in range(2)]
    assert texts == [one.text for one in updates[-1].output.outputs]
    said.append([[one.text, [list(e) for e in one.logprobs]] for one in updates[-1].output.outputs])
try:
    LLM(model, tensor_parallel_size=1)
except ValueError as error:
    said.append(str(error))
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(said, file)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("m"), num_hidden_layers=2))


def check(model: str, folder: Path) -> None:
    with LLM(model) as llm:
        greedy = [list(o.token_ids) for o in llm.generate(["Once", "x"], GREEDY)]
        params = SamplingParams(max_tokens=24, temperature=1.0, min_p=0.01, ignore_eos=True)
        drawn = [list(o.token_ids) for o in llm.generate(["Once", "x"], params)]
        params = SamplingParams(max_tokens=9, temperature=1.0, top_k=8, seed=3, n=2, logprobs=1)
        outputs = llm.generate("Once", params)[0].outputs
        stream = [[o.text, [list(entry) for entry in o.logprobs or ()]] for o in outputs]
    for rank in range(2):
        said = json.loads((folder / f"{rank}.json").read_text())
        wrong_size, streamed = said.pop(), said.pop()
        assert "launcher started 2 ranks, but tensor_parallel_size is 1" in wrong_size
        assert len(said) == 9
        assert streamed == stream
        for greedy_said, _, refusal in zip(*[iter(said)] * 3, strict=True):
            assert greedy_said == greedy
            assert "ranks [1] were given other prompts or sampling_params than rank 0" in refusal
        # Unseeded requests are numbered from the engine's start; ours above came third and fourth too.
        assert said[1] == said[4] == said[7] == drawn


def test_torchrun(model: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [*TORCHRUN, "2", str(script), model, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    check(model, tmp_path)


def test_srun_as_its_variables_describe_it(model: str, tmp_path: Path) -> None:
    step = {
        "SLURM_JOB_ID": str(os.getpid()),  # the port comes from it
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, model, str(tmp_path)],
            env=os.environ | step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    check(model, tmp_path)


def test_the_command_under_torchrun_prints_once(model: str) -> None:
    yalis = ["-m", "yalis", "generate", model, "--prompt", "Once", "--max-tokens", "24"]
    command = [*TORCHRUN, "2", *yalis, "--ignore-eos", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    [line] = ran.stdout.splitlines()
    with LLM(model) as llm:
        assert tuple(json.loads(line)["token_ids"]) == llm.generate("Once", GREEDY)[0].token_ids
