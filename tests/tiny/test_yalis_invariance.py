"""With `batch_invariant` a token's bits follow from its own sequence, whatever else is in a step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nvrar import Topology
from yalis import ConfigError
from yalis.attention import AttentionMetadata, one_token_each
from yalis.config import ModelConfig
from yalis.core import Batch, NewBlocks
from yalis.options import EngineOptions
from yalis.parallel.all_reduce import BatchInvariantAllReduce, make_all_reduce
from yalis.parallel.group import TensorParallel
from yalis.runner import Runner
from yalis.testing import make_checkpoint

LENGTHS = (21, 1, 13)
PROMPTS = [[(7 * i + 3 * j + i * j) % 200 + 4 for j in range(n)] for i, n in enumerate(LENGTHS)]


def hidden(runner: Runner, spans: list[list[tuple[int, int, int]]]) -> list[Tensor]:
    """Of each prompt all rows, computed in steps of (prompt, first token, last token + 1)."""
    parts: list[list[Tensor]] = [[] for _ in PROMPTS]
    for step in spans:
        batch = Batch(
            num_decodes=0,
            slots=tuple(slot for slot, _, _ in step),
            num_cached=tuple(first for _, first, _ in step),
            num_new=tuple(stop - first for _, first, stop in step),
            token_ids=tuple(t for slot, first, stop in step for t in PROMPTS[slot][first:stop]),
            is_drawing=(True,) * len(step),
            new_blocks=tuple(
                NewBlocks(slot, 0, (2 * slot, 2 * slot + 1)) for slot, first, _ in step if not first
            ),
        )
        rows = runner.forward(batch)
        for (slot, first, stop), part in zip(
            step, rows.split([s - f for _, f, s in step]), strict=True
        ):
            assert len(part) == stop - first
            parts[slot].append(part)
    return [torch.cat(rows) for rows in parts]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neither_neighbours_nor_chunks_change_a_bit(dtype: str, tmp_path: Path) -> None:
    model = str(make_checkpoint(tmp_path, num_hidden_layers=2, dtype=dtype))
    options = EngineOptions(model, device="cpu", max_num_seqs=3, batch_invariant=True)
    config, one = ModelConfig.from_folder(model), TensorParallel.single()
    runner = Runner(options, config, one, torch.device("cpu"))
    alone = hidden(runner, [[(slot, 0, n)] for slot, n in enumerate(LENGTHS)])
    together = hidden(runner, [[(slot, 0, n) for slot, n in enumerate(LENGTHS)]])
    cut = hidden(
        runner, [[(0, 0, 5), (2, 0, 12)], [(0, 5, 6), (1, 0, 1), (2, 12, 13)], [(0, 6, 21)]]
    )
    for slot in range(len(LENGTHS)):
        assert torch.equal(alone[slot], together[slot])
        assert torch.equal(alone[slot], cut[slot])


def test_a_step_taken_apart_has_each_token_with_its_context() -> None:
    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    step = AttentionMetadata(
        num_decodes=1,
        max_query_len=3,
        max_seq_len=9,
        query_starts=ints(0, 1, 4, 6),
        seq_lens=ints(9, 3, 7),
        block_tables=torch.stack([ints(5, 6), ints(7, 8), ints(1, 2)]),
        cache_indices=ints(50, 70, 71, 72, 15, 16),
    )
    parts = list(one_token_each(step, 4))
    assert [part.query_starts.tolist() for part in parts] == [[0, 1, 2, 3, 4], [0, 1, 2]]
    assert [part.seq_lens.tolist() for part in parts] == [[9, 1, 2, 3], [6, 7]]
    assert [part.block_tables[:, 0].tolist() for part in parts] == [[5, 7, 7, 7], [1, 1]]
    assert torch.cat([part.cache_indices for part in parts]).equal(step.cache_indices)
    assert {part.max_query_len for part in parts} == {1}
    assert all(part.seq_lens.dtype == torch.int32 for part in parts)


@pytest.mark.parametrize("is_batch_invariant", [False, True])
def test_its_sums_are_asked_to_be_deterministic(
    is_batch_invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr("nvrar.Communicator", lambda **options: made.append(options))
    how: dict[str, Any] = {"group": None, "nodes": (2, 4), "plan": "auto"}
    make_all_reduce("nvrar", **how, is_batch_invariant=is_batch_invariant)
    topology = Topology(num_nodes=2, ranks_per_node=4)
    wanted = {"group": None, "plan": "auto", "topology": topology}
    assert made == [wanted | {"deterministic": is_batch_invariant}]


def test_large_messages_are_summed_in_portions_and_never_by_torch() -> None:
    seen: list[int] = []

    def double(x: Tensor, out: Tensor) -> Tensor:
        seen.append(len(x))
        return out.add_(x)

    stats = SimpleNamespace(fallbacks=Counter[str]())
    communicator: Any = SimpleNamespace(max_bytes=100, all_reduce=double, stats=stats)
    all_reduce = BatchInvariantAllReduce.__new__(BatchInvariantAllReduce)
    all_reduce._communicator = communicator
    x = torch.arange(70, dtype=torch.float32).view(7, 10)  # rows of 40 bytes
    expected = 2 * x
    assert torch.equal(all_reduce(x), expected)
    assert seen == [2, 2, 2, 1]
    residual, weight = torch.ones(7, 10), torch.ones(10)
    normed, total = all_reduce.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, 2 * expected + 1)
    assert normed.shape == total.shape
    stats.fallbacks["dtype torch.float8"] += 1
    with pytest.raises(ConfigError, match=r"leaves sums to torch, .*: dtype torch.float8"):
        all_reduce(x)
