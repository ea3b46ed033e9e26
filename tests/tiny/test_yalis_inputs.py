"""A padded batch is the batch, at the same place for a shape, and its padding belongs to nobody."""

from __future__ import annotations

import random
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from yalis.core import Batch, NewBlocks
from yalis.graphs import chunk_shapes, decode_shapes
from yalis.inputs import InputPreparer, Uploaded

MAX_SEQS, MAX_TOKENS, MAX_LEN, SIZE = 6, 40, 30, 4
WIDTH = -(-MAX_LEN // SIZE)
NUM_BLOCKS = MAX_SEQS * WIDTH
SHAPES = sorted([*decode_shapes(MAX_SEQS), *chunk_shapes(MAX_SEQS, MAX_TOKENS)])


def preparer() -> InputPreparer:
    """Every slot has its blocks, and has drawn a token."""
    inputs = InputPreparer(
        max_num_seqs=MAX_SEQS,
        max_num_tokens=MAX_TOKENS,
        max_model_len=MAX_LEN,
        block_size=SIZE,
        num_blocks=NUM_BLOCKS,
        device=torch.device("cpu"),
    )
    tables = tuple(
        NewBlocks(slot, 0, tuple(range(slot * WIDTH, slot * WIDTH + WIDTH)))
        for slot in range(MAX_SEQS)
    )
    inputs.upload(Batch(0, (0,), (0,), (1,), (5,), (True,), new_blocks=tables))
    inputs.remember(torch.arange(MAX_SEQS), torch.arange(100, 100 + MAX_SEQS))
    return inputs


def any_batch(draw: random.Random) -> Batch:
    slots = draw.sample(range(MAX_SEQS), draw.randint(1, MAX_SEQS))
    num_decodes = draw.randint(0, len(slots))
    cached, new, left = [], [], MAX_TOKENS - len(slots)
    for idx in range(len(slots)):
        cached.append(draw.randrange(MAX_LEN))
        if idx >= num_decodes:
            more = draw.choice([0, draw.randint(0, min(left, MAX_LEN - cached[-1] - 1))])
            left -= more
            new.append(1 + more)
    tokens = tuple(draw.randrange(99) for _ in range(sum(new)))
    drawing = tuple(draw.random() < 0.5 for _ in new)
    return Batch(num_decodes, tuple(slots), tuple(cached), tuple(new), tokens, drawing)


def places(uploaded: Uploaded) -> dict[str, Any]:
    return {
        name: (value.data_ptr(), len(value)) if isinstance(value, Tensor) else value
        for name, value in vars(uploaded).items()
    }


@pytest.mark.parametrize("seed", range(60))
def test_a_padded_batch_is_the_batch(seed: int) -> None:
    draw = random.Random(seed)
    batch = any_batch(draw)
    plain, padding = preparer(), preparer()
    captured = {shape: places(padding.upload(Batch(0, (), ()), shape)) for shape in SHAPES}
    num_seqs, num_tokens = len(batch.slots), batch.num_decodes + sum(batch.num_new)
    num_draws = batch.num_draws
    shape = draw.choice(
        [
            s
            for s in SHAPES
            if s.num_tokens >= num_tokens
            and s.num_seqs >= num_seqs
            and (s.are_chunks or not batch.num_new)
        ]
    )
    wanted = plain.assemble(plain.upload(batch))
    uploaded = padding.upload(batch, shape)
    assert places(uploaded) == captured[shape]
    found = padding.assemble(uploaded)
    at, want = found.attention, wanted.attention
    assert want.max_query_len == max((*batch.num_new, *(1,) * bool(batch.num_decodes)))
    assert want.max_query_len <= at.max_query_len
    assert want.num_decodes == batch.num_decodes
    assert at.num_decodes == (0 if shape.are_chunks else shape.num_seqs)
    assert want.max_seq_len == want.seq_lens.max() <= at.max_seq_len
    assert torch.equal(found.token_ids[:num_tokens], wanted.token_ids)
    assert torch.equal(found.positions[:num_tokens], wanted.positions)
    assert torch.equal(at.cache_indices[:num_tokens], want.cache_indices)
    assert torch.equal(at.query_starts[: num_seqs + 1], want.query_starts)
    assert torch.equal(at.seq_lens[:num_seqs], want.seq_lens)
    assert torch.equal(at.block_tables[:num_seqs, : want.block_tables.shape[1]], want.block_tables)
    assert torch.equal(found.drawing_slots[:num_draws], wanted.drawing_slots)
    ends = accumulate((*(1,) * batch.num_decodes, *batch.num_new))
    are_drawing = (*(True,) * batch.num_decodes, *batch.is_drawing)
    rows = [end - 1 for end, is_drawing in zip(ends, are_drawing, strict=True) if is_drawing]
    for step in (found, wanted):
        assert rows == (
            rows if step.drawing_rows is None else step.drawing_rows[:num_draws].tolist()
        )

    # What is behind is nobody's.
    for rows_of in (found.token_ids, found.positions, at.cache_indices):
        assert len(rows_of) == shape.num_tokens
    assert len(at.seq_lens) == shape.num_seqs
    assert (at.cache_indices[num_tokens:] == NUM_BLOCKS * SIZE).all()
    assert not found.positions[num_tokens:].any()
    assert (at.block_tables[num_seqs:] == NUM_BLOCKS).all()
    assert (found.drawing_slots[num_draws:] == MAX_SEQS).all()
    assert (at.query_starts.diff()[num_seqs:] == (0 if shape.are_chunks else 1)).all()
    assert (at.seq_lens[num_seqs:] == at.query_starts.diff()[num_seqs:]).all()
    padding.remember(found.drawing_slots, torch.arange(len(found.drawing_slots)))
    plain.remember(wanted.drawing_slots, torch.arange(num_draws))
    assert torch.equal(padding._last_token_ids[:-1], plain._last_token_ids[:-1])
