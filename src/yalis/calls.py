# SPDX-License-Identifier: Apache-2.0
"""One call at a time of what is not thread-safe, and a new beginning after one that was broken off."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from yalis.errors import YalisError

T = TypeVar("T")


class Calls:
    """Whoever has state that half a call would spoil passes its calls through `run`.

    `reset` makes that state as new. It is called where a call raises, and again before the next one where an
    interrupt has broken it off too. It is not kept: its owner could not be let go of by reference counting.
    """

    def __init__(self) -> None:
        self._postponed: deque[Callable[[], object]] = deque()
        # Reentrant, so that an interrupt just after it was taken does not lock this thread out for ever.
        self._lock, self._is_inside, self._is_whole = threading.RLock(), False, True

    def run(self, call: Callable[[], T], reset: Callable[[], None]) -> T:
        """What it returns. Raises YalisError in the middle of another call, which goes on unharmed."""
        result = self._run(call, reset)
        while self._postponed:  # by another thread, when the call was as good as over
            try:
                self._run(lambda: None, reset)
            except YalisError:  # a third is in a call, and will see to it
                break
        return result

    def _run(self, call: Callable[[], T], reset: Callable[[], None]) -> T:
        if not self._lock.acquire(blocking=False):
            raise YalisError(
                "another thread is in a call of this engine; make all calls from one thread, which gets "
                "requests from the others by a queue"
            )
        if self._is_inside:
            self._lock.release()
            raise YalisError(
                "this thread is in the middle of a call of this engine; make no call from a signal's "
                "handler, but note there what to do after it"
            )
        # No context manager: an interrupt may come in its own functions, and the flag would stay.
        try:
            self._is_inside = True
            if not self._is_whole:
                reset()
            self._is_whole = False
            result = call()
            while self._postponed:
                self._postponed.popleft()()
            self._is_whole = True
            return result
        except BaseException:
            with suppress(Exception):  # what comes of an error is not the error
                reset()
                self._is_whole = True
            raise
        finally:
            self._is_inside = False
            self._lock.release()

    def postpone(self, call: Callable[[], object], reset: Callable[[], None]) -> None:
        """Run it now, or at the end of the call that is under way. For any thread, and any place in one."""
        self._postponed.append(call)
        with suppress(YalisError):
            self.run(lambda: None, reset)
