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
from typing import Any

import torch.distributed as dist

from nvrar.launch import Seat
from yalis.device import pick_device
from yalis.messages import Answer, Describe, Execute, Failed, LoadProgress, Ready, Start, Tokens
from yalis.parallel.group import TensorParallel, join_default_group, open_store
from yalis.parallel.launcher import detect
from yalis.runner import Runner

_PR_SET_PDEATHSIG = 1
_PROGRESS_INTERVAL_S = 0.1


def main() -> None:
    _die_with_parent()
    connection = Connection(int(sys.argv[1]))
    try:
        place = detect(os.environ)
        assert place is not None, "the driver sets RANK and WORLD_SIZE"
        _obey(connection, place)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)  # the driver is gone: nobody is left to tell
    except BaseException as error:
        with contextlib.suppress(OSError):
            connection.send(Failed.of(error))
        # Not by returning: the exit handlers of a broken process group may wait for dead peers.
        os._exit(1)


def _obey(connection: Connection, place: Seat) -> None:
    start: Start = connection.recv()
    runner = _make_runner(start, place, _progress_sender(connection) if place.rank == 0 else None)
    connection.send(Ready())
    while True:
        message = connection.recv()
        if isinstance(message, Execute):
            token_ids = runner.execute(message.batch)
            answer: Any = Tokens(token_ids)
        elif isinstance(message, Describe):
            answer = Answer(runner.describe_all_reduce())
        else:
            break
        if place.rank == 0:
            connection.send(answer)
    runner.close()
    dist.destroy_process_group()
    os._exit(0)  # all is said and closed: skip the interpreter's slow farewell


def _make_runner(
    start: Start, place: Seat, on_progress: Callable[[str, int, int], None] | None
) -> Runner:
    options = start.options
    device = pick_device(options.device, place.local_rank)
    store = open_store(place.host, place.port, is_host=False)
    group = join_default_group(store, place.rank, place.world_size, device)
    nodes = (options.num_nodes, place.world_size // options.num_nodes)
    tp = TensorParallel.over(group, options.all_reduce, options.all_reduce_plan, nodes)
    return Runner(options, start.config, tp, device, on_progress)


def _progress_sender(connection: Connection) -> Callable[[str, int, int], None]:
    next_at_s = 0.0

    def send(phase: str, done: int, total: int) -> None:
        nonlocal next_at_s
        if done == total or time.monotonic() >= next_at_s:
            next_at_s = time.monotonic() + _PROGRESS_INTERVAL_S
            connection.send(LoadProgress(phase, done, total))

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
