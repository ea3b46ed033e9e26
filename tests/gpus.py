"""How many GPUs the ranks of a test have, and how they share one where it is the only one."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from nvrar import gpu

COUNT = torch.cuda.device_count()
NUM_RANKS = max(COUNT, 2)
ARE_SHARED = COUNT < NUM_RANKS  # then times mean nothing
NEED = "needs a CUDA GPU, and a run of its own: pytest tests/gpu tests/dist"
WHY_NO_RANKS = gpu.why_unavailable(None) if COUNT else NEED  # empty where nvrar's executor can run
_SITE = Path(__file__).with_name("shared_gpu")


def variables() -> dict[str, str]:
    """What is added to the environment of processes that start NUM_RANKS ranks, or are one of them."""
    if not ARE_SHARED:
        return {}
    path = os.pathsep.join(filter(None, (str(_SITE), os.environ.get("PYTHONPATH", ""))))
    return {"PYTHONPATH": path, "SHARED_GPU_RANKS": str(NUM_RANKS)}
