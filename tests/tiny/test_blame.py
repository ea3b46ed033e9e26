"""Who is to blame, given what the ranks of a failed call have reported. No process, no waiting."""

from __future__ import annotations

import threading
import time

import pytest
from torch.distributed import HashStore

from nvrar import blame
from nvrar.blame import Report, Reports
from nvrar.ending import Ending
from nvrar.errors import ClosedError, DisagreementError, PeerTimeout

CALL, OTHER = "all_reduce of 4", "all_reduce of 5"


class Group:
    """As much of a process group as reports ask for."""

    def __init__(self, store: HashStore, rank: int) -> None:
        self._store, self._rank = store, rank

    def get_group_store(self) -> HashStore:
        return self._store

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return 4


def waits(on: int | None, epoch: int = 5, call: str = CALL, timed_out: bool = True) -> Report:
    return Report(epoch, call, on, "its data did not come in time", timed_out, level=0)


def verdict(
    mine: Report, others: dict[int, list[Report]], monkeypatch: pytest.MonkeyPatch
) -> Exception:
    """What rank 0 concludes from ``mine`` and what the others said, in order."""
    monkeypatch.setattr(blame, "_store_host", lambda _: None)
    store = HashStore()
    for rank, reports in others.items():
        for report in reports:
            Reports(Group(store, rank), "name", 0.4).publish(report)  # type: ignore[arg-type]
    own = Reports(Group(store, 0), "name", 0.4)  # type: ignore[arg-type]
    return own.explain(mine, time.monotonic() + 0.2)


@pytest.mark.parametrize(
    ("mine", "others", "culprits"),
    [
        (waits(1), {}, (1,)),
        (waits(1), {1: [waits(2)]}, (2,)),
        (waits(1), {1: [waits(2)], 2: [waits(3)]}, (3,)),
        # The neighbour failed a call earlier, of the same cause.
        (waits(1, epoch=6), {1: [waits(3, epoch=5)]}, (3,)),
        # Rank 2 came after the others had given up on it: it saw closed connections.
        (waits(2), {2: [waits(0, timed_out=False)]}, (2,)),
        (waits(1), {1: [waits(2)], 2: [waits(1, timed_out=False)]}, (2,)),
        (waits(1, timed_out=False), {1: [waits(0)]}, (0,)),
        (waits(1), {1: [waits(0)]}, (0,)),  # both gave up: somebody is named
        # A refusal that all made long ago explains nothing.
        (waits(1), {1: [Report(3, "", refused="op is 'mean'")]}, (1,)),
        # In torch's all-reduce nobody knows whom it waits for; the silent one is to blame, even if
        # another rank was already in the next call.
        (waits(None), {1: [waits(None)], 2: [waits(None)]}, (3,)),
        (waits(None), {1: [waits(None)], 3: [waits(1, epoch=6)]}, (2,)),
        (waits(1, epoch=6), {1: [waits(None)], 2: [waits(None)]}, (3,)),
        (waits(None), {1: [waits(None)], 2: [waits(None)], 3: [waits(None)]}, ()),
    ],
)
def test_the_one_to_blame(
    mine: Report,
    others: dict[int, list[Report]],
    culprits: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = verdict(mine, others, monkeypatch)
    assert isinstance(error, PeerTimeout), error
    assert error.peers == culprits
    assert (error.rank, error.epoch) == (0, mine.epoch)


def test_others_are_heard_though_the_call_took_all_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blame, "_store_host", lambda _: None)
    store = HashStore()
    own, late = (Reports(Group(store, rank), "name", 4.0) for rank in (0, 1))  # type: ignore[arg-type]
    telling = threading.Timer(0.2, late.publish, [waits(2)])
    telling.start()
    error = own.explain(waits(1), time.monotonic() - 1)
    telling.join()
    assert isinstance(error, PeerTimeout), error
    assert error.peers == (2,)


@pytest.mark.parametrize(("ranks", "host"), [([0, 2], 0), ([1, 0], 1), ([1, 2], None)])
def test_whose_end_takes_the_store_with_it(
    ranks: list[int], host: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blame.dist, "get_process_group_ranks", lambda group: ranks)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert blame._store_host(None) == host
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert blame._store_host(None) is None


@pytest.mark.parametrize(
    ("mine", "others", "text"),
    [
        (waits(1), {1: [waits(0, call=OTHER)]}, "rank 1 was in call 5, all_reduce of 5"),
        (
            waits(1),
            {1: [waits(2)], 2: [waits(1, call=OTHER)]},
            "rank 2 was in call 5, all_reduce of 5",
        ),
        (waits(1), {1: [waits(0, epoch=6)]}, "rank 1 was in call 6, all_reduce of 4"),
        (waits(None), {1: [waits(None, call=OTHER)]}, "rank 1 was in call 5, all_reduce of 5"),
        (
            waits(None),
            {1: [waits(None)], 2: [waits(1, epoch=6)], 3: [waits(None)]},
            "rank 2 was in call 6",
        ),
        # It refused, went on, and failed in its next call before anybody looked.
        (
            waits(1),
            {1: [Report(5, "", refused="op is 'mean'"), waits(2, epoch=6)]},
            "rank 1 refused its arguments in call 5: op is 'mean'",
        ),
    ],
)
def test_calls_that_differ(
    mine: Report, others: dict[int, list[Report]], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = verdict(mine, others, monkeypatch)
    assert isinstance(error, DisagreementError), error
    assert text in str(error)


def test_a_communicator_whose_group_was_destroyed_is_still_to_be_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blame, "_store_host", lambda _: None)
    ending = Ending(Group(HashStore(), 0), "name", 0.4)  # type: ignore[arg-type]
    with pytest.raises(ClosedError, match="was destroyed"):
        ending.fail(waits(1))
    assert [ending.close(), ending.close()] == [True, False]
    with pytest.raises(ClosedError, match="was closed"):
        ending.raise_if_over()
