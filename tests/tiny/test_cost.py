"""The cost model against values worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvrar.cost import MACHINES, Link, Machine, level_costs, machine_named, time_us
from nvrar.errors import ArgumentError
from nvrar.plan import Plan
from nvrar.topology import Topology

# 1 GB/s is 1000 bytes a microsecond. Near: 2 us and 10 GB/s; far: 10 us, 1 GB/s, twice the bytes.
HAND = Machine("hand", Link(2.0, 10.0, message_us=0.5), Link(10.0, 1.0, inflation=2.0))
M = 8000.0


def cost(word: str, shape: str, num_bytes: float = M, machine: Machine = HAND) -> float:
    topology = Topology.parse(shape)
    return time_us(Plan.resolve(word, topology), topology, num_bytes, machine)


@pytest.mark.parametrize(
    ("word", "shape", "microseconds"),
    [
        # exchange: a + (k-1) (g + eta m / b)
        ("exchange:4", "1x4", 2 + 3 * (0.5 + 0.8)),
        ("exchange:4", "4x1", 10 + 3 * 16),
        # split: 2 (a + (k-1) (g + eta m / (k b)))
        ("split:4", "1x4", 2 * (2 + 3 * (0.5 + 0.2))),
        ("split:4", "4x1", 2 * (10 + 3 * 4)),
        # after split:4 a quarter of the block is left, after exchange all of it
        ("split:4 exchange:2", "2x4", 2 * (2 + 3 * 0.7) + 10 + 4),
        ("exchange:4 exchange:2", "2x4", (2 + 3 * 1.3) + 10 + 16),
        ("split:4 split:2", "2x4", 2 * (2 + 3 * 0.7) + 2 * (10 + 2)),
        ("split:4 exchange:2 exchange:2", "4x4", 2 * (2 + 3 * 0.7) + (10 + 4) + (10 + 4)),
        # two levels on a node, both of near links alone
        ("split:2 exchange:2 exchange:2", "2x4", 2 * (2 + 0.9) + (2 + 0.9) + (10 + 8)),
        # members on both networks: 1 near and 2 far, side by side, and the slower counts
        ("exchange:4", "2x2", 10 + 2 * 16),
        ("split:4", "2x2", 2 * (10 + 2 * 4)),
        ("identity", "1x1", 0),
    ],
)
def test_by_hand(word: str, shape: str, microseconds: float) -> None:
    assert cost(word, shape) == pytest.approx(microseconds, rel=1e-12)


def test_the_near_link_may_decide_a_mixed_level() -> None:
    slow_near = Machine("slow near", Link(50.0, 1.0), Link(1.0, 100.0))
    (level,) = level_costs(Plan.parse("exchange:4"), Topology(2, 2), M, slow_near)
    assert level.network == "node-local"
    assert level.time_us == pytest.approx(50 + 8)


def test_each_rank_counts_for_what_it_sends_most_of() -> None:
    """exchange:3 on nodes of two: a group lies 2+1 over two nodes, so one rank has 2 remote peers, and
    another has a local one."""
    uneven = Machine("uneven", Link(100.0, 1000.0), Link(1.0, 1000.0))
    level = level_costs(Plan.parse("exchange:3 exchange:2"), Topology(3, 2), M, uneven)[0]
    assert level.network == "node-local"
    assert level.time_us == pytest.approx(100 + 0.008)
    assert level.cross_node_bytes == 2 * M
    far = Machine("far", Link(1.0, 1000.0), Link(100.0, 1.0))
    level = level_costs(Plan.parse("exchange:3 exchange:2"), Topology(3, 2), M, far)[0]
    assert level.network == "cross-node"
    assert level.time_us == pytest.approx(100 + 2 * 8)


def test_what_each_level_says() -> None:
    first, second = level_costs(Plan.parse("split:4 exchange:2"), Topology(2, 4), M, HAND)
    assert (first.level, first.network, first.block_bytes) == ("split:4", "node-local", M)
    assert first.cross_node_bytes == 0
    assert (second.level, second.network, second.block_bytes) == ("exchange:2", "cross-node", M / 4)
    assert second.cross_node_bytes == M / 4 * 2  # inflation included
    halving = level_costs(Plan.parse("split:4 split:2"), Topology(2, 4), M, HAND)[1]
    assert halving.cross_node_bytes == 2 * M / 8 * 2


@pytest.mark.parametrize(
    ("name", "cross_node_bytes"),
    # The last column of the table of plans: (P-1) M, 2 (P-1)/P M, log2(N) M/G, (N-1) M/G, 2 (N-1)/N M/G,
    # where the flat plans reach the G-1 ranks of their own node without the network.
    [
        ("one-shot", (16 - 4) * M),
        ("two-shot", 2 * (16 - 4) / 16 * M),
        ("nvrar", 2 * M / 4),
        ("direct", 3 * M / 4),
        ("halving-doubling", 2 * 3 / 4 * M / 4),
    ],
)
def test_bytes_on_the_slow_link(name: str, cross_node_bytes: float) -> None:
    plain = Machine("plain", Link(1.0, 100.0), Link(10.0, 10.0))
    topology = Topology(4, 4)
    costs = level_costs(Plan.named(name, topology), topology, M, plain)
    assert sum(c.cross_node_bytes for c in costs) == pytest.approx(cross_node_bytes)


@pytest.mark.parametrize("num_bytes", [16 << 10, 64 << 10, 256 << 10, 1 << 20, 8 << 20])
@pytest.mark.parametrize("nodes", [2, 3, 4, 8, 16])
def test_nvrar_beats_flat_where_the_network_is_slow(num_bytes: int, nodes: int) -> None:
    """Ten times the latency, a tenth of the bandwidth, and a microsecond to hand over each message."""
    slow = Machine("slow", Link(1.0, 200.0), Link(10.0, 20.0, message_us=1.0))
    flat = min(cost(name, f"{nodes}x8", num_bytes, slow) for name in ("one-shot", "two-shot"))
    hierarchical = min(
        cost(name, f"{nodes}x8", num_bytes, slow)
        for name in ("nvrar", "direct", "halving-doubling")
    )
    assert hierarchical < flat
    if num_bytes < 1 << 20 or nodes < 8:  # where exchanging an eighth is not too much
        assert cost("nvrar", f"{nodes}x8", num_bytes, slow) < flat


@settings(max_examples=60)
@given(
    st.sampled_from(["2x4", "3x3", "1x6", "5x1", "4x2"]),
    st.integers(0, 1 << 26),
    st.integers(0, 1 << 20),
    st.sampled_from(list(MACHINES)),
)
def test_more_bytes_never_cost_less(shape: str, num_bytes: int, more: int, machine: str) -> None:
    topology = Topology.parse(shape)
    for plan in Plan.all(topology):
        less = time_us(plan, topology, num_bytes, MACHINES[machine])
        assert time_us(plan, topology, num_bytes + more, MACHINES[machine]) >= less > 0


def test_machines() -> None:
    for name, machine in MACHINES.items():
        assert machine.name == name
        assert machine.source
        assert machine_named(name) is machine
    with pytest.raises(ArgumentError, match="no machine is named 'frontier'; the names are gloo, "):
        machine_named("frontier")


@pytest.mark.parametrize(
    "wrong",
    [{"latency_us": -1.0}, {"bandwidth_gbps": 0.0}, {"inflation": 0.5}, {"message_us": -0.1}],
)
def test_a_link_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match="must"):
        Link(**{"latency_us": 1.0, "bandwidth_gbps": 1.0, **wrong})
