# SPDX-License-Identifier: Apache-2.0
"""How far a long phase has come, on standard error: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_QUIET_S = 1.0  # a phase shorter than this says nothing
_LINE_INTERVAL_S = 5.0


class TerminalProgress:
    """A context manager to call with (phase, done, total). Shows nothing when `is_shown` is False."""

    def __init__(self, *, is_shown: bool = True) -> None:
        self._is_shown = is_shown
        self._phase = ""
        self._next_line_s = 0.0  # or the bar's, when it first comes
        self._stack = ExitStack()
        self._bars: Progress | None = None

    def __enter__(self) -> TerminalProgress:
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
        if phase != self._phase:
            self._phase, self._next_line_s = phase, time.monotonic() + _QUIET_S
            self._stack.close()
            self._bars = None
        elif self._bars is not None:
            self._bars.update(self._bars.task_ids[-1], completed=done, total=total)
        elif time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + _LINE_INTERVAL_S
            if sys.stderr.isatty():
                self._bars = self._stack.enter_context(_bar())
                self._bars.add_task(phase, completed=done, total=total)
            else:
                print(f"{phase}: {done} of {total}", file=sys.stderr, flush=True)


def _bar() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
