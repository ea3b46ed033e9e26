"""The tuner over real processes, and communicators that go by what it measured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ranks
from nvrar import MACHINES, Communicator, NvrarError, Plan, Topology, tables
from nvrar.bench import Settings
from nvrar.hardware import device_name
from nvrar.lab import HostLab
from nvrar.table import Entry, Key, Table, Trial
from nvrar.tuner import Attempt, tune

pytestmark = pytest.mark.host

QUICK = Settings(torch.float32, iterations=2, rounds=1, warmup=1, timeout_s=20)
SHOT, SPLIT = Plan.parse("exchange:2"), Plan.parse("split:2")
ENTRIES = (
    Entry(1024, 500.0, (Trial(SPLIT, 100.0), Trial(SHOT, 200.0))),
    Entry(4096, 50.0, (Trial(SHOT, 100.0),)),
)


def table(**changes: Any) -> Table:
    key = Key("host", (device_name("host"),), "1x2", "gloo", "float32")
    return Table(replace(key, **changes), ENTRIES, {}, {})


class Spoiled:
    """One plan's contender, wrong or failing on rank 1."""

    def __init__(self, attempt: Attempt, fails: bool) -> None:
        self._attempt, self._fails = attempt, fails

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attempt.contender, name)

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        x = self._attempt.contender.all_reduce(x, op)
        if dist.get_rank() == 1:
            if self._fails:
                raise NvrarError("the kernel does not compile")
            x[5] += 1
        return x


class SpoiledLab(HostLab):
    fails = False

    @contextmanager
    def attempts(
        self, num_bytes: int, left_out: MutableMapping[str, str]
    ) -> Iterator[Sequence[Attempt]]:
        with super().attempts(num_bytes, left_out) as found:
            yield [
                replace(a, contender=Spoiled(a, self.fails)) if a.name == "split:2" else a
                for a in found
            ]


def _tune(rank: int, kind: str, sizes: list[int], budget_s: float) -> tuple[str, list[str]]:
    group, steps = dist.group.WORLD, []
    SpoiledLab.fails = kind == "failing"
    made = HostLab if kind == "sound" else SpoiledLab
    with closing(made(group, Topology(1, 2), MACHINES["gloo"], QUICK, 4)) as lab:
        found = tune(group, lab, sizes, QUICK, budget_s, {"who": f"rank {rank}"}, steps.append)
    return found.dumps(), steps


def test_all_ranks_have_rank_0s_table() -> None:
    (text, steps), other = ranks.run(_tune, 2, "sound", [4096, 64, 1024], 60.0)
    assert other == (text, steps)
    assert steps == ["float32, 64 B", "float32, 4 KiB", "float32, 1 KiB"]
    found = Table.loads(text)
    assert found.key == table().key
    assert found.provenance == {"who": "rank 0"}
    assert [entry.num_bytes for entry in found.entries] == [64, 1024, 4096]
    for entry in found.entries:
        assert {trial.plan for trial in entry.trials} == {SHOT, SPLIT}
        assert all(0 < trial.time_us < 2e7 for trial in entry.trials)
        assert 0 < entry.torch_us < 2e7
    assert not found.left_out


@pytest.mark.parametrize(
    ("kind", "reason"), [("wrong", "element 5"), ("failing", "wrong on rank 1")]
)
def test_what_is_wrong_is_left_out_with_its_reason(kind: str, reason: str) -> None:
    (text, _), other = ranks.run(_tune, 2, kind, [64, 256], 60.0)
    assert other[0] == text
    found = Table.loads(text)
    assert {t.plan for entry in found.entries for t in entry.trials} == {SHOT}
    assert list(found.left_out) == ["split:2"]
    assert found.left_out["split:2"].startswith("at 64 B: ")
    assert reason in found.left_out["split:2"]


def test_a_spent_budget_leaves_sizes_out() -> None:
    (text, steps), _ = ranks.run(_tune, 2, "sound", [64, 256, 1024], 1e-6)
    assert [entry.num_bytes for entry in Table.loads(text).entries] == [64]
    assert len(steps) == 1


def _by_table(rank: int, options: dict[str, Any]) -> tuple[Any, ...]:
    with Communicator(topology=Topology(1, 2), **options) as comm:
        plans = [str(comm.plan_for(n, torch.float32)) for n in (64, 1024, 2048, 4096, 1 << 20)]
        for n in (256, 1024):  # elements: the second is torch's by the table
            assert torch.equal(comm.all_reduce(torch.ones(n)), torch.full((n,), 2.0))
        return plans, dict(comm.stats.fallbacks)


BY_MODEL = (["exchange:2"] * 5, {})
BY_TABLE = (["split:2"] * 2 + ["exchange:2"] * 3,)
TORCHS = {"sizes at which the measured table has torch faster": 1}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (*BY_TABLE, TORCHS)),
        ({"deterministic": True}, (*BY_TABLE, {})),
        ({"executor": "host"}, (*BY_TABLE, {})),
        ({"plan": "exchange:2"}, (["exchange:2"] * 5, {})),
    ],
)
def test_rank_0s_table_decides_for_all(
    tmp_path: Path, options: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    """The other rank has a table too, and it says the opposite."""
    tables.write(table(), tmp_path / "0.json")
    swapped = (replace(ENTRIES[0], trials=ENTRIES[1].trials), replace(ENTRIES[1], torch_us=9e9))
    tables.write(replace(table(), entries=swapped), tmp_path / "1.json")
    env = [{"NVRAR_TUNE_TABLE": str(tmp_path / f"{rank}.json")} for rank in (0, 1)]
    assert ranks.run(_by_table, 2, options, env=env) == [expected] * 2


@pytest.mark.parametrize(
    "change",
    [{"devices": ("Z80",)}, {"topology": "2x1"}, {"link": "mpi"}, {"dtype": "bfloat16"}, None],
)
def test_a_table_of_something_else_is_not_used(
    tmp_path: Path, change: dict[str, Any] | None
) -> None:
    tables.write(table(**(change or {})), tmp_path / "t.json")
    if change is None:
        (tmp_path / "t.json").write_text("{}")
    env = [{"NVRAR_TUNE_TABLE": str(tmp_path / "t.json")}, {"NVRAR_TUNE_TABLE": "off"}]
    assert ranks.run(_by_table, 2, {}, env=env) == [BY_MODEL] * 2


def test_the_command_keeps_a_table_that_the_others_show(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "NVRAR_TUNE_TABLE"}
    env |= {"NVRAR_CACHE_DIR": str(tmp_path / "cache")}

    def nvrar(line: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "nvrar", *line.split()],
            capture_output=True, text=True, timeout=120, env=env,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    layout = "--nodes 2 --ranks-per-node 1"
    said = nvrar(f"tune --device cpu {layout} --sizes 1K,8K --machine perlmutter")
    (path,) = (tmp_path / "cache" / "tables").iterdir()
    assert f"written to {path}" in said
    found = Table.loads(path.read_text())
    assert (found.key.topology, found.key.dtype) == ("2x1", "bfloat16")
    assert found.provenance["machine_model"]["name"] == "perlmutter"
    assert re.search(r"nvrar tune --device cpu --nodes 2", found.provenance["command"])
    assert str(path) in nvrar(f"plan {layout} --bytes 8K")
    assert str(path) in nvrar(f"info {layout}")
    assert "8 KiB" in nvrar(f"tune --dry-run {layout} --sizes 1K,8K")
