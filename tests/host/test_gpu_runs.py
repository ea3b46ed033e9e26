"""Which tests see the GPUs of a machine, and what the scripts of benchmarks/ run on so many."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.host

TESTS = Path(__file__).parent.parent
# Stands for python3: says how many GPUs there are, and writes down what it is asked to run.
PYTHON = """#!/usr/bin/env bash
case "$*" in *device_count*) echo "$GPUS" && exit ;; esac
echo "${SHARED_GPU_RANKS:-none} share; ${NVRAR_TRANSPORT:-direct}; $*" >>"$CALLS"
case "$*" in *"${FAILING:-nothing}"*) exit 3 ;; esac
"""


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["tests/gpu", "tests/dist"], True),
        (["tests/gpu/test_virtual.py::test_x[a::b]"], True),
        (["tests/gpu", "tests/tiny"], False),
        (["tests/gpus.py"], False),
        (["tests"], False),
        ([], False),
    ],
)
def test_gpus_are_for_runs_of_their_tests_alone(
    arguments: list[str], wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (link := tmp_path / "link").symlink_to(TESTS.parent)
    spec = importlib.util.spec_from_file_location(
        "conftest_by_link", link / "tests" / "conftest.py"
    )
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(conftest := importlib.util.module_from_spec(spec))
    for root in (link, TESTS.parent):
        config = SimpleNamespace(args=[f"{root}/{argument}" for argument in arguments])
        assert conftest.is_for_gpus(config) == wanted
    monkeypatch.chdir(TESTS.parent)
    assert conftest.is_for_gpus(SimpleNamespace(args=arguments)) == wanted


def start(
    script: str, folder: Path, num_gpus: int, **variables: str
) -> subprocess.CompletedProcess[str]:
    (python := folder / "python3").write_text(PYTHON)
    python.chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "GPUS": str(num_gpus),
        "CALLS": str(folder / "calls"),
        "OUT": str(folder),
    }
    return subprocess.run(
        ["bash", str(TESTS.parent / "benchmarks" / script)],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run(script: str, folder: Path, num_gpus: int, **variables: str) -> list[str]:
    done = start(script, folder, num_gpus, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("num_gpus", "ranks", "topologies"),
    [
        (1, "", "1x2 2x1"),
        (2, "", "1x2 2x1"),
        (2, "3", "1x3 3x1"),
        (4, "", "1x4 2x2 4x1"),
        (1, "8", "1x8 2x4 4x2 8x1"),
    ],
)
def test_every_topology_is_checked_once(
    num_gpus: int, ranks: str, topologies: str, tmp_path: Path
) -> None:
    variables = {"PARTS": "checks"} | ({"RANKS": ranks} if ranks else {})
    calls = run("gpu_check.sh", tmp_path, num_gpus, **variables)
    assert len(set(calls)) == len(calls)
    sharing = "none" if num_gpus > 1 and not ranks else ranks or "2"
    assert all(call.startswith(f"{sharing} share;") for call in calls)
    for transport in ("direct", "put"):
        late = [call for call in calls if f"; {transport};" in call and "late mismatch" in call]
        assert [call.split()[-3] for call in late] == topologies.split()


def test_ranks_on_cpus_share_no_gpu(tmp_path: Path) -> None:
    calls = run("topologies.sh", tmp_path, 1, DEVICE="cpu", RANKS="2", PARTS="direct")
    assert len(calls) == 2
    assert all(call.startswith("none share;") and "--eager" not in call for call in calls)


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_the_engine_is_checked_and_measured_once(num_gpus: int, tmp_path: Path) -> None:
    calls = run("yalis_check.sh", tmp_path, num_gpus)
    assert len(set(calls)) == len(calls)
    assert sum("test_engine_on_gpu" in call for call in calls) == 3
    assert sum("--tensor-parallel-size 2" in call for call in calls) == 2 * (num_gpus - 1)


@pytest.mark.parametrize("failing", ["latency", "throughput"])  # beside another step, and alone
def test_a_step_that_fails_fails_the_script(failing: str, tmp_path: Path) -> None:
    done = start("yalis_check.sh", tmp_path, 1, FAILING=failing, SECTIONS="one many")
    assert done.returncode == 1
    assert "exit status 3" in done.stdout.rpartition("not right:")[2]
    nothing = start("yalis_check.sh", tmp_path, 1, SECTIONS="none")
    assert nothing.returncode == 1
    assert "nothing ran" in nothing.stdout


COUNT = "import torch; print(torch.cuda.device_count())"
PICK = """
import sitecustomize
import yalis.executor, yalis.joined, yalis.worker

sitecustomize._count = lambda: 2
for module in (yalis.executor, yalis.joined, yalis.worker):
    print(module.pick_device("cuda", 3))
"""


@pytest.mark.parametrize(("code", "said"), [(COUNT, ["4"]), (PICK, ["cuda:1"] * 3)])
def test_ranks_that_share_gpus_see_one_each_and_take_turns(
    code: str, said: list[str], tmp_path: Path
) -> None:
    (folder := tmp_path / "torch").mkdir()  # which does not make the script one of torch's own
    (script := folder / "script.py").write_text(code)
    path = os.pathsep.join((str(TESTS / "shared_gpu"), str(TESTS.parent / "src")))
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": path, "SHARED_GPU_RANKS": "4"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == said
