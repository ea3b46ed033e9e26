"""All-reduces of all the GPUs of this machine, by both transports, as one node and as several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("ranks_script.py")
GPUS = torch.cuda.device_count()
CHECKS = ["bits", "layouts", "graphs", "norm", "storm", "streams", "groups"]
CHECKS += ["foreign_nvshmem", "memory", "late", "mismatch"]
pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(GPUS < 2, reason="needs two or more CUDA GPUs"),
    pytest.mark.timeout(300),
]


@pytest.mark.parametrize("transport", ["direct", "put"])
@pytest.mark.parametrize("topology", [f"1x{GPUS}", f"{GPUS}x1"])
@pytest.mark.parametrize("check", CHECKS)
def test_on_every_gpu(check, topology, transport):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(GPUS), str(SCRIPT), topology, check]
    done = subprocess.run(
        command,
        env={**os.environ, "NVRAR_TRANSPORT": transport, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{check} on {topology}: passed" in done.stdout
