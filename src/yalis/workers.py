# SPDX-License-Identifier: Apache-2.0
"""The driver's side of local workers: start them, tell them what to compute, and say whose fault it was."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, TypeVar, cast

from yalis.config import ModelConfig
from yalis.core import Batch, StepResult
from yalis.device import device_type, require_gpus
from yalis.engine import Executor
from yalis.errors import WorkerError
from yalis.messages import (
    Answer,
    Describe,
    Execute,
    Failed,
    LoadProgress,
    Ready,
    Result,
    Start,
    Stop,
    UseAllReduce,
)
from yalis.options import EngineOptions
from yalis.parallel.group import open_store
from yalis.processes import GRACE_S, Command, ProcessGroup
from yalis.weights.loader import Progress

_HOST = "127.0.0.1"
_STOP_TIMEOUT_S = 5.0

T = TypeVar("T")


class WorkerGroup(Executor):
    """An executor whose ranks are processes of this host, started here.

    Not thread-safe. Any failure of a rank, and any interrupt in the middle of a step, ends the group: the
    ranks would no longer be at the same point. Every later call then raises the same WorkerError.
    """

    def __init__(
        self, options: EngineOptions, config: ModelConfig, on_progress: Progress | None
    ) -> None:
        num_ranks = options.tensor_parallel_size
        if device_type(options.device) == "cuda":
            require_gpus(num_ranks)
        # The store lives here, not in a rank: so a dying rank takes nobody's meeting point with it.
        self._store = open_store(_HOST, 0, is_host=True)
        pairs = [socket.socketpair() for _ in range(num_ranks)]
        try:
            self._group = ProcessGroup(
                [
                    Command(
                        [sys.executable, "-m", "yalis.worker", str(theirs.fileno())],
                        _worker_env(os.environ, rank, num_ranks, self._store.port),
                        theirs.fileno(),
                    )
                    for rank, (_, theirs) in enumerate(pairs)
                ]
            )
        finally:
            for _, theirs in pairs:
                theirs.close()
        self._connections = [Connection(ours.detach()) for ours, _ in pairs]
        self._failure: WorkerError | None = None
        self.depth = options.depth(is_asynchronous=True)
        self._num_under_way = 0
        self._results: deque[StepResult] = deque()
        if on_progress:
            try:
                on_progress("starting workers", 0, num_ranks)
            except BaseException:
                self._end_by_interrupt()
                raise
        self._send(Start(options, config))
        self.num_blocks = self._receive(set(range(num_ranks)), Ready, on_progress).num_blocks

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._group.processes]

    def submit(self, batch: Batch) -> None:
        self._send(Execute(batch))
        self._num_under_way += 1

    def result(self) -> StepResult:
        if not self._results:
            self._results.append(self._receive({0}, Result).result)
        self._num_under_way -= 1
        return self._results.popleft()

    def drain(self) -> None:
        while self._num_under_way and self._failure is None:
            self.result()

    def use_all_reduce(self, name: str) -> None:
        self._send(UseAllReduce(name))
        self._receive(set(range(len(self._connections))), Ready)

    def describe_all_reduce(self) -> dict[str, Any]:
        self._send(Describe())
        return self._receive({0}, Answer).value

    def close(self) -> None:
        if self._failure is None:
            self._failure = WorkerError("the workers were stopped; make a new LLM")
            for connection in self._connections:
                try:
                    connection.send(Stop())
                except OSError:
                    break  # it died just now: the others are killed below
            else:
                self._group.wait(_STOP_TIMEOUT_S)
        self._end()

    def _send(self, message: object) -> None:
        if self._failure is not None:
            raise self._failure
        data = ForkingPickler.dumps(message)  # what `recv` undoes, once for all ranks
        try:
            for connection in self._connections:
                connection.send_bytes(data)
        except OSError:
            raise self._fail() from None
        except BaseException:
            self._end_by_interrupt()
            raise

    def _receive(self, ranks: set[int], kind: type[T], on_progress: Progress | None = None) -> T:
        """Wait for one message of `kind` from each of `ranks`; the last one. Any bad news ends it."""
        missing = set(ranks)
        try:
            while True:
                for connection in _wait(self._connections):
                    rank = self._connections.index(connection)
                    message = _receive_one(connection)
                    if isinstance(message, kind):
                        missing.discard(rank)
                        if not missing:
                            return message
                    elif isinstance(message, Result):
                        self._results.append(message.result)
                    elif isinstance(message, LoadProgress):
                        if on_progress:
                            on_progress(message.phase, message.done, message.total)
                    else:
                        raise self._fail({rank: message} if message else {})
        except WorkerError:
            raise
        except BaseException:
            self._end_by_interrupt()
            raise

    def _fail(self, reports: Mapping[int, Failed] | None = None) -> WorkerError:
        """Gather the ranks' last words for a moment, end the group, and name the first cause."""
        words = dict(reports or {})
        silent = {
            connection: rank
            for rank, connection in enumerate(self._connections)
            if rank not in words
        }
        deadline_s = time.monotonic() + GRACE_S
        while silent and (left_s := deadline_s - time.monotonic()) > 0:
            if any(code < 0 for code in self._group.own_exits().values()):
                break  # a signal explains everything else
            for connection in _wait(list(silent), left_s):
                message = _receive_one(connection)
                if isinstance(message, Failed):
                    words[silent.pop(connection)] = message
                elif message is None:
                    # A dying process closes its connection a moment before it can be waited for.
                    self._group.await_exit(silent.pop(connection), left_s)
        self._end()
        self._failure = WorkerError(_describe(words, self._group.own_exits(), self.pids))
        return self._failure

    def _end_by_interrupt(self) -> None:
        """An interrupt, or an error in on_progress: the ranks are in the middle of something."""
        self._failure = WorkerError("an interrupt stopped the workers; make a new LLM")
        self._end()

    def _end(self) -> None:
        self._group.kill()
        for connection in self._connections:
            connection.close()


def _wait(connections: list[Connection], timeout_s: float | None = None) -> list[Connection]:
    return cast("list[Connection]", wait(connections, timeout_s))


def _receive_one(connection: Connection) -> Any:
    try:
        return connection.recv()
    except (EOFError, OSError):
        return None


def _describe(words: Mapping[int, Failed], exits: Mapping[int, int], pids: list[int]) -> str:
    """The first cause: a rank that was killed, else one that went silently, else the earliest report."""
    silent = {rank: code for rank, code in exits.items() if rank not in words}
    for rank, code in sorted(silent.items(), key=lambda item: item[1]):
        how = f"exited with code {code}"
        if code < 0:
            how = f"was killed by signal {-code}, {signal.Signals(-code).name}"
            how += " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"rank {rank} (pid {pids[rank]}) {how}; all ranks have been stopped"
    if not words:
        return "a rank closed its connection; all ranks have been stopped"
    rank, word = min(words.items(), key=lambda item: (item[1].is_echo, item[1].at_s))
    return f"rank {rank} failed: {word.summary}; all ranks have been stopped\n\n{word.traceback}"


def _worker_env(env: Mapping[str, str], rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """torchrun's variables, and room for all ranks on this host's cores."""
    has_affinity = hasattr(os, "sched_getaffinity")  # where it has, a job may own few of the cores
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    num_threads = max(1, num_cores // num_ranks)
    root = Path(__file__).parents[1]
    path = env.get("PYTHONPATH", "")
    if root.name not in (
        "site-packages",
        "dist-packages",
    ):  # the driver may know us by sys.path alone
        path = os.pathsep.join(filter(None, (str(root), path)))
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        **env,
        "PYTHONPATH": path,
        "PYTHONSAFEPATH": "1",  # a module in the working directory must not hide one of ours
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
    }
