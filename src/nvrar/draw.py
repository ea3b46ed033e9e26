# SPDX-License-Identifier: Apache-2.0
"""A plan drawn as text: which ranks work together at each step, what they send, how long it takes."""

from __future__ import annotations

from collections.abc import Iterator
from string import ascii_uppercase

from nvrar.cost import Machine, level_costs
from nvrar.plan import PLAN_NAMES, Level, Plan, Step
from nvrar.topology import Topology
from nvrar.units import format_size, format_time

_MAX_RANKS = 32  # as many as fit beside each other on a screen


def names_of(plan: Plan, topology: Topology) -> tuple[str, ...]:
    """The names under which ``plan`` is known on ``topology``."""
    return tuple(name for name in PLAN_NAMES if Plan.named(name, topology) == plan)


def draw(plan: Plan, topology: Topology, num_bytes: int, machine: Machine) -> str:
    """``plan`` for a message of ``num_bytes``, step by step. Pure.

    In each step's row ranks with the same letter work together.
    """
    costs = level_costs(plan, topology, num_bytes, machine)
    total = sum(cost.time_us for cost in costs)
    names = names_of(plan, topology)
    lines = [
        f"plan  {plan}" + (f"   ({', '.join(names)})" if names else ""),
        f"      {format_size(num_bytes)} on {topology} ranks (nodes x ranks on each), "
        f"{plan.num_steps} steps, {format_time(total)} predicted on {machine.name}",
        "",
    ]
    if not plan.levels:
        return "\n".join([*lines, "One rank: its input is the result."])
    shown = _Columns(topology)
    lines += [shown.header(), shown.row("rank", [str(p) for p in range(topology.world_size)])]
    stories: list[str] = []
    # Positions differ in whom they work with, never in the steps; any length shows those.
    for number, step in enumerate(plan.schedule(0, 1), start=1):
        level, cost = plan.levels[step.level], costs[step.level]
        direction = {"exchange": "", "split": " down" if step.phase == "reduce" else " up"}[
            level.mode
        ]
        title = f"{number}  {level}{direction}"
        lines.append(shown.row(title, _groups(plan, topology, step.level)))
        step_us = cost.time_us / (2 if level.mode == "split" else 1)
        stories += [
            f"{title}: {_mates(step, level.radix)}; {cost.network}, {format_time(step_us)} predicted",
            *(f"   {line}" for line in _story(step, level, cost.block_bytes)),
        ]
    return "\n".join(
        [*lines, "", "In a row, ranks with the same letter work together.", "", *stories]
    )


def _mates(step: Step, radix: int) -> str:
    listed = [str(position) for _, position in step.peers()][:8]
    more = " and on" if radix - 1 > len(listed) else ""
    return f"rank 0 with {', '.join(listed)}{more}"


def _story(step: Step, level: Level, block_bytes: float) -> tuple[str, ...]:
    """What every rank does in ``step``, in lines."""
    block, part = format_size(block_bytes), format_size(block_bytes / level.radix)
    others = "the other" if level.radix == 2 else f"the {level.radix - 1} others"
    if level.mode == "exchange":
        return (f"sends its whole block of {block} to {others}, and sums the {level.radix} blocks",)
    if step.phase == "reduce":
        return (
            f"cuts its block of {block} into {level.radix} parts of {part},",
            f"sends each of {others} the part that is theirs, and sums what comes for its own part",
        )
    return (f"sends its finished part of {part} to {others}: all hold the finished {block}",)


def _groups(plan: Plan, topology: Topology, level: int) -> list[str]:
    """By position the letter of the group it is in at ``level``."""
    first_members = [plan.members(p, level)[0] for p in range(topology.world_size)]
    order = {first: i for i, first in enumerate(dict.fromkeys(first_members))}
    return [_letter(order[first]) for first in first_members]


def _letter(index: int) -> str:
    """A to Z, then AA, AB and on."""
    high, low = divmod(index, len(ascii_uppercase))
    return (_letter(high - 1) if high else "") + ascii_uppercase[low]


class _Columns:
    """Ranks beside each other, by node; of many, the first ones."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._ranks = min(topology.ranks_per_node, _MAX_RANKS)
        self._nodes = min(topology.num_nodes, max(1, _MAX_RANKS // self._ranks))
        self._width = max(len(str(topology.world_size - 1)), 2)
        cut = self._ranks < topology.ranks_per_node
        self._more_ranks = " .." if cut else ""
        self._more_nodes = "   .." if self._nodes < topology.num_nodes else ""

    def header(self) -> str:
        width = max(self._ranks * (self._width + 1) - 1 + len(self._more_ranks), len("node 00"))
        names = (f"node {n}".ljust(width) for n in range(self._nodes))
        return self._line("", names)

    def row(self, title: str, cells: list[str]) -> str:
        return self._line(title, self._cells(cells))

    def _cells(self, cells: list[str]) -> Iterator[str]:
        for node in range(self._nodes):
            first = node * self._topology.ranks_per_node
            row = " ".join(c.rjust(self._width) for c in cells[first : first + self._ranks])
            yield (row + self._more_ranks).ljust(len("node 00"))

    def _line(self, title: str, nodes: Iterator[str]) -> str:
        return (f"{title:<20}" + "   ".join(nodes) + self._more_nodes).rstrip()
