# SPDX-License-Identifier: Apache-2.0
"""Who sits where: how many nodes, how many ranks on each, and in which order the ranks are counted.

Everything here is a pure function of its arguments except :meth:`Topology.detect`, which asks the
other ranks of the group.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nvrar.errors import TopologyError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

log = logging.getLogger("nvrar")

# What a task of srun has. A batch script has SLURM_PROCID too, and mpirun's processes beside it; those that
# it starts elsewhere count nodes without the script's.
_SRUN_STEP = ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "SLURM_STEPID")
# In order of trust: the first kind that every rank has decides. A launcher knows better than a host
# name, which containers on different machines may share.
_SOURCES = ("NVRAR_RANKS_PER_NODE", "torchrun", "Slurm", "host name")


@dataclass(frozen=True, slots=True)
class Topology:
    """``num_nodes`` nodes of ``ranks_per_node`` ranks each.

    A rank's *position* is ``local_rank + ranks_per_node * node_rank``; plans are written in positions.
    ``order[position]`` is the group rank that sits there. Left empty it is the identity, which is what
    torchrun and Slurm's block distribution give; a cyclic distribution gives another permutation.

    Raises:
        TopologyError: a count below 1, or an order that is no permutation of the ranks.
    """

    num_nodes: int
    ranks_per_node: int
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_nodes", "ranks_per_node"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise TopologyError(f"{name} is {count!r}; it must be a whole number of at least 1")
        object.__setattr__(self, "order", tuple(self.order))
        identity = tuple(range(self.world_size))
        if self.order and tuple(sorted(self.order)) != identity:
            raise TopologyError(
                f"order {self.order} is no permutation of the ranks 0 to {self.world_size - 1} "
                f"that {self} has; give each rank once, or leave it out"
            )
        if self.order == identity:  # one value for one meaning, so that equality is agreement
            object.__setattr__(self, "order", ())

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.ranks_per_node

    def rank_at(self, position: int) -> int:
        """The group rank that sits at ``position``."""
        return self.order[position] if self.order else position

    def position_of(self, rank: int) -> int:
        """Where group rank ``rank`` sits."""
        return self.order.index(rank) if self.order else rank

    def node_of(self, position: int) -> int:
        """The node that ``position`` is on."""
        return position // self.ranks_per_node

    def __str__(self) -> str:
        return f"{self.num_nodes}x{self.ranks_per_node}"

    @classmethod
    def parse(cls, text: str) -> Topology:
        """``"2x4"`` as two nodes of four ranks.

        Raises:
            TopologyError: anything else.
        """
        if not isinstance(text, str):
            raise TopologyError(f"topology {text!r} is no text such as '2x4'")
        nodes, separator, ranks = text.lower().partition("x")
        if not (separator and nodes.strip().isdecimal() and ranks.strip().isdecimal()):
            raise TopologyError(f"topology {text!r} is not NODESxRANKS_PER_NODE, such as 2x4")
        return cls(int(nodes), int(ranks))

    @classmethod
    def flat(cls, num_ranks: int) -> Topology:
        """Every rank on a node of its own: no assumption about which links are short."""
        return cls(num_ranks, 1)

    @classmethod
    def detect(cls, group: ProcessGroup | None = None, timeout_s: float = 30.0) -> Topology:
        """The topology of ``group`` (None: the default group). Collective over the group.

        Nodes are told apart by ``NVRAR_RANKS_PER_NODE`` (global rank divided by it; one host can so
        play several nodes), else torchrun's ``GROUP_RANK``, else Slurm's ``SLURM_NODEID``, else the
        host's name and boot id: the first of these that all ranks have.
        Nodes with unequal numbers of ranks give :meth:`flat`, said once in the log.

        Raises:
            ArgumentError: no process group, or one that does not hold this rank.
            TopologyError: the override is malformed, or not the same on all ranks.
            PeerTimeout: a rank did not come within ``timeout_s``.
        """
        import torch.distributed as dist

        from nvrar.meeting import exchange_values, resolve_group

        group = resolve_group(group)
        sightings = exchange_values(group, "topology", sighting(os.environ), timeout_s)
        ranks = dist.get_process_group_ranks(group)
        return from_sightings(sightings, ranks, is_first=group.rank() == 0)


def sighting(environment: Mapping[str, str]) -> dict[str, str]:
    """What this process can tell about the node it is on, by source."""
    seen = {}
    if environment.get("NVRAR_RANKS_PER_NODE"):
        seen["NVRAR_RANKS_PER_NODE"] = environment["NVRAR_RANKS_PER_NODE"]
    if "GROUP_RANK" in environment and "TORCHELASTIC_RUN_ID" in environment:
        seen["torchrun"] = environment["GROUP_RANK"]
    if "SLURM_NODEID" in environment and is_srun_task(environment):
        seen["Slurm"] = environment["SLURM_NODEID"]
    seen["host name"] = f"{socket.gethostname()}/{boot_id()}"
    return seen


def boot_id() -> str:
    """Of this machine's kernel; empty where it has none. Containers of one image may share a host name, but
    never a boot of two machines; those of one machine may have a host name each."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def is_srun_task(environment: Mapping[str, str]) -> bool:
    """Whether Slurm's srun started this process, or one that it comes from, among others. A step of one task
    is a shell (``srun --pty``) or a daemon, whose processes are counted by who starts them."""
    is_task = "SLURM_PROCID" in environment and any(name in environment for name in _SRUN_STEP)
    num_tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS")
    return is_task and num_tasks != "1"


def from_sightings(
    sightings: Sequence[Mapping[str, str]], global_ranks: Sequence[int], *, is_first: bool = True
) -> Topology:
    """The topology that a list of sightings, one per group rank, amounts to. ``is_first``: whether this rank
    warns of nodes that are unequal."""
    override = {s.get("NVRAR_RANKS_PER_NODE") for s in sightings}
    if override != {None}:
        source, nodes = "NVRAR_RANKS_PER_NODE", _overridden(override, global_ranks)
    else:
        source = next(s for s in _SOURCES if all(s in seen for seen in sightings))
        nodes = [seen[source] for seen in sightings]
    return _grouped(nodes, source, logging.WARNING if is_first else logging.DEBUG)


def _overridden(values: set[str | None], global_ranks: Sequence[int]) -> list[str]:
    if len(values) > 1:
        shown = ", ".join(sorted("unset" if v is None else repr(v) for v in values))
        raise TopologyError(
            f"NVRAR_RANKS_PER_NODE differs between ranks ({shown}); set the same on all, or on none"
        )
    (text,) = values
    if text is None or not text.isdecimal() or int(text) < 1:
        raise TopologyError(
            f"NVRAR_RANKS_PER_NODE is {text!r}; it must be a whole number of at least 1"
        )
    return [str(rank // int(text)) for rank in global_ranks]


def _grouped(nodes: Sequence[str], source: str, level: int) -> Topology:
    members: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        members.setdefault(node, []).append(rank)
    counts = [len(ranks) for ranks in members.values()]
    if len(set(counts)) > 1:
        log.log(
            level,
            "nodes hold unequal numbers of ranks (%s, by %s): using a flat plan over %d ranks. "
            "Start the same number of ranks on every node for a hierarchical one.",
            counts, source, len(nodes),
        )  # fmt: skip
        return Topology.flat(len(nodes))
    return Topology(len(counts), counts[0], tuple(r for ranks in members.values() for r in ranks))
