# SPDX-License-Identifier: Apache-2.0
"""How far a long phase has come, on standard error: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_QUIET_S = 1.0  # a phase shorter than this says nothing in a log
_LINE_INTERVAL_S = 5.0


class TerminalProgress:
    """A context manager to call with (phase, done, total). Shows nothing when `is_shown` is False."""

    def __init__(self, *, is_shown: bool = True) -> None:
        self._is_shown = is_shown
        self._phase = ""
        self._next_line_s = 0.0
        self._stack = ExitStack()
        self._bars: Progress | None = None

    def __enter__(self) -> TerminalProgress:
        if self._is_shown and sys.stderr.isatty():
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
            bars = Progress(
                *columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True
            )
            self._bars = self._stack.enter_context(bars)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __call__(self, phase: str, done: int, total: int) -> None:
        if not self._is_shown:
            return
        is_new = phase != self._phase
        self._phase = phase
        if self._bars is not None:
            if is_new:
                for task_id in self._bars.task_ids:
                    self._bars.remove_task(task_id)
                self._bars.add_task(phase, total=total)
            self._bars.update(self._bars.task_ids[-1], completed=done, total=total)
        elif is_new:
            self._next_line_s = time.monotonic() + _QUIET_S
        elif time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + _LINE_INTERVAL_S
            print(f"{phase}: {done} of {total}", file=sys.stderr, flush=True)
