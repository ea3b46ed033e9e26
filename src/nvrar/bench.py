"""How long an all-reduce takes: contenders side by side, in one interleaved run.

For each size every contender is first checked (:mod:`nvrar.verify`) and warmed up; then they take turns
in batches of calls. A call's time is the longest over the ranks. Nothing here prints or writes: the
commands do (:mod:`nvrar.record`, :mod:`nvrar.report`).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nvrar.contenders import Contender, lost
from nvrar.cost import Machine, time_us
from nvrar.errors import ArgumentError
from nvrar.host import OPS
from nvrar.plan import Plan
from nvrar.topology import Topology
from nvrar.units import format_size
from nvrar.verify import verify


@dataclass(frozen=True)
class Settings:
    """How to measure. ``rounds`` batches of ``iterations`` calls for each contender and size."""

    dtype: torch.dtype = torch.bfloat16
    op: str = "sum"
    device: str = "cpu"
    iterations: int = 20
    rounds: int = 4
    warmup: int = 5
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ArgumentError(f"op is {self.op!r}; it must be one of {', '.join(OPS)}")
        if self.op == "avg" and not self.dtype.is_floating_point:
            raise ArgumentError(f"op 'avg' needs a floating type, and dtype is {self.dtype}")
        if not 0 < self.timeout_s < math.inf:
            raise ArgumentError(f"timeout is {self.timeout_s:g} s; it must be above 0, and finite")
        for name, least in (("iterations", 1), ("rounds", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ArgumentError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    def num_elements(self, num_bytes: int) -> int:
        """Of a message of ``num_bytes``.

        Raises:
            ArgumentError: not a whole number of elements, or none.
        """
        if num_bytes < 1 or num_bytes % self.dtype.itemsize:
            raise ArgumentError(
                f"size {num_bytes} is not a multiple of the {self.dtype.itemsize} bytes of {self.dtype}"
            )
        return num_bytes // self.dtype.itemsize


@dataclass(frozen=True)
class Measurement:
    """One contender at one size. Equal on all ranks, but for the calls that fell back."""

    contender: str
    num_bytes: int
    plan: str | None
    samples_us: tuple[float, ...]  # the longest over the ranks of each timed call, in order
    fallbacks: Mapping[str, int] = field(default_factory=dict)  # of the timed calls, by reason
    executor: str = "host"  # of those that did not fall back
    predicted_us: float | None = None

    def percentile_us(self, percent: float) -> float:
        return float(np.percentile(self.samples_us, percent))

    @property
    def median_us(self) -> float:
        return self.percentile_us(50)

    @property
    def min_us(self) -> float:
        return min(self.samples_us)


def measure(
    group: dist.ProcessGroup,
    topology: Topology,
    entrants: Sequence[Contender],
    sizes: Sequence[int],
    settings: Settings,
    machine: Machine | None = None,
    on_step: Callable[[str], None] = lambda what: None,
) -> list[Measurement]:
    """Every contender at every size (bytes), by size, then in the contenders' order. Collective.

    ``on_step`` is told what comes next, ``len(sizes) * (1 + settings.rounds)`` times. With ``machine``
    the measurements say what the cost model predicts.

    Raises:
        ArgumentError: a size that is no whole number of elements.
        WrongResultError: a contender computes something else; on every rank, and nothing is timed.
        PeerTimeout: a rank died or came too late.
    """
    for size in sizes:
        settings.num_elements(size)
    for size in sizes:
        on_step(f"checking {format_size(size)}")
        for entrant in entrants:
            _verify(entrant, group, topology, size, settings)
    found = []
    for size in sizes:
        found += _measure_size(group, topology, entrants, size, settings, machine, on_step)
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


def _verify(
    entrant: Contender,
    group: dist.ProcessGroup,
    topology: Topology,
    num_bytes: int,
    settings: Settings,
) -> None:
    def all_reduce(x: Tensor) -> Plan | None:
        before = sum(entrant.fallbacks().values())
        entrant.all_reduce(x, settings.op)
        fell_back = sum(entrant.fallbacks().values()) > before
        return None if fell_back else entrant.plan_for(num_bytes, settings.dtype)

    verify(
        all_reduce,
        group,
        topology,
        settings.num_elements(num_bytes),
        name=entrant.name,
        dtype=settings.dtype,
        op=settings.op,
        device=settings.device,
        timeout_s=settings.timeout_s,
    )


def _measure_size(
    group: dist.ProcessGroup,
    topology: Topology,
    entrants: Sequence[Contender],
    num_bytes: int,
    settings: Settings,
    machine: Machine | None,
    on_step: Callable[[str], None],
) -> list[Measurement]:
    length = settings.num_elements(num_bytes)
    source = torch.ones(length, dtype=settings.dtype, device=settings.device)
    x = torch.empty_like(source)
    for entrant in entrants:
        _timed_calls(group, entrant, x, source, settings, settings.warmup)
    before = [Counter(entrant.fallbacks()) for entrant in entrants]
    samples: list[list[float]] = [[] for _ in entrants]
    for number, order in enumerate(turns(len(entrants), settings.rounds), start=1):
        on_step(f"{format_size(num_bytes)}, round {number} of {settings.rounds}")
        for i in order:
            samples[i] += _timed_calls(group, entrants[i], x, source, settings, settings.iterations)
    longest = torch.tensor(samples, dtype=torch.float64, device=settings.device)
    _together(group, longest)
    found = []
    for entrant, earlier, times_us in zip(entrants, before, longest.tolist(), strict=True):
        fallbacks = Counter(entrant.fallbacks()) - earlier
        plan = entrant.plan_for(num_bytes, settings.dtype)
        if fallbacks.total() == len(times_us):
            plan = None
        predicted = time_us(plan, topology, num_bytes, machine) if plan and machine else None
        word = None if plan is None else str(plan)
        found.append(
            Measurement(
                entrant.name,
                num_bytes,
                word,
                tuple(times_us),
                dict(fallbacks),
                entrant.executor_for(settings.device),
                predicted,
            )
        )
    return found


def _timed_calls(
    group: dist.ProcessGroup,
    entrant: Contender,
    x: Tensor,
    source: Tensor,
    settings: Settings,
    num_calls: int,
) -> list[float]:
    """Microseconds of each of ``num_calls`` calls on this rank, after all ranks have come."""
    on_gpu = settings.device == "cuda"
    times_us = []
    _together(group, torch.zeros(1, device=settings.device))  # a barrier
    for _ in range(num_calls):
        x.copy_(
            source
        )  # in-place sums of sums would soon be infinities, and those have other speeds
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter_ns()
        entrant.all_reduce(x, settings.op)
        if on_gpu:
            torch.cuda.synchronize()
        times_us.append((time.perf_counter_ns() - start) / 1e3)
    return times_us


def _together(group: dist.ProcessGroup, x: Tensor) -> None:
    """``x`` becomes the maximum over the ranks."""
    try:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    except RuntimeError as error:
        raise lost(group, error) from error
