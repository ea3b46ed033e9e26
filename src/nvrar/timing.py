# SPDX-License-Identifier: Apache-2.0
"""How a call is timed: one at a time from the host, or many of them in a CUDA graph.

A clock is made of a call and gives samples in microseconds. Making one and asking it are collective where
the call is: all ranks do the same in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from nvrar.errors import PeerTimeout

CALLS_IN_A_ROW = 20
_SLEEP_CYCLES = 200_000  # about 0.1 ms: longer than the host takes to queue a barrier and a graph


class Clock(Protocol):
    """Times one contender."""

    def samples(self, count: int) -> list[float]:
        """``count`` times of a call on this rank, in microseconds. Collective."""


class HostClock:
    """Calls from the host: on CPU tensors each alone, until it is done; on a GPU the time to queue one.

    On a GPU a sample is some calls in a row, as a model makes them, divided by their number: of a single one
    much would be caches that grew cold while the host waited.

    Args:
        call: what is timed.
        reset: called before each sample, outside the time.
        num_warmup: samples before the first that counts.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        call: Callable[[], object],
        reset: Callable[[], object],
        device: str,
        num_warmup: int,
    ) -> None:
        self._group, self._call, self._reset, self._device = group, call, reset, device
        self._num_calls = CALLS_IN_A_ROW if device == "cuda" else 1
        self.samples(num_warmup)

    def samples(self, count: int) -> list[float]:
        times_us = []
        barrier(self._group, self._device)
        for _ in range(count):
            self._reset()
            if self._device == "cuda":
                torch.cuda.synchronize()  # else the host may have to wait for room in the queue
            start = time.perf_counter_ns()
            for _ in range(self._num_calls):
                self._call()
            times_us.append((time.perf_counter_ns() - start) / 1e3 / self._num_calls)
        return times_us


class GraphClock:
    """A graph of calls, replayed; a sample is the time of a replay divided by its calls. On GPUs only.

    The replay is queued behind a barrier that runs on the GPUs, and that behind a short sleep: so it starts
    at the same moment on all of them, and no time of the host is in it.

    Args:
        group: None where one process does it all.
        between: queued in front of each call, as in a model other kernels are; its time is in the sample.
        num_warmup: calls before the capture.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        call: Callable[[], object],
        num_warmup: int,
        between: Callable[[], object] | None = None,
        num_calls: int = CALLS_IN_A_ROW,
    ) -> None:
        self._token = torch.zeros(1, device="cuda")
        self._group, self._num_calls = group, num_calls
        self._start, self._stop = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(max(num_warmup, 1)):  # what is made lazily cannot be made in a capture
                call()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, stream=stream):
            for _ in range(num_calls):
                if between is not None:
                    between()
                call()

    def samples(self, count: int) -> list[float]:
        times_us = []
        for _ in range(count):
            torch.cuda.synchronize()
            torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]
            if self._group is not None:
                meet(self._group, self._token)
            self._start.record()
            self._graph.replay()
            self._stop.record()
            self._stop.synchronize()
            times_us.append(self._start.elapsed_time(self._stop) * 1e3 / self._num_calls)
        return times_us


def in_turns(
    group: dist.ProcessGroup,
    clocks: Sequence[Clock],
    rounds: int,
    count: int,
    device: str,
    on_round: Callable[[int], object] = lambda number: None,
) -> list[list[float]]:
    """Of each clock ``rounds * count`` samples, in microseconds: the longest over the ranks. Collective.

    The clocks take turns, in another order each round (:func:`turns`). ``on_round`` is told the number of
    each round, from 1, before it begins.
    """
    samples: list[list[float]] = [[] for _ in clocks]
    for number, order in enumerate(turns(len(clocks), rounds), start=1):
        on_round(number)
        for i in order:
            samples[i] += clocks[i].samples(count)
    longest = torch.tensor(samples, dtype=torch.float64, device=device)
    meet(group, longest)
    found: list[list[float]] = longest.tolist()
    return found


def turns(num_contenders: int, num_rounds: int) -> list[tuple[int, ...]]:
    """The order of contenders in each round: a Williams design.

    Merely rotating one order would leave everybody behind the same neighbour. Here over
    ``num_contenders`` rounds (twice that, for an odd number) everybody comes once, or twice, after
    everybody else, and equally often in each place.
    """
    n = num_contenders
    zigzag = [(i + 1) // 2 if i % 2 else (n - i // 2) % n for i in range(n)]  # 0 1 n-1 2 n-2 ...
    orders = [tuple((step + shift) % n for step in zigzag) for shift in range(n)]
    if n % 2:
        orders += [tuple(reversed(order)) for order in orders]
    return [orders[r % len(orders)] for r in range(num_rounds)]


def barrier(group: dist.ProcessGroup, device: str) -> None:
    """Returns when all ranks have come, and the GPU has nothing more to do. Collective."""
    meet(group, torch.zeros(1, device=device))
    if device == "cuda":
        torch.cuda.synchronize()


def meet(group: dist.ProcessGroup, x: torch.Tensor) -> None:
    """``x`` becomes the maximum over the ranks. Collective."""
    try:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    except RuntimeError as error:
        raise lost(group, error) from error


def lost(group: dist.ProcessGroup, error: RuntimeError) -> PeerTimeout:
    """The error to raise for one of torch's collectives, which do not say who is missing."""
    return PeerTimeout(
        f"rank {group.rank()} lost another rank in torch.distributed: {str(error).splitlines()[0]}; look "
        "first at what the other ranks said",
        rank=group.rank(),
        peers=(),
    )
