"""``nvrar bench`` as a user starts it: what it writes, how it ends, what it leaves behind."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.host

NVRAR = [sys.executable, "-m", "nvrar"]


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
        assert row["backend"] == row["link"] == "gloo"
        assert len(row["samples_us"]) == row["num_samples"] == 4
        assert row["git_commit"] is None or len(row["git_commit"]) == 40
        assert row["timestamp"].endswith("+00:00")
    ours = {row["num_bytes"]: row for row in rows if row["contender"] == "exchange:3"}
    assert (ours[1024]["executor"], ours[1024]["plan"]) == ("host", "exchange:3")
    assert (ours[6144]["executor"], ours[6144]["plan"]) == ("torch.distributed", None)
    assert list(ours[6144]["fallbacks"].values()) == [4]
    assert "<svg" in (out / "bench.svg").read_text()


@pytest.mark.parametrize(
    "command", ["bench --json x.json --iterations 1 --rounds 1", "tune --budget 5 --output x.json"]
)
def test_what_was_measured_is_shown_even_where_it_cannot_be_written(
    command: str, tmp_path: Path
) -> None:
    done = nvrar(
        *command.split(), "--device=cpu", "--nodes=1", "--ranks-per-node=2", "--sizes=1K",
        cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (99, 99)),
    )  # fmt: skip
    assert "1 KiB" in done.stdout
    assert "written to" not in done.stdout
    assert done.stderr.splitlines()[-1] == "nvrar: x.json cannot be written: File too large"
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


def test_the_command_joins_torchrun_and_only_one_rank_complains() -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*run, "-m", "nvrar", "bench", "--sizes", "1K", "--plans", "split:5"],
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
    assert f"at 127.0.0.1:{env['MASTER_PORT']} within 2 s" in done.stderr


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def started(number: int, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A bench of two ranks that takes for ever, and the mark of its processes; none of them stays."""
    mark = f"--iterations={number * 10**6 + os.getpid()}"
    command = subprocess.Popen(
        [*NVRAR, "bench", "--nodes", "1", "--ranks-per-node", "2", *options, mark],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield command, mark
    finally:
        for pid in alive(mark):
            os.kill(pid, signal.SIGKILL)


def test_a_killed_worker_ends_it_with_a_line() -> None:
    with started(2, "--plans=") as (command, mark):
        workers = workers_of(command, mark, 2)
        time.sleep(1)  # into the measuring, with luck; wherever it is, it must end
        os.kill(workers[-1], signal.SIGKILL)
        error = command.communicate(timeout=90)[1]
        assert command.returncode == 128 + signal.SIGKILL
        assert "Traceback" not in error
        assert alive(mark) == []


def test_workers_do_not_outlive_the_command() -> None:
    with started(1) as (command, mark):
        workers_of(command, mark, 2)
        time.sleep(1)
        command.send_signal(signal.SIGTERM)
        command.communicate(timeout=60)
        assert command.returncode == 128 + signal.SIGTERM
        assert alive(mark) == []


def test_an_interrupt_while_workers_import_ends_it_quietly() -> None:
    with started(3) as (command, mark):
        while command.poll() is None:
            importing = [pid for pid in alive(mark) if pid != command.pid and _has_torch(pid)]
            if len(importing) == 2:
                break
            time.sleep(0.01)
        command.send_signal(signal.SIGINT)
        _, error = command.communicate(timeout=20)  # for one that stays, torch waits 30 s
        assert command.returncode == 128 + signal.SIGINT
        assert "Traceback" not in error
        assert alive(mark) == []


def _has_torch(pid: int) -> bool:
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # it ended meanwhile
        return False
