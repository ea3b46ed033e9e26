# SPDX-License-Identifier: Apache-2.0
"""What this rank computes on, by name. A measured table holds for these names."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from pathlib import Path

import torch


@cache
def cpu_name() -> str:
    """The model, such as ``"Intel(R) Xeon(R) Platinum 8480+"``."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def driver_version() -> str | None:
    """Of NVIDIA's kernel driver; None where it is not loaded."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
    except OSError:
        return None
    numbers = re.findall(r"\b\d+\.\d+(?:\.\d+)*\b", first)
    return numbers[0] if numbers else None


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def device_name(executor: str) -> str:
    """Of the current GPU for ``"gpu"``; for ``"host"`` of the CPU, with its cores."""
    if executor == "gpu":
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {num_cores()} cores"
