# SPDX-License-Identifier: Apache-2.0
"""What a plan costs on a machine: the alpha-beta model, level by level.

A level with k members and a block of m bytes costs, on a link of latency a, bandwidth b and wire
inflation eta (bytes on the wire for each byte of data; flags travel inside the packets)::

    exchange   a + (k-1) (g + eta m / b)
    split      2 (a + (k-1) (g + eta m / (k b)))

with g the time to hand one message over (0 where stores go straight to the peer). Where a level's
members sit both inside and outside the node, the two links work side by side and the slower one counts,
for the rank that has most to send on it.
Pure. Units: microseconds, bytes, GB/s (1e9 bytes a second).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nvrar.errors import ArgumentError
from nvrar.plan import Level, Plan
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

    @classmethod
    def parse(cls, text: str) -> Machine:
        """The machine of that name, or the one that a JSON object describes: the fields of this class,
        ``{"cross_node": {"latency_us": 300, "bandwidth_gbps": 0.01}, "node_local": {...}}``.

        Raises:
            ArgumentError: an unknown name; text that is no JSON; a field missing, unknown or of another type.
        """
        if not text.lstrip().startswith("{"):
            return machine_named(text)
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArgumentError(f"the machine's description is not JSON: {error}") from error
        unknown = fields.keys() - {"name", "node_local", "cross_node", "source"}
        if unknown:
            raise ArgumentError(
                f"the machine has a field {min(unknown)!r}; "
                "its fields are name, node_local, cross_node and source"
            )
        near, far = (_link(name, fields.get(name)) for name in ("node_local", "cross_node"))
        return cls(str(fields.get("name", "described")), near, far, str(fields.get("source", "")))


def _link(name: str, fields: Any) -> Link:
    try:
        numbers = {key: float(value) for key, value in fields.items()}
        return Link(**numbers)
    except ArgumentError:  # Link says itself what is wrong with a number
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"{name} of the machine is {fields!r}; it must be an object with the numbers latency_us and "
            "bandwidth_gbps, and if need be inflation and message_us"
        ) from error


MACHINES = {
    machine.name: machine
    for machine in (
        Machine(
            "gloo",
            Link(200.0, 0.6, message_us=50.0),
            Link(200.0, 0.6, message_us=50.0),
            "gloo over loopback, fitted to one-shot of 2 ranks on 2 cores; `nvrar bench` measures yours",
        ),
        # NVLink: fitted to benchmarks/results (2x H200, LL128, 1 KB to 8 MB), without the 1.0 us that the
        # launch of any kernel takes. Networks: no such run exists yet; latencies are the middle of what
        # others published for one flag-carrying put, message_us what posting a put costs (a guess for
        # IBGDA; for a CPU proxy about 1 us).
        Machine(
            "h100-ndr",
            Link(1.65, 336.0, inflation=1.067),
            Link(7.0, 45.0, inflation=2.0, message_us=0.5),
            "H100/H200 with NVLink; one InfiniBand NDR NIC a GPU, IBGDA",
        ),
        Machine(
            "perlmutter",
            Link(2.5, 75.0, inflation=1.067),
            Link(10.0, 23.0, inflation=2.0, message_us=1.0),
            "4x A100 (NVLink3 mesh); Slingshot-11, one NIC a GPU, CPU proxy",
        ),
        Machine(
            "vista",
            Link(1.65, 336.0, inflation=1.067),
            Link(7.0, 45.0, inflation=2.0, message_us=0.5),
            "one GH200 a node; InfiniBand NDR, IBGDA",
        ),
    )
}


# What plans are chosen for by an executor, where nobody says.
USUAL = {"host": MACHINES["gloo"], "gpu": MACHINES["h100-ndr"]}


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
    for level, stride in zip(plan.levels, plan.strides(), strict=True):
        costs.append(level_cost(level, stride, topology, block, machine))
        if level.mode == "split":
            block /= level.radix
    return tuple(costs)


def level_cost(
    level: Level, stride: int, topology: Topology, block_bytes: float, machine: Machine
) -> LevelCost:
    """The cost of ``level`` where its members are ``stride`` apart and have ``block_bytes`` each."""
    fewest, most = _remote_peers(stride, level.radix, topology.num_nodes, topology.ranks_per_node)
    rounds, part = (2, block_bytes / level.radix) if level.mode == "split" else (1, block_bytes)
    near = machine.node_local.time_us(level.radix - 1 - fewest, part)
    far = machine.cross_node.time_us(most, part)
    return LevelCost(
        str(level),
        "cross-node" if most and far >= near else "node-local",
        block_bytes,
        rounds * max(near, far),
        rounds * most * part * machine.cross_node.inflation,
    )


def time_us(plan: Plan, topology: Topology, num_bytes: float, machine: Machine) -> float:
    """The predicted time of one all-reduce of ``num_bytes``."""
    return sum(c.time_us for c in level_costs(plan, topology, num_bytes, machine))


@lru_cache(maxsize=4096)
def _remote_peers(stride: int, radix: int, num_nodes: int, ranks_per_node: int) -> tuple[int, int]:
    """The fewest and the most peers on other nodes that a rank has at a level of ``radix`` members,
    ``stride`` apart. By numbers alone, so that the thousands of plans of a topology share the answers."""
    if stride % ranks_per_node == 0:
        return radix - 1, radix - 1
    together: list[
        int
    ] = []  # for every rank, itself included: the members of its group on its node
    for first in range(num_nodes * ranks_per_node):
        if first // stride % radix == 0:
            nodes = Counter((first + j * stride) // ranks_per_node for j in range(radix))
            together += nodes.values()
    return radix - max(together), radix - min(together)
