# SPDX-License-Identifier: Apache-2.0
"""A bar on stderr for what takes longer than a second."""

from __future__ import annotations

import time
from types import TracebackType

import rich.progress
from rich.console import Console

_PATIENCE_S = 1.0
_LINE_EVERY_S = 10.0  # where there is no terminal to draw a bar on


class Progress:
    """Counts steps. Draws at steps only: a thread that redraws would take time from what is measured."""

    def __init__(self, num_steps: int, is_shown: bool) -> None:
        self._num_steps = num_steps
        self._is_shown = is_shown
        self._console = Console(stderr=True)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description:<32}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("", total=num_steps)
        self._is_drawn = False
        self._num_begun = 0
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_drawn:
            self._bar.stop()

    def step(self, what: str) -> None:
        """The next step begins."""
        done, self._num_begun = self._num_begun, self._num_begun + 1
        now = time.monotonic()
        if not self._is_shown or now - self._started < _PATIENCE_S:
            return
        if self._console.is_terminal:
            if not self._is_drawn:
                self._bar.start()
                self._is_drawn = True
            self._bar.update(self._task, description=what, completed=done, refresh=True)
        elif now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            self._console.print(f"{what} ({done} of {self._num_steps} steps done)")
