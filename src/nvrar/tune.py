# SPDX-License-Identifier: Apache-2.0
"""Which plan for which size. The same answer on every rank: a pure function of what all ranks share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import get_args

from nvrar.cost import Machine, level_cost, time_us
from nvrar.plan import Level, Mode, Plan
from nvrar.table import Table, Trial, bucket
from nvrar.topology import Topology

# Of `Plan.inner_parts`: with 16 kernels spill registers and take up to 16 s to compile, with 64 two minutes.
MOST_INNER_PARTS = 8


@dataclass(frozen=True, slots=True)
class Choice:
    """How a message is reduced.

    Attributes:
        plan: by which plan, unless ``by_torch``; then, by which plan if it must be ours after all.
        measured: what the table knows of it; ``packets`` and the launch are set where they were measured
            for this size. None where the cost model chose, or the caller.
        by_torch: ``torch.distributed.all_reduce`` was measured to be faster.
    """

    plan: Plan
    measured: Trial | None = None
    by_torch: bool = False


@dataclass(frozen=True)
class Chooser:
    """What a communicator does for each size.

    Args:
        fixed: the plan asked for; None is ``"auto"``: as measured where a table fits, else by the cost model.
        deterministic: keep to one list of radices, and never to torch.
        may_use_torch: whether torch's all-reduce does the same thing.
        tables: equal on all ranks; of ``topology``, each for another link and type.
    """

    topology: Topology
    machine: Machine
    fixed: Plan | None = None
    deterministic: bool = False
    may_use_torch: bool = True
    tables: tuple[Table, ...] = ()

    def choose(self, num_bytes: int, dtype: str, link: str) -> Choice:
        """For a message of ``num_bytes`` of ``dtype`` as it is sent over ``link`` (see
        :class:`nvrar.table.Key`). Sizes are told apart by their next power of two."""
        if self.fixed is not None:
            return Choice(self.fixed)
        table = self.table_for(dtype, link)
        if table is None:
            return Choice(self._by_model(num_bytes))
        entry = table.entry_for(num_bytes)
        by_torch = self.may_use_torch and not self.deterministic and entry.is_for_torch
        best = entry.best(pinned_radices(self.topology) if self.deterministic else None)
        if best is None:
            return Choice(self._by_model(num_bytes), None, by_torch)
        if table.entry_at(num_bytes) is None:
            best = replace(best, packets=None, blocks=None, threads=None)
        return Choice(best.plan, best, by_torch)

    def _by_model(self, num_bytes: int) -> Plan:
        return choose(self.topology, num_bytes, self.machine, self.deterministic)

    def table_for(self, dtype: str, link: str) -> Table | None:
        fitting = (t for t in self.tables if (t.key.dtype, t.key.link) == (dtype, link))
        return next(fitting, None)


@lru_cache(maxsize=1024)
def choose(
    topology: Topology, num_bytes: int, machine: Machine, deterministic: bool = False
) -> Plan:
    """The plan with the least predicted time, of :func:`are_few_parts`; of equals, the one with fewer levels.

    Sizes are told apart by their next power of two. ``deterministic`` keeps to
    :func:`pinned_radices`, whatever the size, so that the bits of a result do not depend on the size of
    the message it was part of.
    """
    # What a level costs depends on those before it only by its stride and by the parts that they cut. So of
    # all ways to get there the fastest will do; there are thousands of plans for a hundred nodes.
    size = bucket(num_bytes)
    ways: dict[tuple[int, int, int], tuple[float, int, str, Plan]]
    ways = {(1, 1, 1): (0.0, 0, "", Plan(()))}  # by stride, parts and inner parts
    for stride in _strides(topology):
        for found in [found for found in ways if found[0] == stride]:
            spent_us, depth, _, before = ways[found]
            for level in _next_levels(topology, stride, deterministic):
                plan = Plan((*before.levels, level))
                if not are_few_parts(plan):
                    continue
                cost = level_cost(level, stride, topology, size / found[1], machine)
                way = (spent_us + cost.time_us, depth + 1, str(plan), plan)
                parts = found[1] * (level.radix if level.mode == "split" else 1)
                to = (stride * level.radix, parts, plan.inner_parts)
                ways[to] = min(ways.get(to, way), way)
    return min(way for at, way in ways.items() if at[0] == topology.world_size)[-1]


def are_few_parts(plan: Plan) -> bool:
    """Whether kernels for it are lean. What splits beyond that would save is little: the levels inside have
    an eighth of the first split's block as it is."""
    return plan.inner_parts <= MOST_INNER_PARTS


def _strides(topology: Topology) -> list[int]:
    """Of all levels that plans have, ascending: those within a node, then those between nodes."""
    nodes, ranks = topology.num_nodes, topology.ranks_per_node
    local = [stride for stride in range(1, ranks) if ranks % stride == 0]
    return local + [ranks * stride for stride in range(1, nodes) if nodes % stride == 0]


def _next_levels(topology: Topology, stride: int, deterministic: bool) -> list[Level]:
    """The levels that may begin at ``stride``; see :meth:`Plan.all`."""
    if deterministic:
        pinned = Plan.named("nvrar", topology)
        radices = {k for s, k in zip(pinned.strides(), pinned.radices, strict=True) if s == stride}
    else:
        is_local = stride < topology.ranks_per_node
        left = (topology.ranks_per_node if is_local else topology.world_size) // stride
        radices = {k for k in range(2, left + 1) if left % k == 0}
        if stride == 1:
            radices.add(topology.world_size)
    return [Level(mode, radix) for radix in sorted(radices) for mode in get_args(Mode)]


def pinned_radices(topology: Topology) -> tuple[int, ...]:
    """The radices of a deterministic communicator: those of the named plan ``nvrar``."""
    return Plan.named("nvrar", topology).radices


def ranking(topology: Topology, num_bytes: int, machine: Machine) -> list[tuple[Plan, float]]:
    """Every plan with its predicted time in microseconds, fastest first."""
    timed = [(plan, time_us(plan, topology, num_bytes, machine)) for plan in Plan.all(topology)]
    return sorted(timed, key=lambda pair: pair[1])


def worth_trying(
    topology: Topology, num_bytes: int, machine: Machine, most: int
) -> tuple[Plan, ...]:
    """The plans to measure for a size: the ``most`` fastest by the model, and, so that a deterministic
    communicator has a choice too, the two fastest of :func:`pinned_radices`."""
    ranked = [p for p, _ in ranking(topology, num_bytes, machine) if are_few_parts(p)]
    pinned = [plan for plan in ranked if plan.radices == pinned_radices(topology)]
    return tuple(dict.fromkeys([*ranked[:most], *pinned[:2]]))
