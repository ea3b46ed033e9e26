# SPDX-License-Identifier: Apache-2.0
"""From a batch to the tensors of a step: what the ranks keep by slot, and one copy to the device a step.

In two moves, so that a CUDA graph can begin between them: `upload` brings what only the host knows to the
device, at addresses that depend on the batch's shape alone; `assemble` makes the model's inputs of it by
work on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yalis.attention import AttentionMetadata
from yalis.core import Batch, NewBlocks
from yalis.staging import Staging


@dataclass(frozen=True, order=True)
class StepShape:
    """What a batch is padded to, for a graph to serve it.

    Decodes only have as many tokens as sequences, and padding is a sequence of one token. Where there
    `are_chunks` too, padding is a sequence without tokens, and a token without a sequence.
    """

    num_tokens: int
    num_seqs: int
    are_chunks: bool


@dataclass(frozen=True)
class Uploaded:
    """A batch on the device, int32. Rows of sequences as in the batch, with padding behind."""

    num_decodes: int  # 0 where a padded batch has chunks: there it changes from one to the next
    max_query_len: int
    max_seq_len: int
    slots: Tensor
    positions: Tensor  # of each new token
    query_starts: Tensor
    seq_lens: Tensor
    cache_indices: Tensor
    drawing_slots: Tensor
    # Of each new token, -1 for the last that its slot drew; None: all are that.
    token_ids: Tensor | None = None
    drawing_rows: Tensor | None = None  # of the new tokens; None when every one draws


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
        self._padding_index = num_blocks * block_size
        self._max_model_len = max_model_len
        width = -(-max_model_len // block_size)
        # The host's copy is where cache indices are looked up, the device's what attention reads.
        self._tables = np.full((max_num_seqs + 1, width), num_blocks, np.int32)
        self._device_tables = torch.from_numpy(self._tables).to(device, copy=True)
        self._last_token_ids = torch.zeros(max_num_seqs + 1, dtype=torch.int32, device=device)
        num_seqs, num_tokens = max_num_seqs + 1, max(max_num_tokens, max_num_seqs + 1)
        self._staging = Staging(3 * num_tokens + 6 * num_seqs, 8, device)
        self._table_staging = Staging(2 * num_seqs, 2, device)

    def upload(self, batch: Batch, shape: StepShape | None = None) -> Uploaded:
        """Bring a batch to the device, padded to `shape`."""
        self._extend_tables(batch.new_blocks)
        num_seqs = len(batch.slots)
        are_chunks = shape.are_chunks if shape else batch.num_decodes < num_seqs
        slots, num_cached = np.array(batch.slots, np.int32), np.array(batch.num_cached, np.int32)
        num_new = np.ones(num_seqs, np.int32)
        num_new[batch.num_decodes :] = batch.num_new
        is_drawing = np.ones(num_seqs, bool)
        is_drawing[batch.num_decodes :] = batch.is_drawing
        if shape:
            slots = _padded(slots, shape.num_seqs, self._padding_slot)
            num_cached = _padded(num_cached, shape.num_seqs, 0)
            num_new = _padded(num_new, shape.num_seqs, 0 if are_chunks else 1)
            is_drawing = _padded(is_drawing, shape.num_seqs, not are_chunks)
        seq_lens = num_cached + num_new
        query_starts = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(num_new, out=query_starts[1:])
        seq = np.repeat(np.arange(len(slots)), num_new) if are_chunks else slice(None)
        positions = num_cached
        if are_chunks:
            positions = np.arange(query_starts[-1]) + (num_cached - query_starts[:-1])[seq]
        blocks = self._tables[slots[seq], positions // self._block_size]
        cache_indices = blocks * self._block_size + positions % self._block_size
        drawing_slots = slots[is_drawing]
        if are_chunks:
            token_ids = np.array((-1,) * batch.num_decodes + batch.token_ids, np.int32)
            drawing_rows = query_starts[1:][is_drawing] - 1
        if shape and are_chunks:
            positions = _padded(positions, shape.num_tokens, 0)
            cache_indices = _padded(cache_indices, shape.num_tokens, self._padding_index)
            token_ids = _padded(token_ids, shape.num_tokens, 0)
            drawing_rows = _padded(drawing_rows, shape.num_seqs, 0)
            drawing_slots = _padded(drawing_slots, shape.num_seqs, self._padding_slot)
        arrays = {
            "slots": slots,
            "positions": positions,
            "query_starts": query_starts,
            "seq_lens": seq_lens,
            "cache_indices": cache_indices,
            "drawing_slots": drawing_slots,
        }
        if are_chunks:
            arrays |= {"token_ids": token_ids, "drawing_rows": drawing_rows}
        num_decodes, max_query_len = batch.num_decodes, int(num_new.max())
        if shape:
            num_decodes = 0 if are_chunks else shape.num_seqs
            max_query_len = shape.num_tokens if are_chunks else 1
        return Uploaded(
            num_decodes=num_decodes,
            max_query_len=max_query_len,
            max_seq_len=self._max_model_len if shape else int(seq_lens.max()),
            **dict(zip(arrays, self._staging.upload([*arrays.values()]), strict=True)),
        )

    def assemble(self, uploaded: Uploaded) -> StepInputs:
        """The model's inputs, by device work that can be captured in a graph."""
        slots, known = uploaded.slots, uploaded.token_ids
        if known is None:
            token_ids = self._last_token_ids[slots]
        else:
            # Decodes come first, so that a sequence's index is its token's; it has one at least.
            head, rest = known[: len(slots)], known[len(slots) :]
            last = self._last_token_ids[slots[: len(known)]]
            token_ids = torch.cat((torch.where(head < 0, last, head), rest))
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
                block_tables=self._device_tables[:, :width].index_select(0, slots),
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


def _padded(array: NDArray[Any], length: int, value: int | bool) -> NDArray[Any]:
    padded = np.full(length, value, array.dtype)  # np.pad takes ten times as long
    padded[: len(array)] = array
    return padded
