"""All-reduces of all the GPUs of this machine, by both transports, as one node and as several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gpus
import pytest

CHECKS = ["bits", "layouts", "graphs", "norm", "storm", "streams", "groups"]
CHECKS += ["foreign_nvshmem", "memory", "successors", "late", "mismatch"]
pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(bool(gpus.WHY_NO_RANKS), reason=gpus.WHY_NO_RANKS),
    pytest.mark.timeout(300),
]


def run(script: str, *arguments: str, **variables: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(gpus.NUM_RANKS), str(Path(__file__).with_name(script))]
    done = subprocess.run(
        [*command, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **gpus.variables(), **variables},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("transport", ["direct", "put"])
@pytest.mark.parametrize("topology", [f"1x{gpus.NUM_RANKS}", f"{gpus.NUM_RANKS}x1"])
@pytest.mark.parametrize("check", CHECKS)
def test_nvrar(check: str, topology: str, transport: str) -> None:
    said = run("ranks_script.py", topology, check, NVRAR_TRANSPORT=transport)
    assert f"{check} on {topology}: passed" in said


def test_yalis_over_symmetric_memory() -> None:
    assert "symm_mem: passed" in run("symm_mem_script.py")
