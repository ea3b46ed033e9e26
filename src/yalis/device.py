# SPDX-License-Identifier: Apache-2.0
"""Which device a rank works on."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch

from yalis.errors import ConfigError


def device_type(name: str) -> str:
    """The type of device that ranks of this host work on. "auto" is CUDA where there is one."""
    return "cpu" if name == "cpu" or (name == "auto" and not torch.cuda.is_available()) else "cuda"


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of the rank that is `local_rank`-th on its host."""
    if device_type(name) == "cpu":
        return torch.device("cpu")
    require_gpus(local_rank + 1)
    return torch.device("cuda", local_rank)


def require_gpus(num_local_ranks: int) -> None:
    """Raise ConfigError when this host has fewer GPUs than ranks."""
    count = torch.cuda.device_count()
    if not count:
        raise ConfigError('device is "cuda", and torch sees no GPU on this host; set device="cpu"')
    if count < num_local_ranks:
        raise ConfigError(
            f"{num_local_ranks} ranks on this host need a GPU each, and it has {count}; lower "
            'tensor_parallel_size or set device="cpu"'
        )


@cache
def has_kernels() -> bool:
    """Whether `yalis.kernels` can be imported. Says once what it means where it cannot."""
    if importlib.util.find_spec("triton") is not None:
        return True
    logging.getLogger("yalis").warning(
        "triton is not installed, so torch's own operations and no CUDA graphs are used, which is several "
        "times slower; pip install triton"
    )
    return False
