# SPDX-License-Identifier: Apache-2.0
"""Computes batches in this process: one rank's runner, and its steps under way."""

from __future__ import annotations

from collections import deque
from typing import Any

from yalis.core import Batch, StepResult
from yalis.drawing import PendingStep
from yalis.engine import Executor
from yalis.options import EngineOptions
from yalis.runner import Runner


class LocalExecutor(Executor):
    """On a CPU `submit` runs the step. With several ranks every method is collective, as the runner's are."""

    def __init__(self, options: EngineOptions, runner: Runner) -> None:
        self.runner, self.num_blocks = runner, runner.num_blocks
        self.depth = options.depth(is_asynchronous=runner.is_asynchronous)
        self._under_way: deque[PendingStep] = deque()

    def submit(self, batch: Batch) -> None:
        self._under_way.append(self.runner.execute(batch))

    def result(self) -> StepResult:
        return self._under_way.popleft().wait()

    def drain(self) -> None:
        # None must be left for a later step, though a second interrupt ends the waiting.
        under_way, self._under_way = self._under_way, deque()
        for pending in under_way:
            pending.wait()

    def use_all_reduce(self, name: str) -> None:
        self.runner.use_all_reduce(name)

    def describe_all_reduce(self) -> dict[str, Any]:
        return self.runner.describe_all_reduce()

    def close(self) -> None:
        self.runner.close()
