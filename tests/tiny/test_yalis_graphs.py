"""Which numbers of rows are captured, and which of them serves a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from yalis.core import Batch
from yalis.graphs import DecodeGraphs, capture_sizes, num_bytes_of_graphs


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
    assert capture_sizes(max_num_seqs) == sizes


def test_a_batch_of_decodes_is_padded_to_the_next_size() -> None:
    graphs = DecodeGraphs.__new__(DecodeGraphs)  # capturing needs a GPU
    graphs._sizes = [1, 2, 4, 8]

    def rows(num_decodes: int, num_chunks: int = 0) -> int | None:
        num_seqs = num_decodes + num_chunks
        slots, cached = tuple(range(num_seqs)), (3,) * num_seqs
        new, tokens = (1,) * num_chunks, (5,) * num_chunks
        return graphs.num_rows_for(
            Batch(num_decodes, slots, cached, new, tokens, (True,) * num_chunks)
        )

    assert [rows(n) for n in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]
    assert rows(9) is None
    assert rows(2, num_chunks=1) is None
    assert rows(0, num_chunks=1) is None


@pytest.mark.parametrize(("sizes", "num_bytes"), [((1, 2, 4, 8, 16), 5050), ((1,), 5010)])
def test_room_for_all_graphs_follows_from_two(
    sizes: Sequence[int], num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, seen = [1 << 30], []

    def capture(some: Sequence[int]) -> Any:
        # A pool that the largest fills, each graph itself, and what is taken once.
        free[0] -= 5000 + 10 * len(some) + (700 if not seen else 0)
        seen.append(tuple(some))

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 1 << 40))
    found = num_bytes_of_graphs(sizes, capture, torch.device("cuda", 0))
    assert found == num_bytes
    assert {some[-1] for some in seen} == {sizes[-1]}
