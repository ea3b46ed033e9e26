"""What a plan costs on a machine: the alpha-beta model, level by level.

A level with k members and a block of m bytes costs, on a link of latency a, bandwidth b and wire
inflation eta (bytes on the wire for each byte of data; flags travel inside the packets)::

    exchange   a + (k-1) (g + eta m / b)
    split      2 (a + (k-1) (g + eta m / (k b)))

with g the time to hand one message over (0 where stores go straight to the peer). Where a level's
members sit both inside and outside the node, the two links work side by side and the slower one counts.
Pure. Units: microseconds, bytes, GB/s (1e9 bytes a second).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from nvrar.errors import ArgumentError
from nvrar.plan import Plan
from nvrar.topology import Topology


@dataclass(frozen=True, slots=True)
class Link:
    """One rank's share of a network, one direction."""

    latency_us: float
    bandwidth_gbps: float  # GB/s
    inflation: float = 1.0
    message_us: float = 0.0

    def __post_init__(self) -> None:
        if self.latency_us < 0 or self.message_us < 0:
            raise ArgumentError(f"{self}: latency_us and message_us must not be negative")
        if self.bandwidth_gbps <= 0 or self.inflation < 1:
            raise ArgumentError(f"{self}: bandwidth_gbps must be above 0, inflation at least 1")

    def time_us(self, num_messages: int, num_bytes: float) -> float:
        """Until the last of ``num_messages`` of ``num_bytes`` each has arrived."""
        if num_messages == 0:
            return 0.0
        wire_us = self.inflation * num_bytes / (self.bandwidth_gbps * 1e3)
        return self.latency_us + num_messages * (self.message_us + wire_us)


@dataclass(frozen=True, slots=True)
class Machine:
    """The two networks of a cluster, as one rank sees them."""

    name: str
    node_local: Link
    cross_node: Link
    source: str = ""


MACHINES = {
    machine.name: machine
    for machine in (
        Machine(
            "gloo",
            Link(60.0, 1.2, message_us=25.0),
            Link(60.0, 1.2, message_us=25.0),
            "gloo over loopback, 2 cores: orders of magnitude only, `nvrar bench` measures yours",
        ),
        Machine(
            "h100-ndr",
            Link(1.6, 300.0, inflation=2.0),
            Link(7.0, 45.0, inflation=2.0),
            "NVLink: store-only floor on 2x H200; network: 6-9 us per LL step, IBGDA, one NDR400 NIC a GPU",
        ),
        Machine(
            "perlmutter",
            Link(2.5, 75.0, inflation=2.0),
            Link(10.0, 23.0, inflation=2.0),
            "4x A100 (NVLink3 mesh), Slingshot-11, one NIC a GPU, CPU proxy: 8-14 us per step",
        ),
        Machine(
            "vista",
            Link(1.6, 300.0, inflation=2.0),
            Link(7.0, 45.0, inflation=2.0),
            "one GH200 a node, InfiniBand NDR",
        ),
    )
}


def machine_named(name: str) -> Machine:
    """One of :data:`MACHINES`.

    Raises:
        ArgumentError: no machine has that name.
    """
    if name not in MACHINES:
        raise ArgumentError(f"no machine is named {name!r}; the names are {', '.join(MACHINES)}")
    return MACHINES[name]


@dataclass(frozen=True, slots=True)
class LevelCost:
    """One level's share of a plan's time. Cross-node bytes are what the busiest rank sends."""

    level: str
    network: str  # "node-local" or "cross-node": the one that decides
    block_bytes: float
    time_us: float
    cross_node_bytes: float


def level_costs(
    plan: Plan, topology: Topology, num_bytes: float, machine: Machine
) -> tuple[LevelCost, ...]:
    """The cost of every level of ``plan`` for a message of ``num_bytes``."""
    costs = []
    block = float(num_bytes)
    for i, level in enumerate(plan.levels):
        remote = _most_remote_peers(plan, topology, i)
        local = level.radix - 1 if remote == 0 else level.radix - 1 - remote
        rounds, part = (2, block / level.radix) if level.mode == "split" else (1, block)
        near = machine.node_local.time_us(local, part)
        far = machine.cross_node.time_us(remote, part)
        costs.append(
            LevelCost(
                str(level),
                "cross-node" if far >= near else "node-local",
                block,
                rounds * max(near, far),
                rounds * remote * part * machine.cross_node.inflation,
            )
        )
        if level.mode == "split":
            block = part
    return tuple(costs)


def time_us(plan: Plan, topology: Topology, num_bytes: float, machine: Machine) -> float:
    """The predicted time of one all-reduce of ``num_bytes``."""
    return sum(c.time_us for c in level_costs(plan, topology, num_bytes, machine))


@lru_cache(maxsize=4096)
def _most_remote_peers(plan: Plan, topology: Topology, level: int) -> int:
    """Peers on other nodes, for the rank that has most of them."""
    return max(
        sum(
            topology.node_of(p) != topology.node_of(position) for p in plan.members(position, level)
        )
        for position in range(topology.world_size)
    )
