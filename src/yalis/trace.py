# SPDX-License-Identifier: Apache-2.0
"""Names for the phases of a step in a profiler's timeline: NVTX ranges where there is CUDA, else nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Trace = Callable[[str], AbstractContextManager[Any]]
"""`with trace("forward"): ...`"""

_NOTHING = nullcontext()


def no_trace(phase: str) -> AbstractContextManager[Any]:
    return _NOTHING


def trace_on(device_type: str) -> Trace:
    """The tracing for a process whose ranks work on this type of device."""
    return torch.cuda.nvtx.range if device_type == "cuda" else no_trace
