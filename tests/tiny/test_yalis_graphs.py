"""Which shapes of steps are captured, and which of them serves a batch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from yalis.core import Batch
from yalis.graphs import StepGraphs, chunk_shapes, decode_shapes, num_bytes_of_graphs
from yalis.inputs import StepShape
from yalis.parallel.all_reduce import AllReduceSwitch, NoAllReduce


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (20, (1, 2, 4, 8, 16, 20)),
        (1000, (1, 2, 4, *range(8, 257, 8))),
    ],
)
def test_sizes_reach_the_most_sequences_or_256(max_num_seqs: int, sizes: tuple[int, ...]) -> None:
    assert decode_shapes(max_num_seqs) == [StepShape(n, n, False) for n in sizes]


def test_chunks_are_captured_up_to_what_a_step_may_have() -> None:
    shapes = chunk_shapes(20, 100)
    assert shapes == [StepShape(n, min(n, 20), True) for n in (16, 32, 64, 96, 100)]
    assert chunk_shapes(4, 8192)[-1] == StepShape(1024, 4, True)
    assert chunk_shapes(4, 3) == [StepShape(3, 3, True)]


def test_a_batch_is_padded_to_the_next_shape() -> None:
    graphs = StepGraphs.__new__(StepGraphs)  # capturing needs a GPU
    graphs._shapes = sorted([*decode_shapes(8), *chunk_shapes(6, 64)])

    def shape(num_decodes: int, *chunks: int) -> StepShape | None:
        num_seqs = num_decodes + len(chunks)
        slots, cached, drawing = tuple(range(num_seqs)), (3,) * num_seqs, (True,) * len(chunks)
        return graphs.shape_for(
            Batch(num_decodes, slots, cached, chunks, (5,) * sum(chunks), drawing)
        )

    assert [shape(n) for n in (1, 2, 3, 5, 8)] == [StepShape(n, n, False) for n in (1, 2, 4, 8, 8)]
    assert shape(9) is None
    assert shape(0, 1) == shape(5, 11) == StepShape(16, 6, True)
    assert shape(5, 12) == StepShape(32, 6, True)
    assert shape(0, 64) == StepShape(64, 6, True)
    assert shape(1, 64) is None
    assert shape(6, 1) is None  # more sequences than there is room for
    graphs._shapes = sorted([*decode_shapes(512), *chunk_shapes(512, 8192)])
    assert shape(256) == StepShape(256, 256, False)
    assert shape(257) == StepShape(384, 384, True)
    assert shape(500, 100) == StepShape(640, 512, True)
    assert shape(500, 1000) is None


@pytest.mark.parametrize(("num_seqs", "num_bytes"), [(16, 5050), (1, 5010)])
def test_room_for_all_graphs_follows_from_two(
    num_seqs: int, num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = decode_shapes(num_seqs)
    free, seen = [1 << 30], []

    def capture(some: Sequence[StepShape]) -> Any:
        # A pool that the largest fills, each graph itself, and what is taken once.
        free[0] -= 5000 + 10 * len(some) + (700 if not seen else 0)
        seen.append(tuple(some))

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 1 << 40))
    found = num_bytes_of_graphs(shapes, capture, torch.device("cuda", 0))
    assert found == num_bytes
    assert {some[-1] for some in seen} == {shapes[-1]}


def test_what_is_captured_is_what_the_chosen_all_reduce_takes() -> None:
    class Small(NoAllReduce):
        @property
        def max_bytes(self) -> int:
            return 5

    switch = AllReduceSwitch({"small": Small(), "any": NoAllReduce()}.__getitem__, "small")
    assert switch.max_bytes == 5
    switch.choose("any")
    assert switch.max_bytes == sys.maxsize
