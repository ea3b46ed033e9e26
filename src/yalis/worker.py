# SPDX-License-Identifier: Apache-2.0
"""One rank as a process: `python -m yalis.worker CONTROL_FD`, started by `yalis.workers` and by nobody else.

It obeys the driver until told to stop, and never outlives it: the kernel sends a signal when the driver
dies, and a thread waits for the end of standard input, which only the driver holds open.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NoReturn

import torch.distributed as dist

from nvrar.launch import Seat
from yalis.device import pick_device
from yalis.drawing import PendingStep
from yalis.messages import (
    Answer,
    Describe,
    Execute,
    Failed,
    LoadProgress,
    Ready,
    Result,
    Start,
    UseAllReduce,
)
from yalis.parallel.group import TensorParallel, join_default_group, open_store
from yalis.parallel.launcher import detect
from yalis.runner import Runner

_PR_SET_PDEATHSIG = 1
_PROGRESS_INTERVAL_S = 0.1


def main() -> None:
    _die_with_parent()
    voice = _Voice(Connection(int(sys.argv[1])))
    try:
        place = detect(os.environ)
        assert place is not None, "the driver sets RANK and WORLD_SIZE"
        _obey(voice, place)
    except BaseException as error:
        voice.fail(error)


def _obey(voice: _Voice, place: Seat) -> None:
    start: Start = voice.receive()
    runner = _make_runner(start, place, _progress_sender(voice) if place.rank == 0 else None)
    voice.send(Ready(runner.num_blocks))
    results: SimpleQueue[PendingStep] = SimpleQueue()
    if place.rank == 0:
        # Of its own thread, so that the next step begins while this one's result is waited for.
        threading.Thread(target=_send_results, args=(voice, results), daemon=True).start()
    while True:
        message = voice.receive()
        if isinstance(message, Execute):
            pending = runner.execute(message.batch)
            if place.rank == 0:
                results.put(pending)
        elif isinstance(message, Describe):
            if place.rank == 0:
                voice.send(Answer(runner.describe_all_reduce()))
        elif isinstance(message, UseAllReduce):
            runner.use_all_reduce(message.name)
            voice.send(Ready(runner.num_blocks))
        else:
            break
    runner.close()
    dist.destroy_process_group()
    os._exit(0)  # all is said and closed: skip the interpreter's slow farewell


def _send_results(voice: _Voice, results: SimpleQueue[PendingStep]) -> None:
    try:
        while True:
            voice.send(Result(results.get().wait()))
    except BaseException as error:
        voice.fail(error)


class _Voice:
    """The connection to the driver, for several threads to speak into."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()

    def receive(self) -> Any:
        return self._connection.recv()

    def send(self, message: object) -> None:
        with self._lock:
            self._connection.send(message)

    def fail(self, error: BaseException) -> NoReturn:
        """Say why, if anybody is left to hear it, and end the process."""
        if not isinstance(error, (EOFError, BrokenPipeError, ConnectionResetError)):
            with contextlib.suppress(OSError):
                self.send(Failed.of(error))
        # Not by returning: the exit handlers of a broken process group may wait for dead peers.
        os._exit(1)


def _make_runner(
    start: Start, place: Seat, on_progress: Callable[[str, int, int], None] | None
) -> Runner:
    options = start.options
    device = pick_device(options.device, place.local_rank)
    store = open_store(place.host, place.port, is_host=False)
    group = join_default_group(store, place.rank, place.world_size, device)
    nodes = (options.num_nodes, place.world_size // options.num_nodes)
    tp = TensorParallel.over(
        group, options.all_reduce, options.all_reduce_plan, nodes,
        is_batch_invariant=options.batch_invariant,
    )  # fmt: skip
    return Runner(options, start.config, tp, device, on_progress)


def _progress_sender(voice: _Voice) -> Callable[[str, int, int], None]:
    next_at_s = 0.0

    def send(phase: str, done: int, total: int) -> None:
        nonlocal next_at_s
        if done == total or time.monotonic() >= next_at_s:
            next_at_s = time.monotonic() + _PROGRESS_INTERVAL_S
            voice.send(LoadProgress(phase, done, total))

    return send


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The signal is lost if the driver died before it was asked for; the end of file is not. And it
    # reaches us on systems without the signal.
    threading.Thread(target=_exit_at_end_of_stdin, daemon=True, name="lifeline").start()


def _exit_at_end_of_stdin() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
