# SPDX-License-Identifier: Apache-2.0
"""Who computes the batches: this process, the group that a launcher made, or workers of our own."""

from __future__ import annotations

from typing import Any

import torch

from yalis.config import ModelConfig
from yalis.core import Batch
from yalis.engine import Executor
from yalis.options import EngineOptions
from yalis.parallel.group import TensorParallel
from yalis.runner import Runner
from yalis.weights.loader import Progress


def make_executor(
    options: EngineOptions, config: ModelConfig, on_progress: Progress | None
) -> Executor:
    return LocalExecutor(Runner(options, config, TensorParallel.single(), torch.device("cpu")))


class LocalExecutor:
    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def execute(self, batch: Batch) -> list[int]:
        return self.runner.execute(batch)

    def agree(self, digest: bytes) -> None:
        pass

    def describe_all_reduce(self) -> dict[str, Any]:
        return self.runner.describe_all_reduce()

    def close(self) -> None:
        self.runner.close()
