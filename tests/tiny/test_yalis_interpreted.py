"""The engine as it is on a GPU, but for the GPU: Triton's interpreter runs the kernels, on CPU tensors.

Paged attention, chunks, padded batches and the kernels' shapes and strides, all in one piece:
in float32 the tokens are those of torch's operations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from yalis import LLM, SamplingParams, runner
from yalis.attention import choice
from yalis.graphs import Computed, StepGraphs
from yalis.inputs import StepShape, Uploaded
from yalis.layers import functional
from yalis.parallel.all_reduce import NoAllReduce
from yalis.testing import make_checkpoint

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": 7},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
}
PROMPTS = [[5, 6, 7] * 4, [9, 8], [11, 12, 13, 14, 15, 16, 17]]
# Rows that pad a batch are computed too, with whatever numbers are there.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
PARAMS = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)


class PretendedGraphs(StepGraphs):
    """Keeps where a batch of each shape is brought to, and computes on that for every replay.

    Results are where they were, and worthless from the next replay of any shape on.
    """

    replayed: ClassVar[set[bool]] = set()  # whether there were chunks
    alive: ClassVar[weakref.WeakSet[PretendedGraphs]] = weakref.WeakSet()

    def __init__(
        self,
        shapes: Sequence[StepShape],
        upload: Callable[[StepShape], Uploaded],
        compute: Callable[[Uploaded], Computed],
        *_: Any,
    ) -> None:
        self._shapes = sorted(shapes)
        self._compute = compute
        self._uploaded = {shape: upload(shape) for shape in self._shapes}
        self._results: dict[StepShape, Computed] = {}
        self.alive.add(self)

    def replay(self, shape: StepShape) -> Computed:
        self.replayed.add(shape.are_chunks)
        for result in self._results.values():
            result.token_ids.fill_(-7777)
            result.share.fill_(torch.nan)
        computed = self._compute(self._uploaded[shape])
        result = self._results.setdefault(shape, computed)
        for place, value in zip(result, computed, strict=True):
            place.copy_(value)
        return result


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_torchs_operations(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = {"architectures": [f"{family}ForCausalLM"]}
    make_checkpoint(tmp_path, **architecture, **SHAPE, **FAMILIES[family])

    def tokens(**options: Any) -> list[tuple[int, ...]]:
        # Three sequences pad to four rows. A step takes eight tokens, so the longest prompt comes in chunks.
        sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "block_size": 4}
        options = {"max_model_len": 64, "kv_cache_memory_bytes": 1 << 18} | sizes | options
        with LLM(str(tmp_path), device="cpu", **options) as llm:
            return [output.token_ids for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]

    expected = tokens()
    monkeypatch.setattr(functional, "_has_kernels", lambda x: True)
    monkeypatch.setattr(choice, "_why_not_paged", lambda *_: None)
    monkeypatch.setattr(runner, "StepGraphs", PretendedGraphs)
    monkeypatch.setattr(PretendedGraphs, "replayed", set())
    left: list[int] = []
    monkeypatch.setattr(NoAllReduce, "close", lambda self: left.append(len(PretendedGraphs.alive)))
    assert tokens() == expected
    assert PretendedGraphs.replayed == {False, True}
    assert left == [0]  # NCCL's end waits for graphs that have captured its calls
    if family == "Qwen2":  # other products, and prompts that attend token by token
        assert tokens(batch_invariant=True) == expected
