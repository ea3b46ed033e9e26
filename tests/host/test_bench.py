"""A bench over real processes: what is measured, who is caught, what the command leaves behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ranks
from nvrar import MACHINES, Topology
from nvrar.bench import Measurement, Settings, measure
from nvrar.contenders import TorchContender, contenders
from nvrar.errors import WrongResultError
from nvrar.verify import verify

pytestmark = pytest.mark.host

QUICK = Settings(iterations=3, rounds=2, warmup=1, timeout_s=30)
NVRAR = [sys.executable, "-m", "nvrar.cli"]


class Wrong(TorchContender):
    """Right everywhere but in one element on one rank."""

    name = "wrong"

    def __init__(self, group: dist.ProcessGroup, rank: int, error: float) -> None:
        super().__init__(group)
        self._is_wrong = group.rank() == rank
        self._error = error

    def all_reduce(self, x: Tensor, op: str) -> None:
        super().all_reduce(x, op)
        if self._is_wrong:
            x[7] += self._error


def _measure(rank: int) -> tuple[list[Measurement], list[str]]:
    topology, steps = Topology(2, 2), []
    options = {"max_bytes": 2048, "machine": MACHINES["perlmutter"]}
    with contenders(dist.group.WORLD, topology, ["nvrar", "auto"], **options) as entrants:
        found = measure(
            dist.group.WORLD,
            topology,
            entrants,
            [2048, 4096],
            QUICK,
            MACHINES["perlmutter"],
            steps.append,
        )
    return found, steps


def test_measures_the_same_on_every_rank() -> None:
    (found, steps), *others = ranks.run(_measure, 4)
    assert all(other == (found, steps) for other in others)
    assert len(steps) == 2 * (1 + QUICK.rounds)
    assert [(m.contender, m.num_bytes) for m in found] == [
        (name, size) for size in (2048, 4096) for name in ("torch", "nvrar", "auto")
    ]
    for m in found:
        assert len(m.samples_us) == QUICK.iterations * QUICK.rounds
        assert 0 < m.min_us <= m.percentile_us(10) <= m.median_us <= m.percentile_us(90) < 3e7
        if m.contender == "torch" or m.num_bytes > 2048:
            assert (m.plan, m.predicted_us) == (None, None)
        else:
            assert m.plan is not None
            assert m.predicted_us is not None
        fell_back = m.contender != "torch" and m.num_bytes > 2048
        assert sum(m.fallbacks.values()) == (len(m.samples_us) if fell_back else 0)


def _measure_wrong(rank: int, wrong_rank: int, error: float) -> tuple[str, list[str]]:
    group, steps = dist.group.WORLD, []
    with contenders(group, Topology(1, 3), ["nvrar"]) as entrants:
        entrants.append(Wrong(group, wrong_rank, error))
        try:
            measure(group, Topology(1, 3), entrants, [1024], QUICK, on_step=steps.append)
        except WrongResultError as caught:
            return str(caught), steps
    return "", steps


@pytest.mark.parametrize("error", [0.5, float("nan"), float("inf")])
def test_a_wrong_contender_ends_it_on_every_rank_before_any_timing(error: float) -> None:
    said = ranks.run(_measure_wrong, 3, 1, error)
    assert said[0] == said[1] == said[2]
    message, steps = said[0]
    assert message.startswith("wrong on 512 x torch.bfloat16 (sum, 1x3) is wrong on rank 1")
    assert "element 7" in message
    assert steps == ["checking 1 KiB"]


def _verify_in_pieces(rank: int, wrong_at: int | None) -> str:
    group = dist.group.WORLD
    with contenders(group, Topology(1, 2), ["two-shot"], max_bytes=1 << 30) as (_, ours):

        def all_reduce(x: Tensor) -> Any:
            ours.all_reduce(x, "max")
            if rank == 1 and wrong_at is not None:
                x[wrong_at] += 1
            return ours.plan_for(x.nbytes, x.dtype)

        try:
            verify(all_reduce, group, Topology(1, 2), 2_200_003, name="x", op="max")
        except WrongResultError as caught:
            return str(caught)
    return ""


def test_a_large_message_is_checked_to_its_end() -> None:
    assert ranks.run(_verify_in_pieces, 2, None) == ["", ""]
    said = ranks.run(_verify_in_pieces, 2, 2_200_002)
    assert said[0] == said[1]
    assert "wrong on rank 1: element 2200002" in said[0]


class OtherBits(TorchContender):
    """Within the rounding bound, yet not what the plan it claims would give."""

    name = "other-bits"

    def __init__(self, group: dist.ProcessGroup, claim: Any, rank: int | None = None) -> None:
        super().__init__(group)
        self._claim = claim
        self._is_off = rank is None or group.rank() == rank

    def all_reduce(self, x: Tensor, op: str) -> None:
        self._claim.all_reduce(x, op)
        if self._is_off:
            x[3] = torch.nextafter(x[3], torch.tensor(torch.inf, dtype=x.dtype))

    def plan_for(self, num_bytes: int, dtype: torch.dtype) -> Any:
        return self._claim.plan_for(num_bytes, dtype)

    def fallbacks(self) -> Mapping[str, int]:
        return {}


def _measure_other_bits(rank: int) -> str:
    group, topology = dist.group.WORLD, Topology(2, 2)
    settings = Settings(torch.float32, iterations=1, rounds=1)
    with contenders(group, topology, ["nvrar"]) as (_, ours):
        try:
            measure(group, topology, [OtherBits(group, ours, 2)], [4096], settings)
        except WrongResultError as caught:
            return str(caught)
    return ""


def test_one_other_bit_is_wrong_too() -> None:
    said = set(ranks.run(_measure_other_bits, 4))
    assert len(said) == 1
    assert "rank 2" in min(said)
    assert "element 3" in min(said)
    assert "bit for bit" in min(said)


# -- the command -----------------------------------------------------------------------------------


def nvrar(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    # A terminal's worth of environment, without what pytest itself may have been launched by.
    return subprocess.run(
        [*NVRAR, *arguments], capture_output=True, text=True, timeout=120, **options
    )


def alive(mark: str) -> Sequence[int]:
    """Processes with ``mark`` on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it ended meanwhile
            pass
    return found


def workers_of(command: subprocess.Popen[str], mark: str, num_workers: int) -> Sequence[int]:
    """The workers' process ids, once all have their imports behind them (they open sockets then)."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and command.poll() is None:
        workers = [pid for pid in alive(mark) if pid != command.pid]
        if len(workers) == num_workers and all(_has_sockets(pid) for pid in workers):
            return workers
        time.sleep(0.1)
    raise AssertionError(
        f"{num_workers} workers did not start; the command ended: {command.poll()}"
    )


def _has_sockets(pid: int) -> bool:
    try:
        links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:  # it ended, or a descriptor was closed meanwhile
        return False
    return any(link.startswith("socket:") for link in links)


def test_the_command_starts_its_workers_and_writes_all_it_knows(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    quick = ["--iterations", "2", "--rounds", "2", "--warmup", "1", "--predict"]
    done = nvrar(
        *(
            "bench",
            "--nodes",
            "3",
            "--ranks-per-node",
            "1",
            "--sizes",
            "1K,6K",
            "--dtype",
            "float32",
        ),
        *("--plans", "auto,exchange:3", "--max-bytes", "4K", "--out", str(out), *quick),
        env={**os.environ, "NCCL_DEBUG": "WARN", "UNRELATED": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "3 nodes x 1 ranks" in done.stdout
    assert "exchange:3 at 6 KiB: 4 of 4 calls fell back to torch.distributed" in done.stdout
    rows = [json.loads(line) for line in (out / "bench.jsonl").read_text().splitlines()]
    assert [(row["num_bytes"], row["contender"]) for row in rows] == [
        (size, name) for size in (1024, 6144) for name in ("torch", "auto", "exchange:3")
    ]
    for row in rows:
        assert row["topology"] == "3x1"
        assert row["dtype"] == "float32"
        assert row["op"] == "sum"
        assert row["environment"]["NVRAR_RANKS_PER_NODE"] == "1"
        assert row["environment"]["NCCL_DEBUG"] == "WARN"
        assert "UNRELATED" not in row["environment"]
        assert row["command"].startswith("nvrar bench --nodes 3")
        assert row["torch"] == torch.__version__
        assert row["hosts"][0]["num_ranks"] == 3
        assert row["hosts"][0]["cpu"]
        assert row["backend"] == "gloo"
        assert len(row["samples_us"]) == row["num_samples"] == 4
        assert row["git_commit"] is None or len(row["git_commit"]) == 40
        assert row["timestamp"].endswith("+00:00")
    ours = {row["num_bytes"]: row for row in rows if row["contender"] == "exchange:3"}
    assert (ours[1024]["executor"], ours[1024]["plan"]) == ("host", "exchange:3")
    assert (ours[6144]["executor"], ours[6144]["plan"]) == ("torch.distributed", None)
    assert list(ours[6144]["fallbacks"].values()) == [4]
    assert "<svg" in (out / "bench.svg").read_text()


def test_the_command_joins_torchrun_and_only_one_rank_complains() -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*run, "-m", "nvrar.cli", "bench", "--sizes", "1K", "--plans", "split:5"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("nvrar: plan 'split:5' is for 5 ranks, the group has 2") == 1


@pytest.mark.parametrize("alone", [0, 1])
def test_a_rank_that_nobody_joins_gives_up(alone: int) -> None:
    place = {"RANK": str(alone), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env = {**os.environ, **place, "MASTER_PORT": str(_free_port())}
    done = nvrar("bench", "--timeout", "2", env=env)
    assert done.returncode == 1
    # Above it c10d may have logged its own account.
    assert done.stderr.splitlines()[-1].startswith(f"nvrar: rank {alone} of 2 (by torchrun) met no")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_a_killed_worker_ends_it_with_a_line() -> None:
    mark = f"--iterations={2 * 10**6 + os.getpid()}"
    command = subprocess.Popen(
        [*NVRAR, "bench", "--nodes", "1", "--ranks-per-node", "2", "--plans=", mark],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        workers = workers_of(command, mark, 2)
        time.sleep(1)  # into the measuring, with luck; wherever it is, it must end
        os.kill(workers[-1], signal.SIGKILL)
        error = command.communicate(timeout=90)[1]
        assert command.returncode == 128 + signal.SIGKILL
        assert "Traceback" not in error
        assert alive(mark) == []
    finally:
        for pid in alive(mark):
            os.kill(pid, signal.SIGKILL)


def test_workers_do_not_outlive_the_command() -> None:
    mark = f"--iterations={10**6 + os.getpid()}"
    command = subprocess.Popen(
        [*NVRAR, "bench", "--nodes", "1", "--ranks-per-node", "2", mark],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        workers_of(command, mark, 2)
        time.sleep(1)
        command.send_signal(signal.SIGTERM)
        assert command.wait(timeout=60) == 128 + signal.SIGTERM
        assert alive(mark) == []
    finally:
        for pid in alive(mark):
            os.kill(pid, signal.SIGKILL)
