# SPDX-License-Identifier: Apache-2.0
"""Whether a communicator can still be called, and if not, why: what ended it, on this rank and in the job."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from nvrar.blame import Report, Reports
from nvrar.errors import ArgumentError, ClosedError, NvrarError
from nvrar.host_calls import CallLost
from nvrar.meeting import is_destroyed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ending:
    """Of the communicator ``name`` on this rank. Not collective.

    ``error`` is what every further call raises; None while it lives.
    """

    def __init__(self, group: ProcessGroup, name: str, timeout_s: float) -> None:
        self._group, self._name, self._timeout_s = group, name, timeout_s
        self._reports = Reports(group, name, timeout_s)
        # The rest of timeout_s is for finding out who is to blame.
        self.wait_s = timeout_s - self._reports.grace_s
        self.error: NvrarError | None = None
        self._is_closed = False

    def raise_if_over(self) -> None:
        if self.error is not None:
            raise self.error.with_traceback(None)  # else it would grow with every call

    def refuse(self, refusal: str, epoch: int) -> NoReturn:
        """Raises on this rank, and tells the others why their wait in call ``epoch`` is in vain."""
        self._reports.publish(Report(epoch, "", refused=refusal))
        raise ArgumentError(refusal)

    def within_time(self, call: Callable[[float], None]) -> None:
        """Makes ``call``, which is told until when to wait; where it is lost, raises whose fault it was."""
        start = time.monotonic()
        try:
            call(start + self.wait_s)
        except CallLost as lost:
            self._fail(lost.report, start + self._timeout_s, lost.__cause__)

    def fail(self, report: Report) -> NoReturn:
        """Raises what ``report``, of a call that is over, amounts to; now and in every later call."""
        self._fail(report, time.monotonic() + self._reports.grace_s, None)

    def _fail(self, report: Report, deadline: float, cause: BaseException | None) -> NoReturn:
        if is_destroyed(self._group):
            self.error = ClosedError(
                f"the process group of communicator {self._name} was destroyed; make a new group, and "
                "a new communicator on it"
            )
        else:
            self.error = self._reports.explain(report, deadline)
        raise self.error from cause

    def close(self) -> bool:
        """Whether there was something to close; not the second time, and not in a forked child."""
        if self._is_closed:
            return False
        self._is_closed = True
        self.error = ClosedError(
            f"communicator {self._name} was closed; make a new one for further calls"
        )
        return True

    def end_in_child(self) -> None:
        """See :meth:`nvrar.Communicator.end_in_child`."""
        self._is_closed = True
        self.error = ClosedError(
            f"communicator {self._name} was made before this process was forked; make a process group "
            "and a communicator here, or start the process by spawn"
        )
