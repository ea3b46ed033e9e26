# SPDX-License-Identifier: Apache-2.0
"""How the ranks of a process group meet: is the group usable, and what does each rank bring?

Through the group's key-value store, so that ranks that disagree find out before any data is sent, and a
rank that does not come is named. Never on the hot path.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
            f"rank {rank} waited {timeout_s:g} s for {listed(missing)} to take part in '{purpose}' "
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


@dataclass(frozen=True)
class Meeting:
    """Ranks of ``group`` that make the communicator ``name`` together, each waiting ``timeout_s`` for others.

    What they bring is kept by that name: of an earlier one that some ranks gave up, others may have got
    further, and would else meet what is left of it.
    """

    group: ProcessGroup
    name: str
    timeout_s: float

    def exchange(self, purpose: str, value: Any) -> list[Any]:
        """See :func:`exchange_values`."""
        return exchange_values(self.group, f"{purpose} of {self.name}", value, self.timeout_s)

    def together(self, purpose: str, action: Callable[[], _T], more_s: float = 0.0) -> list[_T]:
        """See :func:`together`; ``more_s`` is for what ``action`` takes."""
        wait_s = self.timeout_s + more_s
        return together(self.group, f"{purpose} of {self.name}", action, wait_s)


def _missing(store: Store, keys: list[str]) -> tuple[int, ...]:
    try:
        return tuple(r for r, key in enumerate(keys) if not store.check([key]))
    except RuntimeError:  # the store went down with the rank that hosted it
        return ()


def listed(ranks: Sequence[int]) -> str:
    """Ranks in words, for errors."""
    if not ranks:
        return "the other ranks"
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
