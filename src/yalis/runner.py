# SPDX-License-Identifier: Apache-2.0
"""One rank's model and cache: computes batches. Thinks in tensors, knows no requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from yalis.attention import AttentionBackend, AttentionMetadata, CacheShape, one_token_each
from yalis.attention.choice import make_attention
from yalis.config import ModelConfig
from yalis.core import Batch, NewBlocks
from yalis.drawing import Drawing, Drawn, PendingStep
from yalis.graphs import Computed, StepGraphs, chunk_shapes, decode_shapes, num_bytes_of_graphs
from yalis.inputs import InputPreparer, StepInputs, StepShape, Uploaded
from yalis.memory import cache_bytes, num_blocks_in
from yalis.models.decoder import CausalLM
from yalis.options import EngineOptions
from yalis.parallel.group import Placement, TensorParallel
from yalis.parallel.split import kv_head_split
from yalis.trace import trace_on
from yalis.weights.checkpoint import Checkpoint
from yalis.weights.dummy import DummyWeights
from yalis.weights.loader import Progress, WeightSource, check_weights, load_weights

_FEW_TOKENS = (1, 2, 4, 8, 16, 32, 64)


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
        self._options, self._config, self._tp, self._device = options, config, tp, device
        self.is_asynchronous = device.type == "cuda"  # `execute` returns before it has run
        self._trace = trace_on(device.type)
        # Rotations are kept for as many positions as a request may have, and no more.
        shape = replace(config, max_position_embeddings=options.resolved_max_model_len(config))
        # A collective waits less long than a slow rank may read.
        with tp.together("loading weights"):
            self.model = CausalLM(shape, Placement(tp, dtype, device, options.batch_invariant))
            load_weights(self.model, open_weights(options), on_progress)
            tp.all_reduce.warm_up(dtype)
        self._cache_shape = CacheShape(
            num_layers=config.num_hidden_layers,
            num_kv_heads=len(kv_head_split(config.num_key_value_heads, tp.size, tp.rank)),
            head_dim=config.head_dim,
            block_size=options.block_size,
            dtype=dtype,
        )
        self._drawing = Drawing(
            tp, self.model.lm_head, options.max_num_seqs, config.vocab_size, device
        )
        num_bytes = cache_bytes(options, device, self._warm_up, self._graph_bytes)
        num_bytes = tp.minimum(num_bytes, device)
        self.num_blocks = num_blocks_in(num_bytes, self._cache_shape, options, config)
        self._attention, self._inputs = self._make_cache(self.num_blocks)
        self._graphs_by_all_reduce: dict[str, StepGraphs] = {}
        self._graphs = self._captured(options.all_reduce, on_progress)

    @torch.inference_mode()
    def execute(self, batch: Batch) -> PendingStep:
        """Compute a step; returns before it has run where `is_asynchronous`. Its tokens are every rank's to
        wait for, the log probabilities rank 0's.
        """
        # What ranks other than 0 learn of a peer that is gone: nobody waits for their results.
        self._tp.all_reduce.check()
        shape = self._graphs.shape_for(batch) if self._graphs else None
        with self._trace("prepare"):
            self._drawing.admit(batch.admissions)
            uploaded = self._inputs.upload(batch, shape)
        if self._graphs is not None and shape is not None:
            with self._trace("replay"):
                computed = self._graphs.replay(shape)
            return self._finish(batch, uploaded, computed)
        with self._trace("forward"):
            inputs = self._inputs.assemble(uploaded)
            hidden = self._forward(inputs)
            share = self._share(hidden, inputs) if batch.num_draws else None
        with self._trace("sample"):
            drawn = self._drawing.draw(batch, share)
            self._inputs.remember(inputs.drawing_slots, drawn.token_ids)
            return PendingStep(drawn, self._tp.all_reduce.check)

    def compute(self, uploaded: Uploaded) -> Computed:
        """A step that draws the likeliest tokens: device work alone, to be captured."""
        inputs = self._inputs.assemble(uploaded)
        share = self._share(self._forward(inputs), inputs)
        token_ids = self._drawing.draw_likeliest(share)
        self._inputs.remember(inputs.drawing_slots, token_ids)
        return Computed(token_ids, share)

    def _finish(self, batch: Batch, uploaded: Uploaded, computed: Computed) -> PendingStep:
        """The result of a padded step."""
        num_draws = batch.num_draws
        with self._trace("sample"):
            if self._drawing.is_plain(batch):
                drawn = Drawn(computed.token_ids[:num_draws])
                return PendingStep(drawn, self._tp.all_reduce.check)
            drawn = self._drawing.draw(batch, computed.share[:num_draws] if num_draws else None)
            self._inputs.remember(uploaded.drawing_slots[:num_draws], drawn.token_ids)
            return PendingStep(drawn, self._tp.all_reduce.check)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """`[num_tokens, hidden]`: the last layer's normalised output for every new token."""
        return self._forward(self._inputs.assemble(self._inputs.upload(batch)))

    def use_all_reduce(self, name: str) -> None:
        """Sum by another backend from now on, with the same weights and cache. No step may be under way."""
        self._tp.choose_all_reduce(name)
        self._tp.all_reduce.warm_up(self._cache_shape.dtype)
        self._tp.barrier()
        self._graphs = self._captured(name)

    def describe_all_reduce(self) -> dict[str, Any]:
        return self._tp.all_reduce.describe()

    def close(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        finally:
            # The end of a group waits for graphs that have captured its calls.
            self._graphs = None
            self._graphs_by_all_reduce.clear()
            self._tp.all_reduce.close()

    def _forward(self, inputs: StepInputs) -> Tensor:
        if not self._goes_one_by_one:
            return self._compute(inputs.token_ids, inputs.positions, inputs.attention)
        # In order: a token sees those before it, of its own sequence and of one whose blocks it shares.
        one_by_one = zip(
            torch.split(inputs.token_ids, 1),
            torch.split(inputs.positions, 1),
            one_token_each(inputs.attention, 1),
            strict=True,
        )
        return torch.cat([self._compute(*token) for token in one_by_one])

    def _compute(self, token_ids: Tensor, positions: Tensor, at: AttentionMetadata) -> Tensor:
        hidden: Tensor = self.model(token_ids, positions, self._attention.prepare(at))
        return hidden

    @property
    def _goes_one_by_one(self) -> bool:
        """Whether rows of a step have the same bits as alone only if they are computed alone."""
        return self._options.batch_invariant and not self._attention.is_capturable

    def _share(self, hidden: Tensor, inputs: StepInputs) -> Tensor:
        """This rank's share of the logits of the rows that draw."""
        if inputs.drawing_rows is not None:
            hidden = hidden.index_select(0, inputs.drawing_rows)
        if self._goes_one_by_one:
            return torch.cat([self.model.lm_head(row) for row in torch.split(hidden, 1)])
        share: Tensor = self.model.lm_head(hidden)
        return share

    def _captured(self, all_reduce: str, on_progress: Progress | None = None) -> StepGraphs | None:
        """The graphs with the present all-reduce, which has this name; None where steps run eagerly."""
        if not self._uses_graphs:
            return None
        if all_reduce not in self._graphs_by_all_reduce:
            self._graphs_by_all_reduce[all_reduce] = self._capture(self._shapes, on_progress)
        return self._graphs_by_all_reduce[all_reduce]

    @property
    def _uses_graphs(self) -> bool:
        return self._attention.is_capturable and not self._options.enforce_eager

    @property
    def _shapes(self) -> list[StepShape]:
        """Of steps that are captured, ascending."""
        options = self._options
        shapes = decode_shapes(options.max_num_seqs)
        # Batch-invariant prompts attend token by token, and tokens that pad a step have no sequence.
        if not options.batch_invariant:
            row_bytes = self._config.hidden_size * self._cache_shape.dtype.itemsize
            most = self._tp.all_reduce.max_bytes // row_bytes
            most = min(options.max_num_batched_tokens, most)
            shapes += chunk_shapes(options.max_num_seqs, most) if most else []
        return sorted(shapes)

    @torch.inference_mode()
    def _capture(
        self, shapes: Sequence[StepShape], on_progress: Progress | None = None
    ) -> StepGraphs:
        return StepGraphs(shapes, self._upload_padding, self.compute, self._device, on_progress)

    def _upload_padding(self, shape: StepShape) -> Uploaded:
        """A batch of nobody's."""
        return self._inputs.upload(Batch(num_decodes=0, slots=(), num_cached=()), shape)

    def _make_cache(self, num_blocks: int) -> tuple[AttentionBackend, InputPreparer]:
        options, device = self._options, self._device
        # The last block is for rows that pad a batch.
        attention = make_attention(
            self._cache_shape,
            num_blocks + 1,
            device,
            num_heads=self._config.num_attention_heads // self._tp.size,
            max_num_seqs=options.max_num_seqs,
            max_model_len=options.resolved_max_model_len(self._config),
            windows=self._config.traits.windows,
            is_batch_invariant=options.batch_invariant,
        )
        inputs = InputPreparer(
            max_num_seqs=options.max_num_seqs,
            max_num_tokens=options.max_num_batched_tokens,
            max_model_len=options.resolved_max_model_len(self._config),
            block_size=options.block_size,
            num_blocks=num_blocks,
            device=device,
        )
        return attention, inputs

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Run steps of few tokens and the largest there can be, over a cache of one block. Collective.

        Which kernels serve follows from the number of tokens, and of decodes: from here on, all of them are
        compiled.
        """
        self._attention, self._inputs = self._make_cache(1)
        max_model_len = self._options.resolved_max_model_len(self._config)
        sizes = (*_FEW_TOKENS, self._options.max_num_batched_tokens)
        for num_tokens in (1,) if self._goes_one_by_one else sizes:
            hidden = self.forward(prompts_of(num_tokens, self._options, max_model_len))
            head = self.model.lm_head
            head.gather(head(hidden[: self._options.max_num_seqs]))
        for num_seqs in {1, self._options.max_num_seqs}:
            self.compute(self._upload_padding(StepShape(num_seqs, num_seqs, False)))
        del self._attention, self._inputs

    def _graph_bytes(self) -> int:
        """What graphs will take, by those over a cache of one block. Collective."""
        self._attention, self._inputs = self._make_cache(1)
        num_bytes = 0
        if self._uses_graphs:
            num_bytes = num_bytes_of_graphs(self._shapes, self._capture, self._device)
        del self._attention, self._inputs
        return num_bytes


def prompts_of(num_tokens: int, options: EngineOptions, max_model_len: int) -> Batch:
    """Prompts of so many tokens, or as many as a step may have, all of them in block 0."""
    num_left = min(num_tokens, options.max_num_batched_tokens)
    lengths: list[int] = []
    while num_left and len(lengths) < options.max_num_seqs:
        lengths.append(min(num_left, max_model_len))
        num_left -= lengths[-1]
    num_blocks = [-(-length // options.block_size) for length in lengths]
    return Batch(
        num_decodes=0,
        slots=tuple(range(len(lengths))),
        num_cached=(0,) * len(lengths),
        num_new=tuple(lengths),
        token_ids=(0,) * sum(lengths),
        is_drawing=(True,) * len(lengths),
        new_blocks=tuple(NewBlocks(slot, 0, (0,) * n) for slot, n in enumerate(num_blocks)),
    )


def open_weights(options: EngineOptions) -> WeightSource:
    if options.load_format == "dummy":
        return DummyWeights(options.seed)
    return Checkpoint(options.model)


def stored_dtype(options: EngineOptions) -> str:
    """The type of a checkpoint's weights, for a config.json that does not say. Raises CheckpointError."""
    return "float32" if options.load_format == "dummy" else Checkpoint(options.model).dtype


def check_checkpoint(options: EngineOptions, config: ModelConfig) -> None:
    """Raise CheckpointError unless every tensor is there in its shape, and what is tied is equal. Local.

    Reads headers only, but both matrices where a tied head is saved beside its embedding.
    """
    at = Placement(TensorParallel.single(), torch.float32, torch.device("meta"))
    check_weights(CausalLM(config, at), open_weights(options))
