"""What ranks tell each other beside the data: through the key-value store of their process group.

Twice in a communicator's life: at its creation, so that all ranks agree before any of them starts
(:func:`exchange_values`), and after a call has failed, so that every rank can name the one to blame
rather than the neighbour that merely waited for it too (:class:`Sideband`). Never on the hot path.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from nvrar.errors import ClosedError, DisagreementError, NvrarError, PeerTimeout

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.distributed import ProcessGroup

_POLL_S = 0.02
_GONE = (
    "the store that ranks report to does not answer, so this is the nearest rank seen, and the one "
    "that hosts the store may be the one that stopped"
)


def store_of(group: ProcessGroup) -> Store:
    """The store that ``group`` was made with; every rank of the group can reach it."""
    try:
        return group.get_group_store()
    except RuntimeError as error:
        raise ClosedError(
            "the process group has no store: it was destroyed, or made without one; "
            "make it with torch.distributed.init_process_group or new_group"
        ) from error


def exchange_values(group: ProcessGroup, purpose: str, value: Any, timeout_s: float) -> list[Any]:
    """Every rank's ``value`` (anything JSON can carry), by group rank. Collective over ``group``.

    Raises:
        PeerTimeout: some ranks did not bring theirs within ``timeout_s``; it names them all.
    """
    store, rank = store_of(group), group.rank()
    # The n-th exchange of a purpose on one rank meets the n-th of every other; the store counts, so
    # that no process has to remember.
    turn = store.add(f"nvrar/{purpose}/turns/{rank}", 1)
    keys = [f"nvrar/{purpose}/{turn}/{r}" for r in range(group.size())]
    store.set(keys[rank], json.dumps(value))
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError as error:
        missing = _missing(store, keys)
        raise PeerTimeout(
            f"rank {rank} waited {timeout_s:g} s for {_ranks(missing)} to take part in '{purpose}' "
            f"(turn {turn} on this group); it is collective: start it on all {group.size()} ranks of "
            "the group, or raise timeout_s if they were only late",
            rank=rank,
            peers=missing,
        ) from error
    return [json.loads(store.get(key)) for key in keys]


def _missing(store: Store, keys: list[str]) -> tuple[int, ...]:
    try:
        return tuple(r for r, key in enumerate(keys) if not store.check([key]))
    except RuntimeError:  # the store went down with the rank that hosted it
        return ()


def _ranks(ranks: tuple[int, ...]) -> str:
    if not ranks:
        return (
            "ranks it cannot name, because the store is gone too (did the rank that hosts it die?)"
        )
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


@dataclass(frozen=True)
class Report:
    """What one rank says of a call that went wrong for it."""

    epoch: int
    call: str  # the call as this rank made it, equal on all ranks when nobody is wrong
    waits_on: int | None = None  # the rank whose data did not come
    reason: str = ""  # how this rank knows
    timed_out: bool = (
        False  # it spent its whole budget waiting, rather than seeing a connection end
    )
    level: int | None = None
    refused: str = ""  # this rank raised at once: its own arguments were wrong

    def same_call(self, other: Report) -> bool:
        return not self.refused and (self.epoch, self.call) == (other.epoch, other.call)


class Sideband:
    """Reports of one communicator's failed calls, by group rank."""

    def __init__(self, group: ProcessGroup, name: str, timeout_s: float) -> None:
        self._store = store_of(group)
        self._rank = group.rank()
        self._size = group.size()
        self._prefix = f"nvrar/report/{name}"
        self._timeout_s = timeout_s
        # Part of the budget is kept for finding out who is to blame, so that PeerTimeout is raised
        # within timeout_s all told.
        self.grace_s = min(1.0, timeout_s / 4)

    def publish(self, report: Report) -> None:
        self._store.set(f"{self._prefix}/{self._rank}", json.dumps(asdict(report)))

    def explain(self, mine: Report) -> NvrarError:
        """The error to raise on this rank for a wait that ended without its data.

        Follows who waits on whom from rank to rank to the one that reported nothing: that one is dead,
        stuck or elsewhere. Takes at most ``grace_s``, whatever state the store is in.
        """
        found: list[NvrarError] = []
        seeker = threading.Thread(target=lambda: found.append(self._follow(mine)), daemon=True)
        seeker.start()
        seeker.join(self.grace_s + 0.2)
        if found:
            return found[0]
        assert mine.waits_on is not None
        return self._timeout(
            mine, mine.waits_on, f"{mine.reason}; the store does not answer either"
        )

    def _follow(self, mine: Report) -> NvrarError:
        assert mine.waits_on is not None
        deadline = time.monotonic() + self.grace_s
        suspect, witness, seen = mine.waits_on, mine, {self._rank}
        try:
            self.publish(mine)
            while suspect not in seen:
                report = self._read(suspect, deadline)
                if report is None or report.epoch < mine.epoch:
                    break  # silent in this call: it is the one
                if report.refused or (report.epoch, report.call) != (mine.epoch, mine.call):
                    return self._disagreement(mine, suspect, report)
                if report.waits_on is None:
                    break
                seen.add(suspect)
                suspect, witness = report.waits_on, report
        except RuntimeError:
            return self._timeout(
                mine, mine.waits_on, f"{mine.reason}; the store that ranks report to is gone too, "
                "so the rank that hosts it may be the one that died"
            )  # fmt: skip
        return self._timeout(mine, suspect, witness.reason)

    def _read(self, rank: int, deadline: float) -> Report | None:
        key = f"{self._prefix}/{rank}"
        while not self._store.check([key]):
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL_S)
        return Report(**json.loads(self._store.get(key)))

    def _disagreement(self, mine: Report, other: int, theirs: Report) -> NvrarError:
        if theirs.refused:
            said = f"rank {other} refused its arguments in call {theirs.epoch}: {theirs.refused}"
        else:
            said = f"rank {other} was in call {theirs.epoch}, {theirs.call}"
        return DisagreementError(
            f"rank {self._rank} is in call {mine.epoch}, {mine.call}; {said}. All ranks must make the "
            "same calls in the same order. The communicator is broken; make a new one"
        )

    def _timeout(self, mine: Report, culprit: int | None, reason: str) -> NvrarError:
        where = "" if mine.level is None else f"level {mine.level} of "
        blamed = "the other ranks" if culprit is None else f"rank {culprit}"
        did = "came too late" if culprit == self._rank else f"gave up on {blamed}"
        return PeerTimeout(
            f"rank {self._rank} {did} at {where}call {mine.epoch}, {mine.call}: {reason}. "
            f"The communicator is broken (and with gloo its process group too). Look first at what "
            f"{blamed} logged; then start anew, with a larger timeout_s than {self._timeout_s:g} if it "
            "was only late",
            rank=self._rank,
            peers=() if culprit is None else (culprit,),
            epoch=mine.epoch,
            level=mine.level,
        )
