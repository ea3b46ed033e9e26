"""Which plan for which size."""

from __future__ import annotations

import time

import pytest

from nvrar.cost import MACHINES, Link, Machine, time_us
from nvrar.plan import Plan
from nvrar.topology import Topology
from nvrar.tune import are_few_parts, choose, ranking

SHAPES = ["1x1", "1x2", "2x1", "2x2", "1x6", "5x1", "3x3", "7x1", "4x4", "8x8"]
SIZES = [0, 1, 2, 3, 100, 4096, 16 << 10, 100_000, 1 << 20, 8 << 20, 1 << 30]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("machine", list(MACHINES))
def test_there_is_a_plan_for_every_size(shape: str, machine: str) -> None:
    topology = Topology.parse(shape)
    for size in SIZES:
        for deterministic in (False, True):
            plan = choose(topology, size, MACHINES[machine], deterministic)
            plan.check(topology.world_size)
            assert plan in Plan.all(topology)


@pytest.mark.parametrize("shape", ["4x4", "6x4", "7x3", "1x12", "16x1", "32x2", "24x4"])
def test_it_is_the_fastest_and_of_equals_the_first(shape: str) -> None:
    topology = Topology.parse(shape)
    pinned = Plan.named("nvrar", topology).radices
    for machine in MACHINES.values():
        for size in (1 << k for k in range(0, 27, 3)):
            plans = [p for p in Plan.all(topology) if are_few_parts(p)]
            every = [(time_us(p, topology, size, machine), p) for p in plans]
            assert choose(topology, size, machine) == min(every, key=lambda timed: timed[0])[1]
            fitting = [timed for timed in every if timed[1].radices == pinned]
            best = min(fitting, key=lambda timed: timed[0])[1]
            assert choose(topology, size, machine, deterministic=True) == best


def test_sizes_are_told_apart_by_the_next_power_of_two() -> None:
    for size in (5, 8, 513, 1024, 70_000, 131_072):
        power = 1 << (size - 1).bit_length()
        assert choose(Topology(2, 4), size, MACHINES["gloo"]) == choose(
            Topology(2, 4), power, MACHINES["gloo"]
        )
    # Right at a boundary between plans the power of two itself belongs to the size below.
    latency_bound = Machine("latency", Link(10.0, 1.0), Link(10.0, 1.0))
    plans = [choose(Topology(1, 4), 1 << k, latency_bound) for k in range(24)]
    assert str(plans[0]) == "exchange:4"
    assert str(plans[-1]) == "split:4"
    change = next(k for k in range(24) if plans[k] != plans[0])
    assert choose(Topology(1, 4), (1 << (change - 1)) + 1, latency_bound) == plans[change]
    assert choose(Topology(1, 4), 1 << (change - 1), latency_bound) == plans[0]


def test_deterministic_pins_the_radices() -> None:
    topology = Topology(4, 4)
    pinned = Plan.named("nvrar", topology).radices
    for machine in MACHINES.values():
        chosen = {choose(topology, 1 << k, machine, deterministic=True) for k in range(30)}
        assert {plan.radices for plan in chosen} == {pinned}
    slow_wire = Machine("slow wire", Link(1.0, 100.0), Link(10.0, 1.0, message_us=5.0))
    free = {choose(topology, 1 << k, slow_wire) for k in range(30)}
    assert len({plan.radices for plan in free}) > 1, "else there would be nothing to pin"


def test_it_is_pure() -> None:
    arguments = (Topology(3, 4), 65536, MACHINES["perlmutter"])
    first = choose(*arguments)
    choose.cache_clear()
    assert choose(*arguments) == first
    assert choose(Topology(3, 4), 65536, MACHINES["perlmutter"], False) == first


def test_the_placement_order_does_not_matter() -> None:
    """Plans are in positions, so all orders of a topology choose alike."""
    for size in SIZES:
        assert choose(Topology(2, 2, (0, 2, 1, 3)), size, MACHINES["gloo"]) == choose(
            Topology(2, 2), size, MACHINES["gloo"]
        )


def test_ranking_holds_all_plans_fastest_first() -> None:
    found = ranking(Topology(2, 4), 262144, MACHINES["h100-ndr"])
    assert {plan for plan, _ in found} == set(Plan.all(Topology(2, 4)))
    assert [t for _, t in found] == sorted(t for _, t in found)
    assert found[0][0] == choose(Topology(2, 4), 262144, MACHINES["h100-ndr"])


def test_a_large_cluster_is_searched_in_a_moment() -> None:
    """It happens when a communicator is made, or inside the first all-reduce of a size."""
    choose.cache_clear()
    began = time.perf_counter()
    for exponent in range(24):  # as many as a communicator chooses for when it is made
        choose(Topology(128, 8), 1 << exponent, MACHINES["perlmutter"])
    assert time.perf_counter() - began < 5
