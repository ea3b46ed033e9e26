"""The tuner's side of the GPUs, over an executor that only pretends to be one: no kernel runs here."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ranks
from nvrar import MACHINES, Plan, Topology
from nvrar.bench import Settings
from nvrar.gpu import lab as gpu_lab
from nvrar.gpu.jit import CompileError
from nvrar.gpu.layout import LaunchShape, Room, launch_shape
from nvrar.table import Table, Trial
from nvrar.testing import reference_all_reduce
from nvrar.tuner import tune

pytestmark = pytest.mark.host

SETTINGS = Settings(iterations=3, rounds=1, warmup=1, timeout_s=20)
FASTEST = LaunchShape(9, 256)  # for 64 KB by exchange:2 in LL128 packets, two turns


class PretendedExecutor:
    """Reduces by the reference. Calls of ``hangs`` break it, as a wait that ran out does."""

    made = 0
    hangs = ""
    link = "nvlink"
    resident = 264  # blocks

    def __init__(self, group: Any, topology: Topology, algorithms: Any, *waits: float) -> None:
        PretendedExecutor.made += 1
        self.room = algorithms(self.link)
        self.failure = SimpleNamespace(kind=0, level=0)

    def prepare(self, num_bytes: int, dtype: torch.dtype, op: str, algorithm: Any) -> Any:
        if str(algorithm.plan) == "split:2" and algorithm.packets.name == "LL" and dist.get_rank():
            raise CompileError("too many registers\nand more")
        plan, packets = algorithm.plan, algorithm.packets
        shape = launch_shape(
            plan, packets, num_bytes, Room(lambda threads: self.resident), algorithm.shape
        )
        return SimpleNamespace(shape=shape, algorithm=algorithm, name=f"{plan} {packets.name}")

    def launch(self, prepared: Any, x: Tensor, out: Tensor) -> None:
        everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, x)
        launch = f"{prepared.name} {prepared.shape.blocks}x{prepared.shape.threads}"
        if self.hangs in (prepared.name, launch):
            self.failure.kind = 1
        is_slow = (
            prepared.shape != FASTEST,
            "LL128" not in prepared.name,
            "split" in prepared.name,
        )
        time.sleep(0.03 * sum(is_slow))
        total = reference_all_reduce(torch.stack(everyone), prepared.algorithm.plan)
        out.copy_(torch.full_like(x, torch.nan) if self.failure.kind else total)

    def close(self) -> None:
        pass


def _tune(rank: int, hangs: str, link: str) -> tuple[str, int]:
    gpu_lab.GpuExecutor = PretendedExecutor
    gpu_lab.device_name = lambda executor: f"GPU of {executor}"
    torch.cuda.synchronize = lambda: None
    PretendedExecutor.hangs, PretendedExecutor.link = hangs, link
    lab = gpu_lab.GpuLab(dist.group.WORLD, Topology(1, 2), MACHINES["h100-ndr"], SETTINGS, 4)
    found = tune(dist.group.WORLD, lab, [65536, 1 << 20], SETTINGS, 60.0, {})
    return found.dumps(), PretendedExecutor.made


def test_plans_packets_and_launches_are_tried() -> None:
    (text, made), other = ranks.run(_tune, 2, "", "nvlink")
    assert other == (text, made)
    assert made == 3  # to ask for the link, and one a size
    found = Table.loads(text)
    assert str(found.key) == "bfloat16 on 1x2 ranks of GPU of gpu (gpu executor, nvlink)"
    assert found.left_out == {"split:2 LL": "too many registers"}
    small, large = found.entries
    shot = Plan.parse("exchange:2")
    assert small.trials[0] == Trial(shot, small.trials[0].time_us, "LL128", 9, 256)
    assert small.trials[1] == Trial(shot, small.trials[1].time_us, "LL128", 18, 128)
    rest = {(str(t.plan), t.packets) for t in small.trials[2:]}
    assert rest == {("split:2", "LL128"), ("exchange:2", "LL")}
    assert {t.packets for t in large.trials} == {"LL128"}, "LL is not worth trying there"
    assert small.torch_us > 0
    assert small.trials == tuple(sorted(small.trials, key=lambda t: t.time_us))


def test_a_wait_that_ran_out_takes_nobody_along() -> None:
    (text, made), _ = ranks.run(_tune, 2, "exchange:2 LL128", "nvlink")
    found = Table.loads(text)
    assert made == 4
    assert found.left_out["exchange:2 LL128"] == (
        "at 64 KiB: a wait at level 0 did not end within 5 s"
    )
    assert {(str(t.plan), t.packets) for t in found.entries[1].trials} == {("split:2", "LL128")}


def test_a_launch_that_does_not_end_is_left_out_alone() -> None:
    (text, made), _ = ranks.run(
        _tune, 2, f"exchange:2 LL128 {FASTEST.blocks}x{FASTEST.threads}", "nvlink"
    )
    found = Table.loads(text)
    assert made == 4
    assert found.left_out.keys() == {"split:2 LL", "exchange:2 LL128 9x256"}
    best = found.entries[0].trials[0]
    assert (str(best.plan), best.packets) == ("exchange:2", "LL128")


def _tune_on_two_kinds(rank: int) -> tuple[str, int]:
    PretendedExecutor.resident = (264, 40)[rank]
    return _tune(rank, "", "nvlink")


def test_ranks_with_other_gpus_try_the_same_launches() -> None:
    first, second = ranks.run(_tune_on_two_kinds, 2)
    assert first == second


def test_no_lines_where_they_may_be_torn() -> None:
    (text, _), _ = ranks.run(_tune, 2, "", "put")
    found = Table.loads(text)
    assert found.key.link == "put"
    assert {t.packets for entry in found.entries for t in entry.trials} == {"LL"}
    assert {t.plan for entry in found.entries for t in entry.trials} == {Plan.parse("exchange:2")}
