# SPDX-License-Identifier: Apache-2.0
"""How long an all-reduce takes: contenders side by side, in one interleaved run.

For each size every contender is first checked (:mod:`nvrar.verify`) and warmed up; then they take turns
in batches of samples (:mod:`nvrar.timing`). Nothing here prints or writes: the commands do
(:mod:`nvrar.record`, :mod:`nvrar.report`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nvrar.contenders import Contender
from nvrar.cost import Machine, time_us
from nvrar.errors import ArgumentError
from nvrar.host import OPS
from nvrar.plan import Plan
from nvrar.timing import Clock, GraphClock, HostClock, in_turns
from nvrar.topology import Topology
from nvrar.units import format_size
from nvrar.verify import verify

# host: each call alone, from the host. graph: calls back to back in a CUDA graph. interleaved: in a CUDA
# graph with another kernel in front of each call, whose own time is taken off.
TIMINGS = ("host", "graph", "interleaved")


@dataclass(frozen=True)
class Settings:
    """How to measure. ``rounds`` batches of ``iterations`` samples for each contender, size and timing."""

    dtype: torch.dtype = torch.bfloat16
    op: str = "sum"
    device: str = "cpu"
    iterations: int = 20
    rounds: int = 4
    warmup: int = 5
    timeout_s: float = 60.0
    timings: tuple[str, ...] = ("host",)  # of TIMINGS; all but "host" need GPUs

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ArgumentError(f"op is {self.op!r}; it must be one of {', '.join(OPS)}")
        if self.op == "avg" and not self.dtype.is_floating_point:
            raise ArgumentError(f"op 'avg' needs a floating type, and dtype is {self.dtype}")
        if not 0 < self.timeout_s < math.inf:
            raise ArgumentError(f"timeout is {self.timeout_s:g} s; it must be above 0, and finite")
        if not self.timings or not set(self.timings) <= set(TIMINGS):
            raise ArgumentError(f"timings are {self.timings}; they must be of {', '.join(TIMINGS)}")
        if self.device != "cuda" and self.timings != ("host",):
            raise ArgumentError(
                f"timings {self.timings} need CUDA graphs, and device is {self.device!r}; on it there is "
                "only ('host',)"
            )
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
    samples_us: tuple[float, ...]  # the longest over the ranks of each sample, in order
    fallbacks: Mapping[str, int] = field(default_factory=dict)  # of the timed calls, by reason
    executor: str = "host"  # of those that did not fall back
    predicted_us: float | None = None
    timing: str = "host"

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
    """Every contender at every size (bytes): by timing, by size, then in the contenders' order. Collective.

    ``on_step`` is told what comes next, :func:`num_steps` times. With ``machine`` the measurements say
    what the cost model predicts.

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
            check(entrant, group, topology, size, settings)
    found = []
    for timing in settings.timings:
        for size in sizes:
            found += _measure_size(
                group, topology, entrants, size, settings, timing, machine, on_step
            )
    return found


def num_steps(num_sizes: int, settings: Settings) -> int:
    """How often :func:`measure` speaks."""
    return num_sizes * (1 + settings.rounds * len(settings.timings))


def check(
    entrant: Contender,
    group: dist.ProcessGroup,
    topology: Topology,
    num_bytes: int,
    settings: Settings,
) -> None:
    """Raises, on every rank, unless ``entrant`` reduces random data rightly; see :func:`nvrar.verify.verify`.
    Collective."""
    buffer = entrant.buffer(settings.num_elements(num_bytes), settings.dtype, settings.device)

    def all_reduce(x: Tensor) -> tuple[Tensor, Plan | None]:
        before = sum(entrant.fallbacks().values())
        result = entrant.all_reduce(buffer.copy_(x), settings.op)
        fell_back = sum(entrant.fallbacks().values()) > before
        return result, None if fell_back else entrant.plan_for(num_bytes, settings.dtype)

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
    timing: str,
    machine: Machine | None,
    on_step: Callable[[str], None],
) -> list[Measurement]:
    before = [Counter(entrant.fallbacks()) for entrant in entrants]
    samples = time_size(group, entrants, num_bytes, settings, timing, on_step)
    found = []
    for entrant, earlier, times_us in zip(entrants, before, samples, strict=True):
        # Why a call falls back follows from the call alone: of equal calls all do, or none.
        reasons = Counter(entrant.fallbacks()) - earlier
        plan = None if reasons else entrant.plan_for(num_bytes, settings.dtype)
        predicted = time_us(plan, topology, num_bytes, machine) if plan and machine else None
        found.append(
            Measurement(
                entrant.name,
                num_bytes,
                None if plan is None else str(plan),
                tuple(times_us),
                dict.fromkeys(reasons, len(times_us)),
                entrant.executor_for(settings.device),
                predicted,
                timing,
            )
        )
    return found


def time_size(
    group: dist.ProcessGroup,
    entrants: Sequence[Contender],
    num_bytes: int,
    settings: Settings,
    timing: str,
    on_step: Callable[[str], None] = lambda what: None,
) -> list[list[float]]:
    """The samples of each of ``entrants`` for one size, in microseconds, as :func:`measure` takes them."""

    def on_round(number: int) -> None:
        on_step(f"{format_size(num_bytes)}, {timing}, round {number} of {settings.rounds}")

    clocks: list[Clock] = [_clock(group, e, num_bytes, settings, timing) for e in entrants]
    if timing == "interleaved":
        clocks.append(_kernel_alone(group, num_bytes, settings))
    samples = in_turns(
        group, clocks, settings.rounds, settings.iterations, settings.device, on_round
    )
    if timing == "interleaved":
        alone_us = float(np.median(samples.pop()))
        samples = [[t - alone_us for t in times_us] for times_us in samples]
    return samples


def _clock(
    group: dist.ProcessGroup, entrant: Contender, num_bytes: int, settings: Settings, timing: str
) -> Clock:
    length = settings.num_elements(num_bytes)
    x = entrant.buffer(length, settings.dtype, settings.device)
    # In-place sums of sums would soon be infinities, and those have other speeds.
    source = torch.ones_like(x)
    if timing == "host":
        return HostClock(
            group,
            lambda: entrant.all_reduce(x, settings.op),
            lambda: x.copy_(source),
            settings.device,
            settings.warmup,
        )
    x.zero_()
    between = (lambda: torch.mul(source, 1, out=x)) if timing == "interleaved" else None
    return GraphClock(group, lambda: entrant.all_reduce(x, settings.op), settings.warmup, between)


def _kernel_alone(group: dist.ProcessGroup, num_bytes: int, settings: Settings) -> Clock:
    """What stands between the calls of an interleaved graph, by itself."""
    length = settings.num_elements(num_bytes)
    source = torch.ones(length, dtype=settings.dtype, device=settings.device)
    x = torch.empty_like(source)
    return GraphClock(group, lambda: torch.mul(source, 1, out=x), settings.warmup)
