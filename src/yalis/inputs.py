# SPDX-License-Identifier: Apache-2.0
"""From a batch to the tensors of a step: what the ranks keep by slot, and one copy to the device a step.

In two moves, so that a CUDA graph can begin between them: `upload` brings what only the host knows to the
device, at addresses that depend on the batch's shape alone; `assemble` makes the model's inputs of it by
work on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yalis.attention import AttentionMetadata
from yalis.core import Batch, NewBlocks
from yalis.staging import Staging

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Uploaded:
    """A batch on the device, int32. Rows of sequences as in the batch, with padding behind."""

    num_decodes: int
    max_query_len: int
    max_seq_len: int
    slots: Tensor
    positions: Tensor  # of each new token
    query_starts: Tensor
    seq_lens: Tensor
    cache_indices: Tensor
    chunk_token_ids: Tensor
    drawing_rows: Tensor | None  # of the new tokens; None when every one draws
    drawing_slots: Tensor


@dataclass(frozen=True)
class StepInputs:
    """What a model's forward takes, `[num_tokens]` int32 each, and which rows and slots draw."""

    token_ids: Tensor
    positions: Tensor
    attention: AttentionMetadata
    drawing_rows: Tensor | None
    drawing_slots: Tensor


class InputPreparer:
    """Keeps block tables and last drawn tokens by slot.

    One slot and one block more than the scheduler hands out belong to rows that pad a batch.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        max_model_len: int,
        block_size: int,
        num_blocks: int,
        device: torch.device,
    ) -> None:
        self._block_size, self._padding_slot = block_size, max_num_seqs
        self._max_model_len = max_model_len
        width = -(-max_model_len // block_size)
        # The host's copy is what places are looked up in, the device's what attention reads.
        self._tables = np.full((max_num_seqs + 1, width), num_blocks, np.int32)
        self._device_tables = torch.from_numpy(self._tables).to(device, copy=True)
        self._last_token_ids = torch.zeros(max_num_seqs + 1, dtype=torch.int32, device=device)
        num_seqs, num_tokens = max_num_seqs + 1, max(max_num_tokens, max_num_seqs + 1)
        self._staging = Staging(3 * num_tokens + 5 * num_seqs, 8, device)
        self._table_staging = Staging(2 * num_seqs, 2, device)

    def upload(self, batch: Batch, *, num_rows: int | None = None) -> Uploaded:
        """Bring a batch to the device. `num_rows` pads one that has decodes only to so many."""
        self._extend_tables(batch.new_blocks)
        num_decodes, num_seqs = batch.num_decodes, len(batch.slots)
        slots, num_cached = np.array(batch.slots, np.int32), np.array(batch.num_cached, np.int32)
        if num_rows is not None:
            assert num_seqs == num_decodes <= num_rows
            padding = (0, num_rows - num_seqs)
            slots = np.pad(slots, padding, constant_values=self._padding_slot)
            num_cached = np.pad(num_cached, padding)
            num_decodes = num_seqs = num_rows
        num_new = np.ones(num_seqs, np.int32)
        num_new[num_decodes:] = batch.num_new
        seq_lens = num_cached + num_new
        query_starts = np.zeros(num_seqs + 1, np.int32)
        np.cumsum(num_new, out=query_starts[1:])
        has_chunks = num_decodes < num_seqs
        seq = np.repeat(np.arange(num_seqs), num_new) if has_chunks else slice(None)
        positions = num_cached
        if has_chunks:
            positions = np.arange(query_starts[-1]) + (num_cached - query_starts[:-1])[seq]
        blocks = self._tables[slots[seq], positions // self._block_size]
        is_drawing = np.ones(num_seqs, bool)
        is_drawing[num_decodes:] = batch.is_drawing
        parts = [
            slots,
            positions,
            query_starts,
            seq_lens,
            blocks * self._block_size + positions % self._block_size,
            np.array(batch.token_ids, np.int32),
            query_starts[1:][is_drawing] - 1 if has_chunks else np.empty(0, np.int32),
            slots[is_drawing],
        ]
        (
            slots_,
            positions_,
            starts_,
            lens_,
            cache_,
            chunks_,
            rows_,
            drawing_,
        ) = self._staging.upload(parts)
        return Uploaded(
            num_decodes=num_decodes,
            max_query_len=int(num_new.max()),
            max_seq_len=int(seq_lens.max()) if num_rows is None else self._max_model_len,
            slots=slots_,
            positions=positions_,
            query_starts=starts_,
            seq_lens=lens_,
            cache_indices=cache_,
            chunk_token_ids=chunks_,
            drawing_rows=rows_ if has_chunks else None,
            drawing_slots=drawing_,
        )

    def assemble(self, uploaded: Uploaded) -> StepInputs:
        """The model's inputs, by device work that can be captured in a graph."""
        token_ids = self._last_token_ids[uploaded.slots[: uploaded.num_decodes]]
        if len(uploaded.chunk_token_ids):
            token_ids = torch.cat((token_ids, uploaded.chunk_token_ids))
        width = -(-uploaded.max_seq_len // self._block_size)
        return StepInputs(
            token_ids=token_ids,
            positions=uploaded.positions,
            attention=AttentionMetadata(
                num_decodes=uploaded.num_decodes,
                max_query_len=uploaded.max_query_len,
                max_seq_len=uploaded.max_seq_len,
                query_starts=uploaded.query_starts,
                seq_lens=uploaded.seq_lens,
                block_tables=self._device_tables[:, :width].index_select(0, uploaded.slots),
                cache_indices=uploaded.cache_indices,
            ),
            drawing_rows=uploaded.drawing_rows,
            drawing_slots=uploaded.drawing_slots,
        )

    def remember(self, slots: Tensor, token_ids: Tensor) -> None:
        """Keep what the slots have drawn, for their next step. Capturable."""
        # An invalid token stands for its request's end; one more step of it may be under way.
        self._last_token_ids.index_copy_(0, slots.long(), token_ids.clamp(min=0).int())

    def _extend_tables(self, new_blocks: tuple[NewBlocks, ...]) -> None:
        if not new_blocks:
            return
        width = self._tables.shape[1]
        places, blocks = [], []
        for new in new_blocks:
            first, last = new.first_idx, new.first_idx + len(new.blocks)
            self._tables[new.slot, first:last] = new.blocks
            places.append(np.arange(first, last, dtype=np.int32) + new.slot * width)
            blocks.append(np.array(new.blocks, np.int32))
        places_, blocks_ = self._table_staging.upload(
            [np.concatenate(places), np.concatenate(blocks)]
        )
        self._device_tables.view(-1).index_copy_(0, places_.long(), blocks_)
