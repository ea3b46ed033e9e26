# SPDX-License-Identifier: Apache-2.0
"""What a step must read and compute, from the model's shape; and how fast this device reads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from yalis.config import ModelConfig
from yalis.models.decoder import CausalLM
from yalis.parallel.all_reduce import NoAllReduce
from yalis.parallel.group import Placement, TensorParallel
from yalis.parallel.split import kv_head_split

_PROBE_BYTES = 1 << 30
_CPU_PROBE_BYTES = 1 << 28
_NUM_READS = 8  # between looks at the clock, which would weigh on one


@dataclass(frozen=True)
class Work:
    """One rank's share. FLOPs count a multiplication and an addition each."""

    weight_bytes: int  # read by every decode step: all weights, but of the embedding only some rows
    kv_bytes_per_token: int  # of context, read for each sequence
    flops_per_token: (
        int  # of a prompt, in matrix products; logits are wanted of the last token only
    )
    attention_flops_per_pair: int  # of a token and one that it sees

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype, num_ranks: int) -> Work:
        """The share of rank 0, which no rank's exceeds."""
        at = Placement(TensorParallel(0, num_ranks, NoAllReduce()), dtype, torch.device("meta"))
        model = CausalLM(config, at)
        parameters = dict(model.named_parameters())  # a tied head is the embedding, listed once
        if not config.tie_word_embeddings:
            del parameters["model.embed_tokens.weight"]
        layers = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
        num_kv_heads = len(kv_head_split(config.num_key_value_heads, num_ranks, 0))
        num_heads = config.num_attention_heads // num_ranks
        per_layer = config.head_dim * config.num_hidden_layers
        return cls(
            weight_bytes=sum(p.nbytes for p in parameters.values()),
            kv_bytes_per_token=2 * num_kv_heads * per_layer * dtype.itemsize,
            flops_per_token=2 * layers,
            attention_flops_per_pair=4 * num_heads * per_layer,
        )

    def decode_bytes(self, batch_size: int, context: float) -> float:
        """What a step reads for so many sequences of that many tokens on average."""
        return self.weight_bytes + batch_size * context * self.kv_bytes_per_token

    def prefill_flops(self, lengths: Sequence[int]) -> int:
        """To compute prompts of these lengths."""
        pairs = sum(n * (n + 1) // 2 for n in lengths)
        return sum(lengths) * self.flops_per_token + pairs * self.attention_flops_per_pair


@torch.inference_mode()
def measured_read_gbps(device: torch.device, dtype: torch.dtype) -> float:
    """GB/s at which a matrix-vector product reads a matrix larger than any cache; the best of a few."""
    num_columns = 8192
    num_bytes = _PROBE_BYTES if device.type == "cuda" else _CPU_PROBE_BYTES
    matrix = torch.ones(
        num_bytes // dtype.itemsize // num_columns, num_columns, dtype=dtype, device=device
    )
    vector = torch.ones(num_columns, dtype=dtype, device=device)
    best_s = float("inf")
    for _ in range(5):
        start_s = time.perf_counter()
        for _ in range(_NUM_READS):
            torch.mv(matrix, vector)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - start_s)
    return _NUM_READS * num_bytes / best_s / 1e9
