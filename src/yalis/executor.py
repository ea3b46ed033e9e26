# SPDX-License-Identifier: Apache-2.0
"""Who computes the batches: this process, the group that a launcher made, or workers of our own."""

from __future__ import annotations

import os

import torch.distributed as dist

from yalis.config import ModelConfig
from yalis.device import pick_device
from yalis.engine import Executor
from yalis.errors import ConfigError
from yalis.joined import JoinedExecutor
from yalis.local import LocalExecutor
from yalis.options import EngineOptions
from yalis.parallel.group import TensorParallel
from yalis.parallel.launcher import detect
from yalis.runner import Runner
from yalis.weights.loader import Progress
from yalis.workers import WorkerGroup


def make_executor(
    options: EngineOptions, config: ModelConfig, on_progress: Progress | None
) -> Executor:
    """The executor for these options in this process. Collective under a launcher."""
    place = detect(os.environ)
    num_launched = dist.get_world_size() if dist.is_initialized() else place and place.world_size
    if num_launched and num_launched > 1:
        if num_launched != options.tensor_parallel_size:
            raise ConfigError(
                f"the launcher started {num_launched} ranks, but tensor_parallel_size is "
                f"{options.tensor_parallel_size}; make the two equal"
            )
        return JoinedExecutor(options, config, place, on_progress)
    if options.tensor_parallel_size > 1:
        return WorkerGroup(options, config, on_progress)
    device = pick_device(options.device)
    runner = Runner(options, config, TensorParallel.single(), device, on_progress)
    return LocalExecutor(options, runner)
