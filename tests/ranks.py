"""Runs a function on P local ranks: one process each, joined by a gloo process group.

The processes are forked from a server that has torch imported already, so a world of four starts in
a fraction of a second and every case gets fresh ones. The parent hosts the store, so that it outlives
any rank. A rank that raises comes back with its traceback, one that hangs with its stack.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the ranks share few cores

import torch.distributed as dist

_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(["pytest", "hypothesis.strategies", "nvrar", "torch.testing", "ranks"])

_ENV = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


@dataclass
class Outcome:
    """How one rank ended."""

    value: Any = None
    error: str = ""  # its traceback, or why it ended without one
    exit_code: int | None = None


class Ranks:
    """``function(rank, *args)`` on each of ``world_size`` ranks, started now; use :meth:`join`.

    With ``store="rank 0"`` the first rank hosts the store, as it does without torchrun; with
    ``store=None`` no process group is made. ``env`` is a mapping, or one for each rank.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout_s: float = 60.0,
        env: Mapping[str, str] | list[dict[str, str]] | None = None,
        store: str | None = "parent",
    ) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._stacks = tempfile.TemporaryDirectory()
        self._store = None
        if store is not None:
            self._store = dist.TCPStore(
                "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5)
            )
        port = self._store.port if self._store is not None else 0
        if store == "rank 0":  # only the free port is wanted
            self._store = None
        self._pipes = []
        self._processes = []
        for rank in range(world_size):
            extra = env[rank] if isinstance(env, list) else env or {}
            ours, theirs = _fork.Pipe()
            setting = (rank, world_size, store, port, timeout_s, self._stacks.name)
            process = _fork.Process(
                target=_main, args=(theirs, {**_ENV, **extra}, setting, function, args), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self._processes[rank].pid, number)

    def wait_for_word(self, rank: int) -> Any:
        """What the rank says next by :func:`say`."""
        kind, value = pickle.loads(self._pipes[rank].recv_bytes())
        assert kind == "word", f"rank {rank} ended first: {value}"
        return value

    def join(self) -> list[Outcome]:
        """All outcomes by rank. Ranks that are still running at the deadline are killed."""
        try:
            return [self._join(rank) for rank in range(len(self._processes))]
        finally:
            self.end()

    def end(self) -> None:
        """Leaves no process behind; may be called again."""
        for process in self._processes:
            process.kill()
            process.join()
        self._stacks.cleanup()

    def _join(self, rank: int) -> Outcome:
        pipe, process = self._pipes[rank], self._processes[rank]
        outcome = Outcome(error="it ended without a word")
        try:
            while pipe.poll(max(self._deadline - time.monotonic(), 0)):
                kind, value = pickle.loads(pipe.recv_bytes())
                if kind == "value":
                    outcome = Outcome(value=value)
                elif kind == "error":
                    outcome = Outcome(error=value)
        except (EOFError, ConnectionResetError):  # it ended
            pass
        process.join(max(self._deadline - time.monotonic(), 0))
        outcome.exit_code = process.exitcode
        if process.exitcode is None:
            outcome.error = (
                f"it hung and was killed\n{Path(self._stacks.name, str(rank)).read_text()}"
            )
        elif process.exitcode != 0 and not outcome.error:
            outcome.error = f"it ended with exit code {process.exitcode} after returning"
        return outcome


def run(function: Callable[..., Any], world_size: int, *args: Any, **options: Any) -> list[Any]:
    """What ``function(rank, *args)`` returns, by rank; any rank's failure is an AssertionError."""
    outcomes = Ranks(function, world_size, *args, **options).join()
    errors = [f"rank {r}: {o.error}" for r, o in enumerate(outcomes) if o.error]
    assert not errors, "\n".join(errors)
    return [outcome.value for outcome in outcomes]


def say(word: Any) -> None:
    """Tells the parent something while the rank goes on; see :meth:`Ranks.wait_for_word`."""
    _pipe.send_bytes(pickle.dumps(("word", word)))


_pipe: Any = None


def _main(
    pipe: Any,
    env: dict[str, str],
    setting: tuple[int, int, str | None, int, float, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    global _pipe
    _pipe = pipe
    rank, world_size, store, port, timeout_s, stacks = setting
    os.environ.update(env)
    with open(Path(stacks, str(rank)), "w") as file:
        faulthandler.dump_traceback_later(max(timeout_s - 1, 0.5), file=file)
        try:
            if store is not None:
                _init(rank, world_size, store, port)
            message = ("value", function(rank, *args))
        except BaseException:
            message = ("error", traceback.format_exc())
        pipe.send_bytes(pickle.dumps(message))
        if dist.is_initialized():
            dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


def _init(rank: int, world_size: int, store: str, port: int) -> None:
    hosts = store == "rank 0" and rank == 0
    client = dist.TCPStore(
        "127.0.0.1", port, is_master=hosts, wait_for_workers=False, timeout=timedelta(minutes=5)
    )
    dist.init_process_group(
        "gloo", store=client, rank=rank, world_size=world_size, timeout=timedelta(minutes=5)
    )
    # gloo is done on a rank when its own side of every connection is; one that left now, having nothing
    # to do, would close connections that a slower rank is still making.
    client.set(f"joined/{rank}", "")
    client.wait([f"joined/{r}" for r in range(world_size)], timedelta(minutes=5))
