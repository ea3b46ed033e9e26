"""Ranks of a tensor-parallel group that are threads of this process: for tests of layers and models."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from yalis.parallel.all_reduce import AllReduce
from yalis.parallel.group import TensorParallel

T = TypeVar("T")


def on_ranks(size: int, run: Callable[[TensorParallel], T]) -> list[T]:
    """What `run` returns on each of `size` ranks, which meet in collectives."""
    meeting = Meeting(size)
    ranks = [
        ThreadParallel(rank, size, ThreadAllReduce(meeting, rank), meeting=meeting)
        for rank in range(size)
    ]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, ranks))


class Meeting:
    """Where ranks that are threads leave what each has, and find what all have."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=60)
        self._parts: list[Any] = [None] * size

    def exchange(self, rank: int, part: Any) -> list[Any]:
        self._parts[rank] = part
        self._barrier.wait()
        parts = list(self._parts)
        self._barrier.wait()
        return parts


class ThreadAllReduce(AllReduce):
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self._rank = meeting, rank

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack(self._meeting.exchange(self._rank, x)).sum(dim=0)


@dataclass(frozen=True)
class ThreadParallel(TensorParallel):
    meeting: Meeting | None = None

    def gather(self, x: Tensor) -> Tensor | None:
        assert self.meeting is not None
        parts = self.meeting.exchange(self.rank, x)
        return torch.cat(parts, dim=-1) if self.rank == 0 else None
