# SPDX-License-Identifier: Apache-2.0
"""How many blocks of cache a rank can have."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from yalis.attention import CacheShape
from yalis.config import ModelConfig
from yalis.errors import ConfigError
from yalis.options import EngineOptions

_CPU_BYTES = 4 << 30


def cache_bytes(
    options: EngineOptions,
    device: torch.device,
    warm_up: Callable[[], None],
    graph_bytes: Callable[[], int],
) -> int:
    """The memory for this rank's cache: what was asked for, or on a GPU what the rest leaves free.

    `warm_up` runs steps, the largest among them, and `graph_bytes` says what CUDA graphs will take, so that
    room is left for both. Called on CUDA only.
    """
    if device.type != "cuda":
        return options.kv_cache_memory_bytes or _CPU_BYTES
    torch.cuda.reset_peak_memory_stats(device)
    warm_up()
    if options.kv_cache_memory_bytes is not None:
        return options.kv_cache_memory_bytes
    torch.cuda.synchronize(device)
    stats = torch.cuda.memory_stats(device)
    held, peak = stats["allocated_bytes.all.current"], stats["allocated_bytes.all.peak"]
    for_graphs = graph_bytes()
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    # What others have, and CUDA itself, is neither free nor ours.
    budget = options.gpu_memory_utilization * total - (total - free) - (peak - held) - for_graphs
    return max(0, int(budget))


def num_blocks_in(
    num_bytes: int, shape: CacheShape, options: EngineOptions, model: ModelConfig
) -> int:
    """How many blocks fit, but no more than can ever be used at once. Raises ConfigError when none does."""
    # One more block, never handed out, takes what rows that pad a batch store.
    fitting = num_bytes // shape.bytes_per_block - 1
    if fitting < 1:
        raise ConfigError(
            f"the cache may take {num_bytes} bytes on a rank, but two blocks of {shape.block_size} "
            f"tokens need {2 * shape.bytes_per_block}; raise kv_cache_memory_bytes or "
            "gpu_memory_utilization, or use more ranks"
        )
    per_sequence = -(-options.resolved_max_model_len(model) // shape.block_size)
    return min(fitting, options.max_num_seqs * per_sequence)
