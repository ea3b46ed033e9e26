# SPDX-License-Identifier: Apache-2.0
"""Whose fault it was that a call failed: what every rank tells the others of it.

The one to blame is to be named on every rank, rather than the neighbour that merely waited for it too. So
ranks leave reports in the store of their process group, and follow them from rank to rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from nvrar.errors import DisagreementError, NvrarError, PeerTimeout
from nvrar.meeting import listed, store_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_T = TypeVar("_T")
_POLL_S = 0.02


@dataclass(frozen=True)
class Report:
    """What one rank says of a call that went wrong for it."""

    epoch: int
    call: str  # the call as this rank made it, equal on all ranks when nobody is wrong
    waits_on: int | None = None  # the rank whose data did not come, if it knows which
    reason: str = ""  # how this rank knows
    timed_out: bool = False  # its whole budget went by, rather than that it saw a connection end
    level: int | None = None
    refused: str = ""  # this rank raised at once: its own arguments were wrong

    def same_call(self, other: Report) -> bool:
        return (self.epoch, self.call) == (other.epoch, other.call)


class Reports:
    """Reports of one communicator's failed calls, by group rank."""

    def __init__(self, group: ProcessGroup, name: str, timeout_s: float) -> None:
        self._store = store_of(group)
        self._rank = group.rank()
        self._size = group.size()
        self._store_host = _store_host(group)
        self._prefix = f"nvrar/report/{name}"
        self._timeout_s = timeout_s
        # Part of the budget is kept for finding out who is to blame, so that PeerTimeout is raised
        # within timeout_s all told.
        self.grace_s = min(1.0, timeout_s / 4)

    def publish(self, report: Report) -> None:
        """Says ``report`` to whoever asks. Takes at most ``grace_s``, whatever state the store is in."""
        self._bounded(lambda: self._set(report), self.grace_s)

    def explain(self, mine: Report, deadline: float) -> NvrarError:
        """The error to raise on this rank for a call that ended without its data.

        Follows who waits on whom from rank to rank, to the one that reported nothing: that one is dead,
        stuck or elsewhere. Takes at most ``grace_s``; where a rank could not tell whom it waited for, all
        are heard first, until ``deadline`` (of ``time.monotonic``).
        """
        deadline = max(deadline, time.monotonic() + self.grace_s)
        found = self._bounded(
            lambda: self._judge(mine, deadline - 0.2 * self.grace_s), deadline - time.monotonic()
        )
        if found is not None:
            return found
        host = self._store_host
        hosted = "" if host is None else f", and rank {host} hosts it unless you made it yourself"
        return self._timeout(
            mine,
            [r for r in (mine.waits_on if host is None else host,) if r is not None],
            f"{mine.reason}; the store that ranks report to does not answer either{hosted}",
        )

    def _bounded(self, action: Callable[[], _T], seconds: float) -> _T | None:
        """What ``action`` returns; None if the store fails it or keeps it waiting."""
        found: list[_T] = []

        def act() -> None:
            with contextlib.suppress(RuntimeError):
                found.append(action())

        seeker = threading.Thread(target=act, name="nvrar reports", daemon=True)
        seeker.start()
        seeker.join(max(seconds, 0.05))
        return found[0] if found else None

    def _set(self, report: Report) -> None:
        # A refusal does not end a communicator, so it must outlast the failure that it leads to.
        key = self._refusal_key if report.refused else self._failure_key
        self._store.set(key(self._rank), json.dumps(asdict(report)))

    def _failure_key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"

    def _refusal_key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}/refusal"

    def _judge(self, mine: Report, deadline: float) -> NvrarError:
        self._set(mine)
        if mine.waits_on is None:
            return self._hear_all(mine, deadline)
        soon = min(deadline, time.monotonic() + 0.8 * self.grace_s)
        path = {self._rank: mine}
        witness, suspect = mine, mine.waits_on
        while suspect not in path:
            report = self._read(suspect, mine.epoch, soon)
            if report is None:  # silent: it is the one
                return self._timeout(mine, [suspect], witness.reason)
            if report.refused or (report.epoch == mine.epoch and not report.same_call(mine)):
                return self._disagreement(mine, suspect, report)
            path[suspect] = report
            if report.waits_on is None:
                return self._hear_all(mine, deadline)
            witness, suspect = report, report.waits_on
        # They wait on each other. In one call only a latecomer closes such a ring: it waits on a rank
        # that had given up on it, and sees a closed connection where the others spent their time.
        ring = list(path)[list(path).index(suspect) :]
        if any(not path[rank].same_call(path[suspect]) for rank in ring):
            odd = next(rank for rank in ring if not path[rank].same_call(mine))
            return self._disagreement(mine, odd, path[odd])
        late = [rank for rank in ring if not path[rank].timed_out]
        return self._timeout(mine, late or [suspect], witness.reason)

    def _hear_all(self, mine: Report, deadline: float) -> NvrarError:
        heard = {
            rank: self._read(rank, mine.epoch, deadline)
            for rank in range(self._size)
            if rank != self._rank
        }
        told = {rank: report for rank, report in heard.items() if report is not None}
        for rank, report in told.items():
            if report.refused or (report.epoch == mine.epoch and not report.same_call(mine)):
                return self._disagreement(mine, rank, report)
        silent = [rank for rank in heard if rank not in told]
        # Of ranks that lost the same peer one may have been a call ahead; with nobody lost, they differ.
        odd = [rank for rank, report in told.items() if not report.same_call(mine)]
        if odd and not silent:
            return self._disagreement(mine, odd[0], told[odd[0]])
        return self._timeout(mine, silent, mine.reason)

    def _read(self, rank: int, epoch: int, deadline: float) -> Report | None:
        """What ``rank`` says went wrong, if anything did by ``deadline``."""
        while True:
            for key in (self._refusal_key(rank), self._failure_key(rank)):
                if self._store.check([key]):
                    report = Report(**json.loads(self._store.get(key)))
                    if not report.refused or report.epoch >= epoch:  # refusals of the past are over
                        return report
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL_S)

    def _disagreement(self, mine: Report, other: int, theirs: Report) -> NvrarError:
        if theirs.refused:
            said = f"rank {other} refused its arguments in call {theirs.epoch}: {theirs.refused}"
        else:
            said = f"rank {other} was in call {theirs.epoch}, {theirs.call}"
        return DisagreementError(
            f"rank {self._rank} is in call {mine.epoch}, {mine.call}; {said}. All ranks must make the "
            "same calls in the same order. The communicator is broken (and with gloo its process group "
            "too: torch.distributed.new_group makes another); make a new one"
        )

    def _timeout(self, mine: Report, culprits: list[int], reason: str) -> NvrarError:
        where = "" if mine.level is None else f"level {mine.level} of "
        blamed = listed(culprits)
        did = "came too late" if culprits == [self._rank] else f"gave up on {blamed}"
        return PeerTimeout(
            f"rank {self._rank} {did} at {where}call {mine.epoch}, {mine.call}: {reason}. "
            f"The communicator is broken (and with gloo its process group too). Look first at what "
            f"{blamed} logged; then start anew, with a larger timeout_s than {self._timeout_s:g} if it "
            "was only late",
            rank=self._rank,
            peers=tuple(culprits),
            epoch=mine.epoch,
            level=mine.level,
        )


def _store_host(group: ProcessGroup) -> int | None:
    """The group rank whose end takes the store with it, where torch made the store: rank 0 of all,
    except under torchrun, whose agent outlives the ranks."""
    ranks = dist.get_process_group_ranks(group)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or 0 not in ranks:
        return None
    return ranks.index(0)
