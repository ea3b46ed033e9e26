"""The GPU's attention backend in Triton's interpreter: the same outputs as torch's, whatever the batch."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from yalis.attention import AttentionBackend, AttentionLayer, CacheShape
from yalis.attention.paged import PagedAttention
from yalis.attention.sdpa import SdpaAttention
from yalis.core import Batch, NewBlocks
from yalis.inputs import InputPreparer, StepShape

CPU = torch.device("cpu")
NUM_HEADS, SHAPE = 6, CacheShape(2, 2, 16, 4, torch.float32)
MAX_LEN, NUM_BLOCKS, MAX_SEQS = 40, 60, 5


def preparer() -> InputPreparer:
    return InputPreparer(
        max_num_seqs=MAX_SEQS,
        max_num_tokens=200,
        max_model_len=MAX_LEN,
        block_size=SHAPE.block_size,
        num_blocks=NUM_BLOCKS,
        device=CPU,
    )


def batches() -> list[tuple[Batch, StepShape | None]]:
    """Prompts whole and in chunks, decodes beside them and alone; the last of both padded."""
    draw = random.Random(0)
    blocks = draw.sample(range(NUM_BLOCKS), MAX_SEQS * 10)
    tables = tuple(NewBlocks(s, 0, tuple(blocks[10 * s : 10 * s + 10])) for s in range(MAX_SEQS))
    return [
        (
            Batch(0, (0, 1, 2), (0, 0, 0), (9, 1, 17), (1,) * 27, (True,) * 3, new_blocks=tables),
            None,
        ),
        (Batch(2, (0, 1, 2, 3), (9, 1, 17, 0), (3, 5), (1,) * 8, (False, True)), None),
        (Batch(1, (1, 2, 3), (2, 20, 5), (4, 1), (1,) * 5, (True,) * 2), StepShape(16, 4, True)),
        (Batch(3, (1, 0, 3), (2, 10, 5)), None),
        (Batch(2, (3, 0), (6, 11)), StepShape(4, 4, False)),
    ]


def outputs(
    backend: AttentionBackend, layer: AttentionLayer, are_chunks_padded: bool
) -> list[Tensor]:
    inputs, found = preparer(), []
    generator = torch.Generator().manual_seed(0)
    for batch, shape in batches():
        if shape and shape.are_chunks and not are_chunks_padded:
            continue
        step = inputs.assemble(inputs.upload(batch, shape))
        num_tokens, dim = len(step.positions), SHAPE.head_dim
        # As the model's product lays them, k and v strided beside q.
        num_all = NUM_HEADS + 2 * SHAPE.num_kv_heads
        heads = torch.randn(num_tokens, num_all, dim, generator=generator)
        q, k, v = heads.split([NUM_HEADS, SHAPE.num_kv_heads, SHAPE.num_kv_heads], dim=1)
        angles = torch.outer(step.positions.float(), torch.arange(1, dim // 2 + 1) / 7)
        cos, sin = torch.stack((angles.cos(), angles.sin()), dim=1).unbind(dim=1)
        attended = backend.prepare(step.attention)(layer, q, k, v, cos, sin)
        assert attended.is_contiguous()
        found.append(attended[: batch.num_decodes + sum(batch.num_new)])
    return found


@pytest.mark.parametrize(
    ("has_qk_norm", "window", "is_batch_invariant"),
    [(False, None, False), (True, None, False), (False, 5, False), (True, 5, True)],
)
def test_outputs_are_those_of_torch(
    has_qk_norm: bool, window: int | None, is_batch_invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [1 + torch.arange(16) / 16, 2 - torch.arange(16) / 16] if has_qk_norm else [None] * 2
    layer = AttentionLayer(1, window, q_weight=weights[0], k_weight=weights[1], eps=1e-5)
    paged = PagedAttention(
        SHAPE,
        NUM_BLOCKS + 1,
        CPU,
        num_heads=NUM_HEADS,
        max_num_seqs=MAX_SEQS,
        max_model_len=MAX_LEN,
        windows=(None, 5),
        is_batch_invariant=is_batch_invariant,
    )
    monkeypatch.setattr("yalis.attention.paged._MOST_TOKENS", 8)  # several portions
    wanted = outputs(SdpaAttention(SHAPE, NUM_BLOCKS + 1, CPU), layer, not is_batch_invariant)
    for found, theirs in zip(outputs(paged, layer, not is_batch_invariant), wanted, strict=True):
        torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)
