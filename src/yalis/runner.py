# SPDX-License-Identifier: Apache-2.0
"""One rank's model, cache and sampler: computes a batch. Thinks in tensors, knows no requests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from yalis.attention.sdpa import SdpaAttention
from yalis.config import ModelConfig
from yalis.core import Batch
from yalis.models.decoder import CausalLM
from yalis.options import EngineOptions
from yalis.parallel.group import Placement, TensorParallel
from yalis.parallel.split import kv_head_split
from yalis.sampler import Sampler
from yalis.weights.checkpoint import Checkpoint
from yalis.weights.dummy import DummyWeights
from yalis.weights.loader import Progress, WeightSource, check_weights, load_weights


class Runner:
    """Construction loads this rank's weights. With several ranks every method is collective."""

    def __init__(
        self,
        options: EngineOptions,
        config: ModelConfig,
        tp: TensorParallel,
        device: torch.device,
        on_progress: Progress | None = None,
    ) -> None:
        dtype = getattr(torch, options.resolved_dtype(config))
        self._tp, self._device = tp, device
        self.model = CausalLM(config, Placement(tp, dtype, device))
        load_weights(self.model, open_weights(options), on_progress)
        self.sampler = Sampler(options.max_num_seqs, config.vocab_size, device)
        self.attention = SdpaAttention(
            config.num_hidden_layers,
            options.num_cache_tokens(config),
            len(kv_head_split(config.num_key_value_heads, tp.size, tp.rank)),
            config.head_dim,
            dtype,
            device,
        )

    @torch.inference_mode()
    def execute(self, batch: Batch) -> list[int]:
        """The next token of each sequence, on rank 0; an empty list elsewhere."""
        hidden = self.forward(batch)
        last = torch.tensor(batch.num_new, device=self._device).cumsum(0) - 1
        logits = self.model.compute_logits(hidden[last])
        if logits is None:
            return []
        return self.sampler.sample(logits, batch.draws).token_ids.tolist()

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """`[num_tokens, hidden]`: the last layer's normalised output for every new token."""
        positions = [
            position
            for num_new, num_cached in zip(batch.num_new, batch.num_cached, strict=True)
            for position in range(num_cached, num_cached + num_new)
        ]
        hidden: Tensor = self.model(
            torch.tensor(batch.token_ids, device=self._device),
            torch.tensor(positions, device=self._device),
            self.attention.prepare(batch),
        )
        return hidden

    def describe_all_reduce(self) -> dict[str, Any]:
        return self._tp.all_reduce.describe()

    def close(self) -> None:
        self._tp.all_reduce.close()


def open_weights(options: EngineOptions) -> WeightSource:
    if options.load_format == "dummy":
        return DummyWeights(options.seed)
    return Checkpoint(options.model)


def check_checkpoint(options: EngineOptions, config: ModelConfig) -> None:
    """Raise CheckpointError unless every tensor is there in its shape. Reads headers only; one process."""
    at = Placement(TensorParallel.single(), torch.float32, torch.device("meta"))
    check_weights(CausalLM(config, at), open_weights(options))
