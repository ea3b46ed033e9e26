# SPDX-License-Identifier: Apache-2.0
"""Child processes that end together, and never later than their parent."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_POLL_INTERVAL_S = 0.2
# How long the others may still report, once one has ended, before they are killed.
GRACE_S = 1.5


@dataclass(frozen=True)
class Command:
    """What to start; `inherited_fd` is the one descriptor, beside the standard ones, that it gets."""

    argv: Sequence[str]
    env: Mapping[str, str]
    inherited_fd: int


class ProcessGroup:
    """Starts the commands, watches over them, and kills all as soon as one has ended.

    Each child's standard input is a pipe that this process never writes to: it ends when we do. They are
    started by a thread that lives as long as they do, because the kernel's parent-death signal, which
    the children ask for, means the death of the thread that started them.
    """

    def __init__(self, commands: Sequence[Command]) -> None:
        self._family = _Family()
        started = threading.Event()
        keeper = threading.Thread(
            target=_keep, args=(commands, self._family, started), daemon=True, name="yalis-keeper"
        )
        keeper.start()
        started.wait()
        # Also runs when the interpreter exits, or when nobody holds us any more.
        self._finalizer = weakref.finalize(self, self._family.kill)
        if self._family.error:
            self.kill()
            raise self._family.error

    @property
    def processes(self) -> Sequence[subprocess.Popen[bytes]]:
        return self._family.processes

    def own_exits(self) -> dict[int, int]:
        """The exit codes of those that ended by themselves, by index; negative is a signal's number."""
        return self._family.own_exits()

    def await_exit(self, idx: int, timeout_s: float) -> None:
        """Wait until one has ended, but no longer than that."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.processes[idx].wait(timeout_s)

    def wait(self, timeout_s: float) -> None:
        """Wait until all have ended, but no longer than that; then kill the rest."""
        deadline_s = time.monotonic() + timeout_s
        for idx in range(len(self.processes)):
            self.await_exit(idx, max(0.0, deadline_s - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Kill what still runs and collect every exit status. A second call does nothing."""
        self._family.kill()


class _Family:
    """What the keeper and the owner share; separate, so that the keeper does not keep the owner alive."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.error: OSError | None = None
        self.released = threading.Event()
        self._own_exits: dict[int, int] = {}
        self._lock = threading.Lock()

    def own_exits(self) -> dict[int, int]:
        with self._lock:
            if not self.released.is_set():  # from then on, an exit may be our own doing
                for idx, process in enumerate(self.processes):
                    if (code := process.poll()) is not None:
                        self._own_exits.setdefault(idx, code)
            return dict(self._own_exits)

    def kill(self) -> None:
        self.own_exits()
        with self._lock:
            self.released.set()
            for process in self.processes:
                process.kill()  # does nothing to one that has ended and was waited for
            for process in self.processes:
                process.wait()
                if process.stdin:
                    process.stdin.close()


def _keep(commands: Sequence[Command], family: _Family, started: threading.Event) -> None:
    try:
        for command in commands:
            family.processes.append(_start(command))
    except OSError as error:
        family.error = error
    started.set()
    while not family.released.wait(_POLL_INTERVAL_S):
        if family.own_exits():
            family.released.wait(GRACE_S)
            break
    family.kill()


def _start(command: Command) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        list(command.argv),
        env=dict(command.env),
        stdin=subprocess.PIPE,
        pass_fds=(command.inherited_fd,),
        start_new_session=True,  # an interrupt from the terminal is the driver's to handle
    )
