# SPDX-License-Identifier: Apache-2.0
"""What a communicator is asked for: whether it can work, and whether all ranks asked the same."""

from __future__ import annotations

import math
import os
import uuid
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from nvrar import tables
from nvrar._version import __version__
from nvrar.cost import Machine, machine_named
from nvrar.errors import ArgumentError, DisagreementError, NvrarError, TopologyError
from nvrar.hardware import device_name
from nvrar.host import backend_of
from nvrar.meeting import Meeting, exchange_values
from nvrar.plan import Plan
from nvrar.table import Table
from nvrar.topology import Topology, from_sightings, sighting

if TYPE_CHECKING:
    import torch.distributed as dist

EXECUTORS = ("auto", "host")


@dataclass(frozen=True)
class Options:
    """The arguments of :class:`nvrar.Communicator`, which documents them."""

    topology: Topology | None
    plan: str | Plan
    max_bytes: int
    timeout_s: float
    deterministic: bool
    wire_dtype: torch.dtype | None
    machine: Machine | str | None
    executor: str

    def check(self, num_ranks: int) -> None:
        """Raises a NvrarError for a value that cannot work, before any other rank is asked."""
        if self.wait_s() is not self.timeout_s:
            raise ArgumentError(f"timeout_s is {self.timeout_s!r}; it must be a time above 0")
        if not _is_number(self.max_bytes, int) or self.max_bytes < 0:
            raise ArgumentError(f"max_bytes is {self.max_bytes!r}; it must be 0 or more bytes")
        if not isinstance(self.deterministic, bool):
            raise ArgumentError(
                f"deterministic is {self.deterministic!r}; it must be True or False"
            )
        if self.wire_dtype not in (None, torch.float32):
            raise ArgumentError(
                f"wire_dtype is {self.wire_dtype}; it must be torch.float32 or None"
            )
        if self.executor not in EXECUTORS:
            raise ArgumentError(f"executor is {self.executor!r}; it must be 'auto' or 'host'")
        if isinstance(self.machine, str):
            machine_named(self.machine)
        elif self.machine is not None and not isinstance(self.machine, Machine):
            raise ArgumentError(f"machine is {self.machine!r}; it must be a name or a Machine")
        self._check_topology(num_ranks)
        if not isinstance(self.plan, (str, Plan)):
            raise ArgumentError(f"plan is {self.plan!r}; it must be a name, a word or a Plan")
        if self.plan != "auto":
            Plan.resolve(self.plan, self.topology or Topology.flat(num_ranks))

    def wait_s(self) -> float:
        """How long to wait for others even where ``timeout_s`` is refused: they are to be told."""
        valid = _is_number(self.timeout_s, int, float) and 0 < self.timeout_s < math.inf
        return self.timeout_s if valid else 30.0

    def _check_topology(self, num_ranks: int) -> None:
        if self.topology is None:
            return
        if not isinstance(self.topology, Topology):
            raise ArgumentError(
                f"topology is {self.topology!r}; it must be a Topology, such as Topology(2, 4) or "
                "Topology.parse('2x4')"
            )
        if self.topology.world_size != num_ranks:
            raise TopologyError(
                f"topology {self.topology} has {self.topology.world_size} ranks, the group has "
                f"{num_ranks}; num_nodes * ranks_per_node must be {num_ranks}"
            )

    def _shown(self) -> dict[str, str]:
        shown = {field.name: repr(getattr(self, field.name)) for field in fields(self)}
        shown["plan"] = str(self.plan)  # a Plan and its word are the same request
        return {"version": __version__, **shown}


@dataclass(frozen=True)
class Agreement:
    """What all ranks of a group settled on."""

    name: str
    topology: Topology
    gpu_unavailable: (
        str  # why CUDA tensors cannot have the GPU executor; empty if they can, on every rank
    )
    link: str  # what carries the host executor's messages, such as "gloo"
    tables: tuple[Table, ...]  # measured ones that hold here; rank 0's


def agree(group: dist.ProcessGroup, options: Options, unavailable: str) -> Agreement:
    """Settles what ranks must share. Collective over ``group``; a wrong value ends it on every rank.

    Raises:
        NvrarError: this rank's options cannot work (see :meth:`Options.check`).
        DisagreementError: another rank's cannot, or they differ.
        PeerTimeout: a rank did not come within ``timeout_s``.
    """
    refusal: NvrarError | None = None
    try:  # the others are told before it is raised here
        options.check(group.size())
    except NvrarError as error:
        refusal = error
    mine = {
        "name": uuid.uuid4().hex[:12],  # the first rank's becomes the communicator's
        "refusal": None if refusal is None else str(refusal),
        "sighting": sighting(os.environ),
        "gpu_unavailable": unavailable,
        "devices": {
            "host": device_name("host"),
            "gpu": "" if unavailable else device_name("gpu"),
        },
        "options": options._shown(),
    }
    try:
        said = exchange_values(group, "communicator", mine, options.wait_s())
    except NvrarError as error:
        raise refusal or error from None
    if refusal is not None:
        raise refusal
    _check_equal(said)
    topology, without_gpu = options.topology or _detected(group, said), _without_gpu(said)
    name: str = said[0]["name"]
    executor = "host" if without_gpu or options.executor == "host" else "gpu"
    devices = tuple(sorted({other["devices"][executor] for other in said}))
    found = []
    if options.plan == "auto" and group.size() > 1:
        meeting = Meeting(group, name, options.timeout_s)
        found = _tables(meeting, executor, devices, topology)
    link = backend_of(group, "cpu")
    return Agreement(name, topology, without_gpu, link, tuple(found))


def _is_number(value: object, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)  # True is an int to Python


def _tables(
    meeting: Meeting, executor: str, devices: tuple[str, ...], topology: Topology
) -> list[Table]:
    """Those that rank 0 found, whatever files the others have. Collective."""
    mine = []
    if meeting.group.rank() == 0:
        mine = [
            f.table.dumps() for f in tables.holding(os.environ, executor, devices, str(topology))
        ]
    first = meeting.exchange("tables", mine)[0]
    return [Table.loads(text) for text in first]


def _check_equal(said: list[dict[str, Any]]) -> None:
    for rank, other in enumerate(said):
        if other["refusal"] is not None:
            raise DisagreementError(f"rank {rank} refused its arguments: {other['refusal']}")
    for key in said[0]["options"]:
        values = [other["options"].get(key) for other in said]
        odd = next((r for r, value in enumerate(values) if value != values[0]), None)
        if odd is not None:
            raise DisagreementError(
                f"{key} is {values[0]} on rank 0 and {values[odd]} on rank {odd}; give the "
                "same arguments (and install the same version) on all ranks of the group"
            )


def _detected(group: dist.ProcessGroup, said: list[dict[str, Any]]) -> Topology:
    import torch.distributed as dist

    ranks, is_first = dist.get_process_group_ranks(group), group.rank() == 0
    return from_sightings([s["sighting"] for s in said], ranks, is_first=is_first)


def _without_gpu(said: list[dict[str, Any]]) -> str:
    reasons = (
        f"rank {r} {s['gpu_unavailable']}" for r, s in enumerate(said) if s["gpu_unavailable"]
    )
    return next(reasons, "")
