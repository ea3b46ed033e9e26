"""What ranks tell each other beside the data: through the key-value store of their process group.

Twice in a communicator's life: at its creation, so that all ranks agree before any of them starts
(:func:`exchange_values`), and after a call has failed, so that every rank can name the one to blame
rather than the neighbour that merely waited for it too (:class:`Sideband`). Never on the hot path.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from nvrar.errors import (
    ArgumentError,
    DisagreementError,
    GpuUnavailable,
    NvrarError,
    PeerTimeout,
)

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.distributed import ProcessGroup

_T = TypeVar("_T")
_POLL_S = 0.02


def resolve_group(group: ProcessGroup | None) -> ProcessGroup:
    """``group``, or the default group for None.

    Raises:
        ArgumentError: there is none, it was destroyed, or it does not hold this rank.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ArgumentError(
            "torch.distributed is not initialised; call torch.distributed.init_process_group first "
            "(torchrun sets the environment that it needs)"
        )
    found = dist.group.WORLD if group is None else group
    if not isinstance(found, dist.ProcessGroup):
        if found is not dist.GroupMember.NON_GROUP_MEMBER:  # new_group gives it to other ranks
            raise ArgumentError(
                f"group is {type(found).__name__}, not a torch.distributed.ProcessGroup; new_group "
                "makes one, and DeviceMesh.get_group gives that of a dimension"
            )
        raise ArgumentError(
            f"group is {group!r}, which does not hold rank {dist.get_rank()}; use it only on the "
            "ranks that it was made of"
        )
    if is_destroyed(found):
        raise ArgumentError("group was destroyed; make a new one with torch.distributed.new_group")
    return found


def is_destroyed(group: ProcessGroup) -> bool:
    """Whether destroy_process_group was called on ``group``, or on all groups."""
    try:
        return not dist.get_process_group_ranks(group)
    except (KeyError, RuntimeError, ValueError):
        return True


def store_of(group: ProcessGroup) -> Store:
    """The store that ``group`` was made with; every rank of the group can reach it."""
    try:
        return group.get_group_store()
    except RuntimeError as error:
        raise ArgumentError(
            "the process group was made without a store; "
            "make it with torch.distributed.init_process_group or new_group"
        ) from error


def exchange_values(group: ProcessGroup, purpose: str, value: Any, timeout_s: float) -> list[Any]:
    """Every rank's ``value`` (anything JSON can carry), by group rank. Collective over ``group``.

    Raises:
        PeerTimeout: some ranks did not bring theirs within ``timeout_s``; it names them all.
    """
    store, rank = store_of(group), group.rank()
    turn = 0
    keys: list[str] = []
    try:
        turn, keys = _bring(group, purpose, value)
        store.wait(keys, timedelta(seconds=timeout_s))
        return [json.loads(store.get(key)) for key in keys]
    except RuntimeError as error:
        missing = _missing(store, keys)
        raise PeerTimeout(
            f"rank {rank} waited {timeout_s:g} s for {_listed(missing)} to take part in '{purpose}' "
            f"(turn {turn} on this group); it is collective: start it on all {group.size()} ranks of "
            f"the group, or raise timeout_s if they were only late ({_first_line(error)})",
            rank=rank,
            peers=missing,
        ) from error


def _bring(group: ProcessGroup, purpose: str, value: Any) -> tuple[int, list[str]]:
    """Leaves ``value`` in the store; the turn, and where all ranks' values are or will be."""
    store, rank = store_of(group), group.rank()
    # The n-th exchange of a purpose on one rank meets the n-th of every other; the store counts,
    # so that no process has to remember.
    turn = store.add(f"nvrar/{purpose}/turns/{rank}", 1)
    keys = [f"nvrar/{purpose}/{turn}/{r}" for r in range(group.size())]
    store.set(keys[rank], json.dumps(value))
    return turn, keys


def together(
    group: ProcessGroup, purpose: str, action: Callable[[], _T], timeout_s: float
) -> list[_T]:
    """Every rank's result of ``action`` (anything JSON can carry); where one fails, all do. Collective.

    Raises:
        GpuUnavailable: a rank's ``action`` raised it, and none anything else; on every rank.
        NvrarError: this rank's ``action`` raised it.
        DisagreementError: another rank's did.
        PeerTimeout: a rank did not come within ``timeout_s``.
    """
    failure: NvrarError | None = None
    mine: dict[str, Any] = {"value": None, "error": None}
    try:
        mine["value"] = action()
    except Exception as error:  # whatever it is, the others must not wait in vain
        failure = error if isinstance(error, NvrarError) else NvrarError(f"{purpose}: {error!r}")
        failure.__cause__ = error.__cause__ if failure is error else error
        mine["error"] = {"text": str(failure), "lacks": isinstance(failure, GpuUnavailable)}
    said = exchange_values(group, purpose, mine, timeout_s)
    failed = [(r, s["error"]) for r, s in enumerate(said) if s["error"] is not None]
    if not failed:
        return [s["value"] for s in said]
    wrong = [(r, e) for r, e in failed if not e["lacks"]]
    rank, told = (wrong or failed)[0]
    if not wrong:
        raise GpuUnavailable(f"rank {rank}: {told['text']}") from failure
    if failure is not None and not isinstance(failure, GpuUnavailable):
        raise failure
    raise DisagreementError(f"rank {rank}: {told['text']}")


def stay_out(group: ProcessGroup, purpose: str, reason: str) -> None:
    """For a rank that cannot take part in ``together``: all others raise GpuUnavailable. Does not wait."""
    _bring(group, purpose, {"value": None, "error": {"text": reason, "lacks": True}})


def _missing(store: Store, keys: list[str]) -> tuple[int, ...]:
    try:
        return tuple(r for r, key in enumerate(keys) if not store.check([key]))
    except RuntimeError:  # the store went down with the rank that hosted it
        return ()


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


class Sideband:
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

        seeker = threading.Thread(target=act, name="nvrar sideband", daemon=True)
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
        blamed = _listed(culprits)
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


def _listed(ranks: Sequence[int]) -> str:
    if not ranks:
        return "the other ranks"
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
