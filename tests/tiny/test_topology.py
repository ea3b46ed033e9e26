"""Who sits where: what each launcher's variables amount to, and what is said when they do not fit."""

from __future__ import annotations

import logging
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvrar.errors import TopologyError
from nvrar.topology import Topology, from_sightings, sighting

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "1", "RANK": "5"}
SLURM = {"SLURM_NODEID": "3", "SLURM_PROCID": "12", "SLURM_STEP_ID": "0"}


def hosts(names: str) -> list[dict[str, str]]:
    return [{"host name": name} for name in names]


def test_a_sighting_by_launcher() -> None:
    assert sighting(TORCHRUN)["torchrun"] == "1"
    assert sighting(SLURM)["Slurm"] == "3"
    assert sighting({"NVRAR_RANKS_PER_NODE": "2"})["NVRAR_RANKS_PER_NODE"] == "2"
    plain = sighting({"NVRAR_RANKS_PER_NODE": ""})
    assert list(plain) == ["host name"]
    assert plain["host name"].startswith(f"{socket.gethostname()}/")
    # GROUP_RANK alone may be anybody's; SLURM_NODEID without a step is the batch script's, as those have it
    # whom mpirun starts beside it.
    script = {"SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert list(sighting({"GROUP_RANK": "1"} | script)) == ["host name"]
    # A daemon of mpirun's is a step of its own, whose nodes count from 0 again.
    daemon = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert list(sighting(script | daemon)) == ["host name"]


def test_by_host_name() -> None:
    assert from_sightings(hosts("aabb"), range(4)) == Topology(2, 2)
    assert from_sightings(hosts("aaaa"), range(4)) == Topology(1, 4)
    assert from_sightings(hosts("a"), [0]) == Topology(1, 1)
    assert from_sightings(hosts("dcba"), range(4)) == Topology(4, 1)


def test_cyclic_placement_gives_an_order() -> None:
    topology = from_sightings(hosts("abcabc"), range(6))
    assert topology == Topology(3, 2, (0, 3, 1, 4, 2, 5))
    assert [topology.node_of(topology.position_of(r)) for r in range(6)] == [0, 1, 2, 0, 1, 2]


def test_the_first_source_that_all_ranks_have() -> None:
    both = [{"torchrun": node, "host name": "same"} for node in "0011"]
    assert from_sightings(both, range(4)) == Topology(2, 2)
    both[2] = {"host name": "same"}  # one rank was started by hand
    assert from_sightings(both, range(4)) == Topology(1, 4)
    mixed = [{"torchrun": "0", "Slurm": node, "host name": "same"} for node in "01"]
    assert from_sightings(mixed, range(2)) == Topology(1, 2), "torchrun is nearer than Slurm"
    mixed[0].pop("torchrun")
    assert from_sightings(mixed, range(2)) == Topology(2, 1)


def test_the_override_divides_global_ranks() -> None:
    seen = [{"NVRAR_RANKS_PER_NODE": "2", "torchrun": "0", "host name": "a"}] * 4
    assert from_sightings(seen, range(4)) == Topology(2, 2)
    assert from_sightings(seen[:2], [1, 3]) == Topology(2, 1), "a group of ranks 1 and 3"
    assert from_sightings(seen[:2], [2, 3]) == Topology(1, 2)
    assert from_sightings(seen, [3, 0, 2, 1]) == Topology(2, 2, (0, 2, 1, 3))


@pytest.mark.parametrize("nodes", ["aab", "aabbb", "abbb"])
def test_uneven_nodes_are_flat_and_said_once(nodes: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "nvrar"):
        topology = from_sightings(hosts(nodes), range(len(nodes)))
    assert topology == Topology.flat(len(nodes)) == Topology(len(nodes), 1)
    assert len(caplog.records) == 1
    assert "nodes hold unequal numbers of ranks" in caplog.text
    assert "by host name" in caplog.text


def test_uneven_override_is_flat() -> None:
    assert from_sightings([{"NVRAR_RANKS_PER_NODE": "2"}] * 3, range(3)) == Topology(3, 1)


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", " ", "²"])
def test_a_malformed_override(value: str) -> None:
    with pytest.raises(
        TopologyError, match=r"NVRAR_RANKS_PER_NODE is .*; it must be a whole number"
    ):
        from_sightings([{"NVRAR_RANKS_PER_NODE": value}] * 2, range(2))


def test_an_override_that_differs() -> None:
    seen = [{"NVRAR_RANKS_PER_NODE": "2"}, {"NVRAR_RANKS_PER_NODE": "4"}, {"host name": "a"}]
    with pytest.raises(
        TopologyError, match="differs between ranks \\('2', '4', unset\\); set the same"
    ):
        from_sightings(seen, range(3))


@given(st.integers(1, 100), st.integers(1, 100))
def test_parse_and_print_are_inverse(nodes: int, ranks: int) -> None:
    topology = Topology(nodes, ranks)
    assert Topology.parse(str(topology)) == topology
    assert Topology.parse(f" {nodes} X {ranks} ") == topology
    assert topology.world_size == nodes * ranks


@given(st.text(max_size=12))
def test_any_text_parses_or_is_a_topology_error(text: str) -> None:
    try:
        assert Topology.parse(text).world_size >= 1
    except TopologyError as error:
        assert "NODESxRANKS_PER_NODE" in str(error) or "at least 1" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "text", [None, 24, "", "8", "2x", "x4", "2x4x8", "ax4", "-1x4", "2*4", "²x4", "0x4", "2x0"]
)
def test_text_that_is_no_topology(text: object) -> None:
    with pytest.raises(TopologyError):
        Topology.parse(text)  # type: ignore[arg-type]


@given(st.permutations(range(12)))
def test_an_order_and_its_inverse(order: list[int]) -> None:
    topology = Topology(3, 4, tuple(order))
    for position in range(12):
        assert topology.position_of(topology.rank_at(position)) == position
    assert (topology == Topology(3, 4)) == (order == sorted(order))


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 1, 2, 2), (1, 2, 3, 4), (0, 1, 2, 3, 4)])
def test_an_order_that_is_no_permutation(order: tuple[int, ...]) -> None:
    with pytest.raises(TopologyError, match="is no permutation of the ranks 0 to 3"):
        Topology(2, 2, order)


@pytest.mark.parametrize("count", [0, -1, 1.0, "2", None, True])
def test_a_count_that_is_none(count: object) -> None:
    with pytest.raises(TopologyError, match="it must be a whole number of at least 1"):
        Topology(count, 2)  # type: ignore[arg-type]
    with pytest.raises(TopologyError, match="ranks_per_node is "):
        Topology(2, count)  # type: ignore[arg-type]


def test_topologies_are_values() -> None:
    assert Topology(2, 2, [1, 0, 3, 2]) == Topology(2, 2, (1, 0, 3, 2))  # type: ignore[arg-type]
    assert hash(Topology(2, 2, [1, 0, 3, 2])) == hash(Topology(2, 2, (1, 0, 3, 2)))  # type: ignore[arg-type]
