"""Which plan for which size. The same answer on every rank: a pure function of what all ranks share."""

from __future__ import annotations

from functools import lru_cache

from nvrar.cost import Machine, time_us
from nvrar.plan import Plan
from nvrar.topology import Topology


@lru_cache(maxsize=1024)
def choose(
    topology: Topology, num_bytes: int, machine: Machine, deterministic: bool = False
) -> Plan:
    """The plan with the least predicted time; of equals, the one with fewer levels.

    Sizes are told apart by their next power of two. ``deterministic`` keeps to the radices of the
    named plan ``nvrar``, whatever the size, so that the bits of a result do not depend on the size of
    the message it was part of.
    """
    candidates = Plan.all(topology)
    if deterministic:
        pinned = Plan.named("nvrar", topology).radices
        candidates = tuple(plan for plan in candidates if plan.radices == pinned)
    size = 1 << max(num_bytes - 1, 0).bit_length()
    return min(candidates, key=lambda plan: time_us(plan, topology, size, machine))


def ranking(topology: Topology, num_bytes: int, machine: Machine) -> list[tuple[Plan, float]]:
    """Every plan with its predicted time in microseconds, fastest first."""
    timed = [(plan, time_us(plan, topology, num_bytes, machine)) for plan in Plan.all(topology)]
    return sorted(timed, key=lambda pair: pair[1])
