"""One rank's steps, without an engine around them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from nvrar import PeerTimeout
from yalis.config import ModelConfig
from yalis.core import Admission, Batch, NewBlocks
from yalis.memory import cache_bytes
from yalis.options import EngineOptions
from yalis.parallel.all_reduce import NoAllReduce
from yalis.parallel.group import TensorParallel
from yalis.runner import Runner
from yalis.sampling_params import SamplingParams
from yalis.testing import make_checkpoint

GREEDY = SamplingParams(temperature=0)


def make_runner(folder: Path, tp: TensorParallel, **options: object) -> Runner:
    model = str(make_checkpoint(folder, num_hidden_layers=2))
    given = EngineOptions(model, device="cpu", kv_cache_memory_bytes=1 << 20, **options)
    return Runner(given, ModelConfig.from_folder(model), tp, torch.device("cpu"))


def prompt(slot: int, token_ids: tuple[int, ...]) -> Batch:
    return Batch(
        num_decodes=0,
        slots=(slot,),
        num_cached=(0,),
        num_new=(len(token_ids),),
        token_ids=token_ids,
        is_drawing=(True,),
        admissions=(Admission(slot, GREEDY, 0, len(token_ids)),),
        new_blocks=(NewBlocks(slot, 0, (slot,)),),
    )


class _PeerGone(NoAllReduce):
    """Finds out after a step has run, as a kernel in a graph does."""

    is_lost = False

    def check(self) -> None:
        if self.is_lost:
            raise PeerTimeout("rank 1 did not come", rank=0, peers=(1,))


def test_a_result_is_not_given_out_when_a_peer_was_gone(tmp_path: Path) -> None:
    all_reduce = _PeerGone()
    runner = make_runner(tmp_path, TensorParallel(0, 1, all_reduce))
    assert len(runner.execute(prompt(0, (5, 6, 7))).wait().token_ids) == 1
    pending = runner.execute(prompt(1, (5, 6, 7)))
    all_reduce.is_lost = True
    with pytest.raises(PeerTimeout, match="rank 1"):
        pending.wait()
    with pytest.raises(PeerTimeout, match="rank 1"):
        runner.execute(prompt(2, (5, 6, 7)))


def test_the_cache_gets_what_weights_steps_graphs_and_others_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stats = {"allocated_bytes.all.current": 300, "allocated_bytes.all.peak": 350}
    for name in ("reset_peak_memory_stats", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600, 1000))
    warmed_up: list[None] = []

    def num_bytes(**options: object) -> int:
        given = EngineOptions("model", **options)
        warm_up = partial(warmed_up.append, None)
        return cache_bytes(given, torch.device("cuda"), warm_up, lambda: 20)

    # Of the 400 in use 300 are the weights; a step takes 50 more for a while, and graphs 20.
    assert num_bytes(gpu_memory_utilization=0.75) == 750 - 400 - 50 - 20
    assert num_bytes(gpu_memory_utilization=0.25) == 0
    assert num_bytes(kv_cache_memory_bytes=7) == 7
    assert len(warmed_up) == 3  # whoever asks for a size still has the kernels loaded
