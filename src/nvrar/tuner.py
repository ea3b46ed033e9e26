# SPDX-License-Identifier: Apache-2.0
"""The search behind ``nvrar tune``: what is worth trying, checked, timed, and written down as a table.

Collective throughout: every rank does the same, and decides by times that all of them share.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nvrar.bench import Settings, check, time_size
from nvrar.contenders import Contender
from nvrar.errors import DisagreementError, NvrarError, WrongResultError
from nvrar.meeting import exchange_values
from nvrar.plan import Plan
from nvrar.table import Entry, Key, Table, Trial
from nvrar.timing import meet
from nvrar.topology import Topology
from nvrar.units import format_size

# Another launch than the usual one must win by so much to be worth a line of its own.
_WORTH = 0.97


@dataclass(frozen=True)
class Attempt:
    """One way to reduce a size, ready to be called. ``trial`` lacks only its time."""

    contender: Contender
    trial: Trial

    @property
    def name(self) -> str:
        return self.contender.name


class Lab(Protocol):
    """Where attempts are made: on one executor, for one topology and type. Its methods are collective."""

    key: Key
    topology: Topology

    @property
    def baseline(self) -> Contender:
        """What torch does."""

    def attempts(
        self, num_bytes: int, left_out: MutableMapping[str, str]
    ) -> AbstractContextManager[Sequence[Attempt]]:
        """What is worth trying for a size, without those that ``left_out`` names; those that cannot be made
        are added to it, by name and reason."""

    def variants(self, best: Attempt, num_bytes: int) -> Sequence[Attempt]:
        """Other launches of ``best``. To be called inside :meth:`attempts`."""

    def failure(self) -> str:
        """What has gone wrong on this rank since the attempts were made; empty if nothing. Local."""

    def close(self) -> None: ...


def tune(
    group: ProcessGroup,
    lab: Lab,
    sizes: Sequence[int],
    settings: Settings,
    budget_s: float,
    provenance: Mapping[str, Any],
    on_step: Callable[[str], None] = lambda what: None,
) -> Table:
    """The table of ``lab`` for ``sizes`` (bytes), equal on all ranks. Collective.

    No size is begun that would, by the slowest so far, end after ``budget_s``; they come in an order that
    leaves the fewest gaps. ``on_step`` is told what comes next, once a size.

    Raises:
        NvrarError: something went wrong that is not one attempt's fault.
    """
    started = time.monotonic()
    slowest_s = 0.0
    entries: list[Entry] = []
    left_out: dict[str, str] = {}
    for num_bytes in spread(sorted(set(sizes))):
        begun = time.monotonic()
        clock = torch.tensor([begun - started + slowest_s], device=settings.device)
        meet(group, clock)
        if entries and clock.item() > budget_s:
            break
        on_step(f"{lab.key.dtype}, {format_size(num_bytes)}")
        entries.append(_entry(group, lab, num_bytes, settings, left_out))
        slowest_s = max(slowest_s, time.monotonic() - begun)
    entries.sort(key=lambda entry: entry.num_bytes)
    made = Table(lab.key, tuple(entries), provenance, left_out)
    return _agreed(group, made, settings.timeout_s)


def spread(sizes: Sequence[int]) -> list[int]:
    """``sizes`` (ascending) from coarse to fine: the ends, then always the middle of a widest gap."""
    order = [0, len(sizes) - 1][: len(sizes)]
    while len(order) < len(sizes):
        first, last = max(pairwise(sorted(order)), key=lambda gap: gap[1] - gap[0])
        order.append((first + last) // 2)
    return [sizes[i] for i in order]


def _entry(
    group: ProcessGroup,
    lab: Lab,
    num_bytes: int,
    settings: Settings,
    left_out: MutableMapping[str, str],
) -> Entry:
    while True:
        with lab.attempts(num_bytes, left_out) as attempts:
            # One that fails may take the executor of all with it: the rest is begun anew.
            if not _all_right(group, lab, attempts, num_bytes, settings, left_out):
                continue
            torch_us, *times_us = _medians(
                group, lab, [lab.baseline, *(a.contender for a in attempts)], num_bytes, settings
            )
            trials = [
                replace(attempt.trial, time_us=time_us)
                for attempt, time_us in zip(attempts, times_us, strict=True)
            ]
            if attempts:
                best = attempts[times_us.index(min(times_us))]
                others = [v for v in lab.variants(best, num_bytes) if v.name not in left_out]
                if not _all_right(group, lab, others, num_bytes, settings, left_out):
                    continue
                trials += _better(group, lab, best, others, num_bytes, settings)
        return Entry(num_bytes, torch_us, tuple(sorted(trials, key=lambda t: t.time_us)))


def _better(
    group: ProcessGroup,
    lab: Lab,
    best: Attempt,
    others: Sequence[Attempt],
    num_bytes: int,
    settings: Settings,
) -> list[Trial]:
    """The fastest of ``others``, if it is worth it."""
    if not others:
        return []
    entrants = [best.contender, *(other.contender for other in others)]
    usual_us, *times_us = _medians(group, lab, entrants, num_bytes, settings)
    least_us = min(times_us)
    if least_us > _WORTH * usual_us:
        return []
    return [replace(others[times_us.index(least_us)].trial, time_us=least_us)]


def _all_right(
    group: ProcessGroup,
    lab: Lab,
    attempts: Sequence[Attempt],
    num_bytes: int,
    settings: Settings,
    left_out: MutableMapping[str, str],
) -> bool:
    """Whether all reduce rightly; the first that does not is left out."""
    for attempt in attempts:
        guarded = _Guarded(attempt.contender, lab)
        try:
            check(guarded, group, lab.topology, num_bytes, settings)
        except WrongResultError as error:
            left_out[attempt.name] = f"at {format_size(num_bytes)}: {guarded.error or error}"
            return False
    return True


class _Guarded:
    """A contender whose own errors do not keep this rank from telling the others."""

    def __init__(self, contender: Contender, lab: Lab) -> None:
        self._contender, self._lab = contender, lab
        self.name = contender.name
        self.error = ""

    def buffer(self, num_elements: int, dtype: torch.dtype, device: str) -> Tensor:
        return self._contender.buffer(num_elements, dtype, device)

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        before = x.clone()
        try:
            result = self._contender.all_reduce(x, op)
            self.error = self._lab.failure()
        except NvrarError as error:
            self.error = str(error)
        return before if self.error else result

    def plan_for(self, num_bytes: int, dtype: torch.dtype) -> Plan | None:
        return self._contender.plan_for(num_bytes, dtype)

    def executor_for(self, device: str) -> str:
        return self._contender.executor_for(device)

    def fallbacks(self) -> Mapping[str, int]:
        return self._contender.fallbacks()


def _medians(
    group: ProcessGroup,
    lab: Lab,
    entrants: Sequence[Contender],
    num_bytes: int,
    settings: Settings,
) -> list[float]:
    samples = time_size(group, entrants, num_bytes, settings, settings.timings[0])
    failures = exchange_values(group, "tuner", lab.failure(), settings.timeout_s)
    if any(failures):
        raise NvrarError(
            f"at {format_size(num_bytes)} one of {', '.join(e.name for e in entrants)} failed while it was "
            f"timed, though its result had been right: {next(filter(None, failures))}"
        )
    return [statistics.median(times_us) for times_us in samples]


def _agreed(group: ProcessGroup, mine: Table, timeout_s: float) -> Table:
    """Rank 0's table, on every rank."""
    text = mine.dumps() if group.rank() == 0 else None
    table = Table.loads(exchange_values(group, "table", text, timeout_s)[0])
    digest = hashlib.sha256(table.dumps().encode()).hexdigest()
    digests = exchange_values(group, "table digest", digest, timeout_s)
    odd = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if odd:
        raise DisagreementError(
            f"the table that rank 0 sent reads differently on ranks {odd}; install the same version of "
            "nvrar on all of them"
        )
    return table
