# SPDX-License-Identifier: Apache-2.0
"""A communicator's memory on the symmetric heap, and how each peer's is reached."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from nvrar.errors import ArgumentError
from nvrar.gpu import heap, layout, links
from nvrar.gpu.algorithms import Algorithm
from nvrar.gpu.layout import LL, LL128, Format
from nvrar.meeting import Meeting
from nvrar.plan import Plan
from nvrar.topology import Topology

if TYPE_CHECKING:
    import ctypes

    from cuda.core import ObjectCode

TRANSPORTS = ("auto", "direct", "put")
LINKS = (
    "nvlink",
    "peer",
    "network",
    "put",
)  # see nvrar.table.Key; best first, but for the forced one


class Workspace:
    """Collective to make. Each format has its own region, for both parities.

    Args:
        algorithms: told the link (:class:`nvrar.table.Key`), gives every algorithm that may run with its
            largest message in bytes; equal on all ranks. It sizes the regions.

    Raises:
        GpuUnavailable: the heap has no place for it.
        ArgumentError: NVRAR_TRANSPORT asks for what the links cannot do, or another GPU is current than the
            heap's; DisagreementError on the others.
        PeerTimeout: a rank did not come.
    """

    def __init__(
        self,
        meeting: Meeting,
        topology: Topology,
        algorithms: Callable[[str], dict[Algorithm, int]],
    ) -> None:
        self._topology = topology
        rank = meeting.group.rank()
        self._position = topology.position_of(rank)
        self._heap = heap.open_heap("", meeting.timeout_s)
        self._pes = meeting.exchange("pe", self._heap.pe)
        self._mapped = [self._heap.is_mapped(pe) for pe in self._pes]
        device = links.Device.current()
        devices = meeting.exchange("gpu", device.to_json())
        peers = [links.Device.from_json(d) for r, d in enumerate(devices) if r != rank]
        reached = meeting.together("transport", lambda: self._link(device, peers))
        # The worst that any rank has.
        self.link = max(reached, key=LINKS.index)
        largest = algorithms(self.link)
        self._region_bytes = {f: _largest(largest, f) for f in (LL, LL128)}
        inbox_bytes = 2 * sum(self._region_bytes.values())
        # Inboxes, and behind them an outbox of the LL region's size where anything travels by put.
        outbox_bytes = 2 * self._region_bytes[LL] if self.link in ("network", "put") else 0
        self._piece = self._heap.allocate(meeting, inbox_bytes + outbox_bytes)
        self._outbox = self._piece.address + inbox_bytes

    def _link(self, device: links.Device, peers: Sequence[links.Device]) -> str:
        """How this rank reaches its peers: one of LINKS."""
        current = torch.cuda.current_device()
        if current != self._heap.device_index:
            raise ArgumentError(
                f"the current GPU is cuda:{current}, and NVSHMEM, which has one GPU a process, was started "
                f"on cuda:{self._heap.device_index}; make every communicator with the same GPU current: "
                "torch.cuda.set_device(local rank) before the first"
            )
        chosen = os.environ.get("NVRAR_TRANSPORT") or "auto"
        if chosen not in TRANSPORTS:
            raise ArgumentError(
                f"NVRAR_TRANSPORT is {chosen!r}; it must be {', '.join(TRANSPORTS)}"
            )
        far = [r for r, mapped in enumerate(self._mapped) if not mapped]
        if chosen == "direct" and far:
            raise ArgumentError(
                f"NVRAR_TRANSPORT=direct, but the memory of ranks {far} of the group is not mapped here; "
                "leave it unset, and such ranks are reached by put"
            )
        if chosen == "put":
            return "put"
        if far:
            return "network"
        return "nvlink" if device.keeps_lines_to(peers) else "peer"

    def room_for(self, packets: Format) -> int:
        """Bytes that the inbox of one parity may take."""
        return self._region_bytes[packets]

    def fill(self, args: ctypes.Structure, plan: Plan, packets: Format) -> None:
        """Sets what a launch must know of this memory and of the peers'."""
        region = 0 if packets is LL else 2 * self._region_bytes[LL]
        args.inbox = self._piece.address + region
        args.outbox = self._outbox
        args.parity_bytes = self._region_bytes[packets]
        digits = plan.digits(self._position)
        args.digit[: len(digits)] = digits
        members = [p for i in range(len(plan.levels)) for p in plan.members(self._position, i)]
        pes = [self._pes[self._topology.rank_at(p)] for p in members]
        args.pe[: len(pes)] = pes
        addresses = [self._heap.address_at(self._piece, pe) for pe in pes]
        args.peer[: len(pes)] = [address + region if address else 0 for address in addresses]

    def puts(self, plan: Plan) -> tuple[bool, ...]:
        """By level, whether any member is out of reach of plain stores."""
        if self.link == "put":
            return (True,) * len(plan.levels)
        return tuple(
            not all(
                self._mapped[self._topology.rank_at(p)] for p in plan.members(self._position, i)
            )
            for i in range(len(plan.levels))
        )

    def initialise(self, library: ObjectCode) -> None:
        """See :meth:`nvrar.gpu.heap.Heap.initialise`."""
        self._heap.initialise(library)

    def release(self) -> None:
        """Gives the memory back; local. No launch may be under way."""
        if self.link == "put" or not all(self._mapped):
            self._heap.finish_puts()  # the peers have what this rank sent, the outbox may still be read
        self._heap.release(self._piece)


def _largest(algorithms: dict[Algorithm, int], packets: Format) -> int:
    """Bytes of one parity's inbox that covers every algorithm of a format."""
    needs = [
        layout.inbox_bytes(a.plan, packets, num_bytes)
        for a, num_bytes in algorithms.items()
        if a.packets is packets
    ]
    return -(-max(needs, default=0) // heap.GRANULE) * heap.GRANULE
