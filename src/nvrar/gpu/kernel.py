"""One compiled kernel and its arguments, ready to launch."""

from __future__ import annotations

import ctypes
import zlib
from functools import lru_cache

import torch

from nvrar.errors import NvrarError
from nvrar.gpu.layout import Format, LaunchShape, num_units
from nvrar.plan import Plan


@lru_cache(maxsize=256)
def args_type(num_levels: int, num_peers: int) -> type[ctypes.Structure]:
    """``Args`` of csrc/wait.cuh for a plan; the compiler checks that the sizes agree."""

    class Args(ctypes.Structure):
        _fields_ = (
            ("in_", ctypes.c_uint64),
            ("out", ctypes.c_uint64),
            ("num_bytes", ctypes.c_uint64),
            ("inbox", ctypes.c_uint64),
            ("parity_bytes", ctypes.c_uint64),
            ("control", ctypes.c_uint64),
            ("failure", ctypes.c_uint64),
            ("outbox", ctypes.c_uint64),
            ("budget_ticks", ctypes.c_uint32),
            ("num_units", ctypes.c_uint32),
            ("signature", ctypes.c_uint32),
            ("digit", ctypes.c_uint32 * num_levels),
            ("pe", ctypes.c_uint32 * num_peers),
            ("peer", ctypes.c_uint64 * num_peers),
        )

    return Args


def args_type_of(plan: Plan) -> type[ctypes.Structure]:
    return args_type(len(plan.levels), sum(plan.radices))


class Failure(ctypes.Structure):
    """``Failure`` of csrc/wait.cuh. ``kind`` 0: nothing happened; 1: a peer did not come; 3: a peer made
    another call."""

    _fields_ = tuple(
        (name, ctypes.c_uint32) for name in ("kind", "level", "digit", "epoch", "signature")
    )


def budget_ticks(budget_s: float) -> int:
    """A wait's budget in the kernel's unit, 2**20 ns."""
    return max(1, int(budget_s * 1e9) >> 20)


def signature(plan: Plan, packets: Format, dtype: torch.dtype, op: str, num_bytes: int) -> int:
    """16 bits that tell calls apart; they travel with every packet."""
    text = f"{plan} {packets.name} {dtype} {op} {num_bytes}"
    return zlib.crc32(text.encode()) & 0xFFFF


def fill_call(
    args: ctypes.Structure,
    plan: Plan,
    packets: Format,
    dtype: torch.dtype,
    op: str,
    in_address: int,
    out_address: int,
    num_bytes: int,
) -> None:
    """Sets what differs from call to call."""
    args.in_ = in_address
    args.out = out_address
    args.num_bytes = num_bytes
    args.num_units = num_units(plan, packets, num_bytes)
    args.signature = signature(plan, packets, dtype, op, num_bytes)


class Function:
    """A loaded kernel. A launch takes about 3 us of host time."""

    def __init__(self, handle: int) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._launch = driver.cuLaunchKernel
        self._handle = driver.CUfunction(handle)

    def resident_blocks(self, threads: int) -> int:
        """Blocks of so many threads that a multiprocessor holds at once."""
        status, blocks = self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
            self._function(), threads, 0
        )
        _check(status, "asking for the occupancy of a kernel")
        return max(1, int(blocks))

    def _function(self) -> object:
        # The handle is a CUkernel, which launches take for a CUfunction and this query does not.
        status, function = self._driver.cuKernelGetFunction(
            self._driver.CUkernel(int(self._handle))
        )
        _check(status, "looking up a kernel")
        return function

    def launch(self, shape: LaunchShape, ranks: int, argument: ctypes._CData, stream: int) -> None:
        """``argument`` is what the kernel takes by value; it is read before this returns."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        self.launch_prepared(shape, pointers, stream, ranks)

    def launch_prepared(
        self,
        shape: LaunchShape,
        pointers: ctypes.Array[ctypes.c_void_p],
        stream: int,
        ranks: int = 1,
    ) -> None:
        """As :meth:`launch`, with the array of pointers to arguments that the driver wants."""
        (status,) = self._launch(
            self._handle, shape.blocks, ranks, 1, shape.threads, 1, 1, 0, stream,
            ctypes.addressof(pointers), 0,
        )  # fmt: skip
        if status:
            _check(status, "launching a kernel")


def _check(status: object, doing: str) -> None:
    if status:
        raise NvrarError(f"{doing} failed: {status!r}")
