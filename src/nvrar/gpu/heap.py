# SPDX-License-Identifier: Apache-2.0
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

import torch
import torch.distributed as dist

from nvrar.errors import ArgumentError, GpuUnavailable, NvrarError
from nvrar.meeting import Meeting, stay_out, together

if TYPE_CHECKING:
    from cuda.core import ObjectCode

DEFAULT_ARENA_BYTES = 512 << 20
GRANULE = 1024  # pieces start at multiples of it, so that every packet is aligned
_INITIALISED = 2  # NVSHMEM_STATUS_IS_INITIALIZED; higher values say more


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
        self.device_index = torch.cuda.current_device()
        self._taken: set[tuple[int, int]] = set()
        # By handle; NVSHMEM writes to all of them, whenever it is told of another.
        self._libraries: dict[int, ObjectCode] = {}

    def allocate(self, meeting: Meeting, num_bytes: int) -> Piece:
        """A zeroed piece. Collective over the meeting's group.

        Raises:
            GpuUnavailable: no place is free on all ranks at once.
            PeerTimeout: a rank did not come.
        """
        num_bytes = -(-num_bytes // GRANULE) * GRANULE
        taken = meeting.exchange("heap", sorted(self._taken))
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
        # Nobody may write into a piece before its owner has zeroed it.
        meeting.together("heap zeroed", lambda: _zero(piece.address, num_bytes))
        return piece

    def release(self, piece: Piece) -> None:
        """Gives the piece back; local. Nothing may be on its way into it any more."""
        self._taken.discard((piece.offset, piece.offset + piece.num_bytes))

    def finish_puts(self) -> None:
        """Waits until all puts of this rank are complete at both ends. With the heap's GPU current."""
        stream = torch.cuda.current_stream()
        self._nvshmem.quiet_on_stream(stream.cuda_stream)
        stream.synchronize()

    def initialise(self, library: ObjectCode) -> None:
        """Tells a loaded library whose kernels put where NVSHMEM's device state is, unless it was told.

        Raises:
            GpuUnavailable: NVSHMEM did not take it.
        """
        if int(library.handle) in self._libraries:
            return
        status = self._nvshmem.culibrary_init(int(library.handle))
        if status:
            raise GpuUnavailable(
                f"NVSHMEM did not take a kernel that puts (status {status}); the wheels nvidia-nvshmem and "
                "nvshmem4py may be of different versions: pip install -U both"
            )
        self._libraries[int(library.handle)] = library

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


# NVSHMEM is one per process; so is this: the arena, or why there is none.
_opened: Heap | str | None = None
_PURPOSE = "the first communicator with a GPU"  # of all ranks, whichever group it is on


def open_heap(missing: str, timeout_s: float) -> Heap:
    """The arena. The first call is collective over the default process group, whichever group asks.

    ``missing`` is what keeps this rank from having one, if anything does: then the others are told.

    Raises:
        GpuUnavailable: a rank of the default group lacks what it takes; on every rank, and in every
            later call.
        ArgumentError: NVRAR_HEAP_BYTES is no number; DisagreementError on the others.
        PeerTimeout: a rank of the default group did not come.
    """
    global _opened
    if _opened is None:
        try:
            _opened = _open(missing, timeout_s)
        except GpuUnavailable as error:
            _opened = str(error)  # the error itself would keep alive whoever was on the stack
    if isinstance(_opened, str):
        raise GpuUnavailable(_opened)
    return _opened


def _open(missing: str, timeout_s: float) -> Heap:
    world = dist.group.WORLD
    assert world is not None
    if missing:
        stay_out(world, _PURPOSE, missing)
        raise GpuUnavailable(missing)
    offers = together(world, _PURPOSE, lambda: _offer(world.rank()), timeout_s)
    if len({o["ready"] for o in offers}) > 1 or len({o["arena"] for o in offers}) > 1:
        raise GpuUnavailable(
            "ranks differ in NVRAR_HEAP_BYTES, or NVSHMEM was initialised by another library on some of "
            "them only; make that the same on all ranks of the default group"
        )

    def take_arena() -> int:
        nvshmem = _bindings()
        if not offers[0]["ready"]:
            _initialise(nvshmem, world.rank(), world.size(), offers[0]["id"])
        if nvshmem.n_pes() != world.size():
            raise GpuUnavailable(
                f"NVSHMEM was initialised by another library for {nvshmem.n_pes()} ranks, and the default "
                f"process group has {world.size()}; initialise nvrar first, or with the same ranks"
            )
        address: int = nvshmem.align(GRANULE, offers[0]["arena"])
        if not address:
            raise GpuUnavailable(
                f"NVSHMEM has no {offers[0]['arena']} bytes of symmetric memory left; lower "
                "NVRAR_HEAP_BYTES or raise NVSHMEM_SYMMETRIC_SIZE"
            )
        return address

    addresses = together(world, "nvshmem arena", take_arena, timeout_s)
    return Heap(addresses[world.rank()], offers[0]["arena"])


def _offer(rank: int) -> dict[str, Any]:
    torch.zeros(1, device="cuda")  # makes the context that NVSHMEM will live in
    nvshmem = _bindings()
    given = os.environ.get("NVRAR_HEAP_BYTES") or str(DEFAULT_ARENA_BYTES)
    if not given.isdecimal() or int(given) == 0:
        raise ArgumentError(f"NVRAR_HEAP_BYTES is {given!r}; it must be a number of bytes above 0")
    ready = nvshmem.init_status() >= _INITIALISED
    unique_id = _new_unique_id(nvshmem) if rank == 0 and not ready else None
    return {"arena": int(given), "ready": ready, "id": unique_id}


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
    try:
        nvshmem.hostlib_init_attr(nvshmem.Flags.INIT_WITH_UNIQUEID, attributes.ptr)
    except nvshmem.NVSHMEMError as error:
        raise GpuUnavailable(
            f"NVSHMEM did not start: {error}; NVSHMEM_DEBUG=INFO makes it say why (in a container it may "
            "be a small /dev/shm: docker run --ipc=host)"
        ) from error


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
