# SPDX-License-Identifier: Apache-2.0
"""What the driver and its workers say to each other. Each value is pickled over a private socket pair.

    driver  Start ->         Execute ->           Describe ->           UseAllReduce ->         Stop ->
    worker        <- Ready              <- Result *          <- Answer *              <- Ready         (exits)

Rank 0 alone sends what is marked with a star, and LoadProgress before Ready; any rank may send Failed at any
time, and then exits. The other ranks stay silent, so that a step costs the driver one wake-up. The driver
may send an Execute before the Result of the one before it has come; results come in order.
"""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from typing import Any

from yalis.config import ModelConfig
from yalis.core import Batch, StepResult
from yalis.errors import WorkerError
from yalis.options import EngineOptions


@dataclass(frozen=True)
class Start:
    options: EngineOptions
    config: ModelConfig


@dataclass(frozen=True)
class Execute:
    batch: Batch


@dataclass(frozen=True)
class Describe:
    pass


@dataclass(frozen=True)
class UseAllReduce:
    name: str


@dataclass(frozen=True)
class Stop:
    pass


@dataclass(frozen=True)
class LoadProgress:
    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class Ready:
    num_blocks: int  # of cache; the same on all ranks


@dataclass(frozen=True)
class Result:
    result: StepResult


@dataclass(frozen=True)
class Answer:
    value: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """A rank's last word. `at_s` is the host's monotonic clock, so that the first failure can be told
    from those that it caused on other ranks."""

    summary: str
    traceback: str
    at_s: float
    is_echo: bool = False  # it says what another rank has reported

    @classmethod
    def of(cls, error: BaseException) -> Failed:
        summary = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        text = "".join(traceback.format_exception(error))
        return cls(summary, text, time.monotonic(), isinstance(error, WorkerError))
