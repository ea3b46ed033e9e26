# SPDX-License-Identifier: Apache-2.0
"""Where packets lie: how a message is cut into units, and a rank's inbox into slots.

Pure, and the host's view of csrc/plan.cuh and csrc/packet.cuh. A message is cut into ``num_parts``
innermost parts of ``num_units`` units; a slot holds one unit as packets. An inbox has ``num_areas`` rows of
``num_units`` slots, twice: calls alternate between the two by the parity of their epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from nvrar.plan import Plan

KB = 1024


@dataclass(frozen=True, slots=True)
class Format:
    """A packet format. ``name`` is the struct in csrc/packet.cuh."""

    name: str
    threads: int  # that share a unit
    data_bytes: int  # of the message in a unit
    slot_bytes: int  # of an inbox for a unit
    align_bytes: int  # of the message, for the fast kernel


LL = Format("LL", 1, 8, 16, 8)
LL128 = Format("LL128", 32, 960, 1024, 16)
FORMATS = {f.name: f for f in (LL, LL128)}


def num_parts(plan: Plan) -> int:
    """Innermost parts of a message: the product of the split radices."""
    return prod(level.radix for level in plan.levels if level.mode == "split")


def num_areas(plan: Plan) -> int:
    """Slots an inbox has for each unit of a part."""
    areas, inside = 0, num_parts(plan)
    for level in plan.levels:
        split = level.mode == "split"
        inside //= level.radix if split else 1
        areas += level.radix * inside * (2 if split else 1)
    return areas


def num_units(plan: Plan, packets: Format, num_bytes: int) -> int:
    """Units in a part of a message of ``num_bytes``."""
    return -(-num_bytes // (num_parts(plan) * packets.data_bytes))


def inbox_bytes(plan: Plan, packets: Format, num_bytes: int) -> int:
    """Size of the inbox of one parity that a message of ``num_bytes`` needs."""
    return num_areas(plan) * num_units(plan, packets, num_bytes) * packets.slot_bytes


@dataclass(frozen=True, slots=True)
class LaunchShape:
    blocks: int
    threads: int
    cluster: int = 1  # blocks that can write to each other's shared memory

    @property
    def taken_blocks(self) -> int:
        """Blocks of the GPU that it keeps from others: clusters of no power of two leave gaps."""
        return self.blocks // self.cluster * _power_above(self.cluster)


def _power_above(number: int) -> int:
    return 1 << (number - 1).bit_length()


def most_threads(plan: Plan) -> int:
    """The largest block that a kernel is compiled for.

    Threads of a plan that splits carry a unit of every part and need the registers of two; there are
    fewer of them for it.
    """
    return 256 if num_parts(plan) > 1 else 512


@dataclass(frozen=True)
class Room:
    """What launches of one communicator may take of a GPU. ``resident`` says how many blocks of so many
    threads the GPU holds at once, of a kernel.

    Blocks wait for peers, so two communicators on two streams must both find room, in whatever order the
    ranks launch them: each takes three eighths at most. Launches that overlap take a quarter each, for then
    two of one communicator are there. (Two halves were seen to block each other.)
    """

    resident: Callable[[int], int]

    def most_blocks(self, threads: int) -> int:
        return max(1, self.resident(threads) * 3 // 8)

    def overlaps(self, shape: LaunchShape) -> bool:
        """Whether the next launch may begin while this one ends."""
        return 4 * shape.taken_blocks <= self.resident(shape.threads)


def launch_shape(
    plan: Plan,
    packets: Format,
    num_bytes: int,
    room: Room,
    wanted: LaunchShape | None = None,
) -> LaunchShape:
    """``wanted`` (a measured one) as far as it fits; else small blocks and many of them, so that a small
    message still uses many multiprocessors.

    All blocks must be resident at once, because they wait for peers, and so have to fit the ``room``.
    """
    if wanted is not None:
        threads = min(wanted.threads, most_threads(plan))
        return LaunchShape(max(1, min(room.most_blocks(threads), wanted.blocks)), threads)
    needed = num_units(plan, packets, num_bytes) * packets.threads
    threads = 128
    while threads < most_threads(plan) and needed > threads * 64:
        threads *= 2
    return LaunchShape(max(1, min(room.most_blocks(threads), -(-needed // threads))), threads)


def shapes_worth_trying(plan: Plan, packets: Format, num_bytes: int) -> tuple[LaunchShape, ...]:
    """Launches beside the usual one: blocks of every size, one, two and four turns of them."""
    needed = num_units(plan, packets, num_bytes) * packets.threads
    sizes = [threads for threads in (64, 128, 256, 512) if threads <= most_threads(plan)]
    return tuple(
        dict.fromkeys(
            LaunchShape(-(-needed // (threads * turns)), threads)
            for threads in sizes
            for turns in (1, 2, 4)
        )
    )


MOST_ROW_BYTES = 64 * KB  # a hidden size of 32768 in bf16; longer rows were not tried
# The squares of a chunk are added up first, in any format (rms_norm.py).
_CHUNK_BYTES = LL128.data_bytes
# Of the 48 KB that a block has without asking the kernel takes some itself.
_MOST_SHARED_BYTES = 47 * KB
# In an inbox of LL: NVLink carries that much in 0.4 us, and a launch of its own takes longer.
_MOST_PADDING = 128 * KB
_BUSY_CHUNKS = {LL: 1, LL128: 5}
_CLUSTERS = (2, 4, 8)  # blocks in one, up to what every GPU with clusters can have


@dataclass(frozen=True, slots=True)
class Rows:
    """A message as rows, each taken by one block or one cluster, and each cut into the parts of the plan."""

    num_rows: int
    row_bytes: int

    def chunks_of_row(self, plan: Plan) -> int:
        """Chunks that a row has of each part: whole ones, which a block does not share with another."""
        return -(-self.row_bytes // (num_parts(plan) * _CHUNK_BYTES))

    def units_of_row(self, plan: Plan, packets: Format) -> int:
        """Units that a row has of each part."""
        return self.chunks_of_row(plan) * (_CHUNK_BYTES // packets.data_bytes)

    def inbox_bytes(self, plan: Plan, packets: Format) -> int:
        """As :func:`inbox_bytes`: more than it, by what rows leave empty of their last units."""
        units = self.num_rows * self.units_of_row(plan, packets)
        return num_areas(plan) * units * packets.slot_bytes

    def fits(self, plan: Plan, packets: Format, room: int) -> bool:
        """Whether sum and norm may be one launch, in an inbox of ``room`` bytes. Equal on all ranks."""
        needed = self.inbox_bytes(plan, packets)
        padding = needed - inbox_bytes(plan, packets, self.num_rows * self.row_bytes)
        return (
            needed <= room
            and self.shared_bytes(plan, packets) <= _MOST_SHARED_BYTES
            and (packets is LL128 or padding <= _MOST_PADDING)
        )

    def shared_bytes(self, plan: Plan, packets: Format) -> int:
        """Of the block's memory, for the squares: two marks of 8 bytes for each chunk, and with LL a float
        for each unit."""
        marks = 16 * self.chunks_of_row(plan)
        return num_parts(plan) * (
            marks if packets is LL128 else marks + 4 * self.units_of_row(plan, packets)
        )

    def launch_shape(
        self, plan: Plan, packets: Format, room: Room, has_clusters: bool
    ) -> LaunchShape:
        """A row's chunks over a cluster, where there are clusters and few rows: a multiprocessor is kept busy
        by the instructions of so many chunks as long as packets are under way."""
        chunks, busy = self.chunks_of_row(plan), _BUSY_CHUNKS[packets]
        shape = self._shape(plan, packets, room, 1)
        for cluster in _CLUSTERS if has_clusters else ():
            wider = self._shape(plan, packets, room, cluster)
            if (
                chunks <= busy * shape.cluster
                or wider.blocks < wider.cluster * self.num_rows
                or not room.overlaps(wider)
            ):
                break
            shape = wider
        return shape

    def _shape(self, plan: Plan, packets: Format, room: Room, most_cluster: int) -> LaunchShape:
        chunks = self.chunks_of_row(plan)
        threads_of_chunk = packets.threads * _CHUNK_BYTES // packets.data_bytes
        turns = -(-chunks // (most_cluster * (most_threads(plan) // threads_of_chunk)))
        chunks_of_block = -(-chunks // (most_cluster * turns))
        cluster = min(most_cluster, -(-chunks // chunks_of_block))  # none goes empty
        threads = -(-chunks_of_block * threads_of_chunk // 32) * 32
        num_teams = min(room.most_blocks(threads) // _power_above(cluster), self.num_rows)
        return LaunchShape(max(1, num_teams) * cluster, threads, cluster)
