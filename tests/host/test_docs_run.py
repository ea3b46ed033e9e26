"""The documentation's commands, run as a reader would: they end well, and print what the page says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from doc_blocks import README, ROOT, TUTORIALS, Shell, blocks, missing_lines
from nvrar.launch import seat
from nvrar.topology import from_sightings, sighting

pytestmark = pytest.mark.host


@pytest.fixture
def shell(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Shell:
    return Shell(tmp_path, capfd)


def test_the_examples_of_the_readme_run(shell: Shell, tmp_path: Path) -> None:
    said = {}
    for block in blocks(README):
        if block.language == "python":
            (tmp_path / block.file_name).write_text(block.text)
            commands = block.text.splitlines()[0].partition(": ")[2].split(" && ")
            said[block.file_name] = [shell.run(command) for command in commands][-1]
    assert "1x4 ranks, 6 by " in said["sum.py"]
    texts = said["generate.py"].splitlines()
    assert len(texts) == 2
    assert all(line.endswith((" length", " stop")) for line in texts)


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorials_run_and_print_what_they_say(page: Path, shell: Shell, tmp_path: Path) -> None:
    said = ""
    for block in blocks(page):
        if block.file_name:
            (tmp_path / block.file_name).write_text(block.text)
        elif block.language == "sh":
            said = "" if block.needs else "".join(shell.run(line) for line in block.lines)
        elif block.language == "text" and said:
            missing = missing_lines(said, block.text)
            assert not missing, f"{page.name} has the line {missing!r}, and it printed\n{said}"


def test_the_batch_file_tells_each_task_its_place(tmp_path: Path) -> None:
    """By stand-ins for Slurm's own commands, which start the tasks of two nodes here."""
    stand_ins = {
        "scontrol": "echo node1; echo node2",
        "srun": "while [[ $1 == -* ]]; do shift; done; for SLURM_PROCID in 0 1 2 3; do "
        "export SLURM_STEP_ID=0 SLURM_PROCID SLURM_LOCALID=$((SLURM_PROCID % 2)); "
        "export SLURM_NODEID=$((SLURM_PROCID / 2)); "
        '"$@"; echo; done',
    }
    for name, script in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = ["SLURM_JOB_ID=7", "SLURM_JOB_NODELIST=node[1-2]", "SLURM_NTASKS=4", "SLURM_NNODES=2"]
    path = f"{tmp_path}:/usr/bin:/bin"
    said = subprocess.run(
        ["env", "-i", f"PATH={path}", *job, "bash", ROOT / "examples/two_nodes.sbatch", "env"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert said.returncode == 0, said.stderr
    tasks = [dict(re.findall(r"^(\w+)=(.*)$", told, re.M)) for told in said.stdout.split("\n\n")]
    places = [seat(task) for task in tasks if task]
    assert [(p.rank, p.world_size, p.local_rank) for p in places if p] == [
        (0, 4, 0),
        (1, 4, 1),
        (2, 4, 0),
        (3, 4, 1),
    ]
    assert {(p.host, p.port) for p in places if p} == {("node1", 20007)}
    assert str(from_sightings([sighting(task) for task in tasks if task], range(4))) == "2x2"
    assert {task["LOCAL_WORLD_SIZE"] for task in tasks if task} == {"2"}
