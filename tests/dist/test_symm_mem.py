"""yalis's all-reduces over symmetric memory, on all the GPUs of this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(GPUS < 2, reason="needs two or more CUDA GPUs"),
]


def test_sums_fused_norms_and_graphs() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(GPUS), str(Path(__file__).with_name("symm_mem_script.py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "symm_mem: passed" in done.stdout
