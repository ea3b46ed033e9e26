"""Ranks that load wait for the slowest, and hear at once of one that failed."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch.distributed as dist

from yalis import WorkerError
from yalis.parallel.meeting import together


class Group:
    """As much of a process group as they need, for ranks that are threads."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size

    def get_group_store(self) -> dist.Store:
        return self._store

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def meet(actions: list[Callable[[], Any]], patience_s: float = 30.0, turns: int = 1) -> list[Any]:
    """What became of each rank: the error, or when it left the block."""
    store = dist.HashStore()

    def run(rank: int) -> Any:
        group = cast("dist.ProcessGroup", Group(store, rank, len(actions)))
        try:
            for _ in range(turns):
                with together(group, "loading weights", patience_s):
                    actions[rank]()
        except Exception as error:
            return error
        return time.monotonic()

    with ThreadPoolExecutor(len(actions)) as pool:
        return list(pool.map(run, range(len(actions))))


def nothing() -> None:
    pass


def fail() -> None:
    raise OSError("the disk is gone")


def test_all_leave_when_the_slowest_has_come_every_time() -> None:
    begin_s = time.monotonic()
    for left_s in meet([nothing, lambda: time.sleep(0.3), nothing], turns=2):
        assert left_s - begin_s >= 0.6


def test_one_that_fails_is_named_on_the_others_before_the_slowest_has_come() -> None:
    begin_s = time.monotonic()
    heard_s: list[float] = []
    errors = meet([nothing, lambda: (time.sleep(0.5), heard_s.append(time.monotonic())), fail])
    assert isinstance(errors[2], OSError)
    for error in errors[:2]:
        assert isinstance(error, WorkerError)
        assert str(error) == "rank 2 failed while loading weights: OSError: the disk is gone"
    assert begin_s + 0.5 <= heard_s[0] < begin_s + 5


def test_without_its_store_a_rank_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(store: dist.Store, keys: list[str]) -> bool:
        raise dist.DistNetworkError("Connection reset by peer\nand where")

    monkeypatch.setattr(dist.HashStore, "check", lost)
    for error in meet([nothing, nothing]):
        assert isinstance(error, WorkerError)
        assert "lost the store that the ranks meet in while loading weights" in str(error)
        assert str(error).endswith("usually 0 (Connection reset by peer)")


def test_one_that_hangs_is_named_in_the_end() -> None:
    [waiting, _] = meet([nothing, lambda: time.sleep(0.4)], patience_s=0.2)
    with pytest.raises(WorkerError, match=r"rank 0 waited 0.2 s for ranks \[1\] to end loading"):
        raise waiting
