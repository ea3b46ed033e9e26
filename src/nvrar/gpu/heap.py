"""NVSHMEM's symmetric heap: one per process, cut into pieces for communicators.

NVSHMEM is initialised once for all ranks of the default process group, or found initialised by torch or
another library; its own allocation is collective over all of them. So one arena is taken at the start, and
a communicator's piece is agreed on by its own ranks alone: any group, overlapping ones too.
"""

from __future__ import annotations

import base64
import ctypes
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nvrar.errors import NvrarError
from nvrar.sideband import exchange_values

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DEFAULT_ARENA_BYTES = 512 << 20
GRANULE = 1024  # pieces start at multiples of it, so that every packet is aligned
_INITIALISED = 2  # NVSHMEM_STATUS_IS_INITIALIZED; higher values say more


class GpuUnavailable(NvrarError):
    """What the GPU executor needs is not here; the message says what, and how to get it."""


@dataclass(frozen=True)
class Piece:
    """A stretch of the arena, at the same offset on every rank of its group."""

    offset: int
    num_bytes: int
    address: int  # on this rank


class Heap:
    """The arena of this process. Use :func:`open_heap`."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self._nvshmem = _bindings()
        self._address = address
        self.num_bytes = num_bytes
        self.pe: int = self._nvshmem.my_pe()
        self._taken: set[tuple[int, int]] = set()

    def allocate(self, group: ProcessGroup, num_bytes: int, timeout_s: float) -> Piece:
        """A zeroed piece. Collective over ``group``.

        Raises:
            GpuUnavailable: no place is free on all ranks at once.
            PeerTimeout: a rank did not come.
        """
        num_bytes = -(-num_bytes // GRANULE) * GRANULE
        taken = exchange_values(group, "heap", sorted(self._taken), timeout_s)
        everywhere = [(a, b) for spans in taken for a, b in spans]
        offset = first_gap(everywhere, num_bytes, self.num_bytes)
        if offset is None:
            raise GpuUnavailable(
                f"{num_bytes} bytes of symmetric memory are wanted and the arena has {self.num_bytes}, "
                f"of which {len(everywhere)} pieces are taken; lower max_bytes, close communicators, or "
                f"set NVRAR_HEAP_BYTES to more than {self.num_bytes} on all ranks before the first one"
            )
        self._taken.add((offset, offset + num_bytes))
        piece = Piece(offset, num_bytes, self._address + offset)
        _zero(piece.address, num_bytes)
        # Nobody may write into a piece before its owner has zeroed it.
        exchange_values(group, "heap zeroed", True, timeout_s)
        return piece

    def release(self, piece: Piece) -> None:
        """Gives the piece back; local. Nothing may be on its way into it any more."""
        self._taken.discard((piece.offset, piece.offset + piece.num_bytes))

    def is_mapped(self, pe: int) -> bool:
        """Whether plain loads and stores reach the memory of ``pe``."""
        return pe == self.pe or bool(self._nvshmem.ptr(self._address, pe))

    def address_at(self, piece: Piece, pe: int) -> int:
        """The address of the same piece on ``pe``, or 0 where that memory is not mapped here."""
        return piece.address if pe == self.pe else int(self._nvshmem.ptr(piece.address, pe))


def first_gap(taken: list[tuple[int, int]], num_bytes: int, limit: int) -> int | None:
    """The lowest offset at which ``num_bytes`` overlap none of ``taken``; None if there is none."""
    offset = 0
    for start, stop in sorted(taken):
        if offset + num_bytes <= start:
            break
        offset = max(offset, stop)
    return offset if offset + num_bytes <= limit else None


# NVSHMEM is one per process; so is this.
_heap: Heap | None = None


def open_heap(timeout_s: float) -> Heap:
    """The arena. The first call is collective over the default process group, whichever group asks.

    Raises:
        GpuUnavailable: NVSHMEM's Python package is missing, or it was initialised for other ranks.
        PeerTimeout: a rank of the default group did not come.
    """
    global _heap
    if _heap is None:
        _heap = _open(timeout_s)
    return _heap


def _open(timeout_s: float) -> Heap:
    import torch.distributed as dist

    nvshmem = _bindings()
    world = dist.group.WORLD
    assert world is not None
    arena_bytes = int(os.environ.get("NVRAR_HEAP_BYTES") or DEFAULT_ARENA_BYTES)
    ready = nvshmem.init_status() >= _INITIALISED
    offer = {"arena": arena_bytes, "ready": ready, "id": None}
    if world.rank() == 0 and not ready:
        offer["id"] = _new_unique_id(nvshmem)
    offers = exchange_values(world, "nvshmem", offer, timeout_s)
    if len({o["ready"] for o in offers}) > 1 or len({o["arena"] for o in offers}) > 1:
        raise GpuUnavailable(
            "ranks differ in NVRAR_HEAP_BYTES, or NVSHMEM was initialised by another library on some of "
            "them only; make that the same on all ranks of the default group"
        )
    if not ready:
        _initialise(nvshmem, world.rank(), world.size(), offers[0]["id"])
    if nvshmem.n_pes() != world.size():
        raise GpuUnavailable(
            f"NVSHMEM was initialised by another library for {nvshmem.n_pes()} ranks, and the default "
            f"process group has {world.size()}; initialise nvrar first, or with the same ranks"
        )
    address = nvshmem.align(GRANULE, arena_bytes)
    if not address:
        raise GpuUnavailable(
            f"NVSHMEM has no {arena_bytes} bytes of symmetric memory left; lower NVRAR_HEAP_BYTES or "
            "raise NVSHMEM_SYMMETRIC_SIZE"
        )
    return Heap(address, arena_bytes)


def _bindings() -> Any:
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib
        from nvshmem import bindings
    except ImportError as error:
        raise GpuUnavailable(
            f"{error}; pip install 'nvrar[cu13]' (or [cu12]) brings NVSHMEM's Python package"
        ) from error
    load_nvidia_dynamic_lib("nvshmem_host")
    return bindings


def _new_unique_id(nvshmem: Any) -> str:
    _prefer_given_interface()
    unique_id = nvshmem.uniqueid()
    nvshmem.get_uniqueid(unique_id.ptr)
    size = nvshmem.uniqueid_dtype.itemsize
    return base64.b64encode(ctypes.string_at(unique_id.ptr, size)).decode()


def _initialise(nvshmem: Any, rank: int, num_ranks: int, encoded: str) -> None:
    _prefer_given_interface()
    raw = base64.b64decode(encoded)
    unique_id = nvshmem.uniqueid()
    ctypes.memmove(unique_id.ptr, raw, len(raw))
    attributes = nvshmem.InitAttr()
    nvshmem.set_attr_uniqueid_args(rank, num_ranks, unique_id.ptr, attributes.ptr)
    nvshmem.hostlib_init_attr(nvshmem.Flags.INIT_WITH_UNIQUEID, attributes.ptr)


def _prefer_given_interface() -> None:
    """The interface that the user chose for NCCL or gloo is the one to meet on here too."""
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if os.environ.get(name):
            os.environ.setdefault("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", os.environ[name])
            return


def _zero(address: int, num_bytes: int) -> None:
    from cuda.bindings import driver

    (status,) = driver.cuMemsetD8(address, 0, num_bytes)
    if not status:
        (status,) = driver.cuCtxSynchronize()
    if status:
        raise NvrarError(f"zeroing symmetric memory failed: {status!r}")


def initialise_library(handle: int) -> None:
    """Tells a loaded kernel library where NVSHMEM's device state is. Needed once a library that puts."""
    _bindings().culibrary_init(handle)
