# SPDX-License-Identifier: Apache-2.0
"""Programmatic dependent launch: a kernel starts while the one before it still runs.

Every kernel of this folder lets its successor start at once, then waits for its predecessor before it
writes, or reads what may have been written since the last ordinary launch. An ordinary launch, as torch's
are, begins when all before it have ended. So launch latency is hidden, and a matrix product fetches
weights while it waits. The rule that makes it safe: no kernel skips the wait, so when one has ended all
before it have.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@lru_cache
def _has_dependent_launch(device_idx: int) -> bool:
    return torch.cuda.get_device_capability(device_idx) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, bool]:
    """Keyword arguments for a kernel's launch on this device; empty in Triton's interpreter."""
    if device.type != "cuda":
        return {"PDL": False}
    is_on = _has_dependent_launch(device.index or 0)
    return {"PDL": is_on, "launch_pdl": is_on}


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel start."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until all earlier kernels have ended and their writes are visible."""
    if PDL:
        gdc_wait()
