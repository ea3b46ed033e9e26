# SPDX-License-Identifier: Apache-2.0
"""One compiled kernel and its arguments, ready to launch."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch

from nvrar.errors import NvrarError
from nvrar.gpu.layout import Format, LaunchShape, Rows, num_units
from nvrar.plan import Plan

NO_FAILURE, PEER_MISSING, OTHER_CALL = range(3)  # FailureKind of csrc/wait.cuh
_MOST_TICKS = 2**31 - 1  # deadlines are compared as signed differences; about 26 days


class Norm(ctypes.Structure):
    """``Norm`` of csrc/wait.cuh."""

    _fields_ = (
        ("residual", ctypes.c_uint64),
        ("residual_out", ctypes.c_uint64),
        ("weight", ctypes.c_uint64),
        ("num_rows", ctypes.c_uint32),
        ("row_bytes", ctypes.c_uint32),
        ("row_units", ctypes.c_uint32),
        ("share", ctypes.c_float),
        ("eps", ctypes.c_float),
    )


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
            ("call", ctypes.c_uint32),
            ("overlaps", ctypes.c_uint32),
            ("digit", ctypes.c_uint32 * (num_levels + 1)),
            ("pe", ctypes.c_uint32 * (num_peers + 1)),
            ("peer", ctypes.c_uint64 * (num_peers + 1)),
            ("norm", Norm),
        )

    return Args


def args_type_of(plan: Plan) -> type[ctypes.Structure]:
    return args_type(len(plan.levels), sum(plan.radices))


class Failure(ctypes.Structure):
    """``Failure`` of csrc/wait.cuh. ``kind`` is PEER_MISSING, OTHER_CALL, or NO_FAILURE until all
    the rest is written."""

    _fields_ = tuple(
        (name, ctypes.c_uint32) for name in ("kind", "level", "digit", "epoch", "call")
    )


def budget_ticks(budget_s: float) -> int:
    """A wait's budget in the kernel's unit, 2**20 ns."""
    return min(max(1, int(budget_s * 1e9) >> 20), _MOST_TICKS)


def _signature(*call: object) -> int:
    """16 bits that tell calls apart; they travel with every packet."""
    return zlib.crc32(" ".join(map(str, call)).encode()) & 0xFFFF


def fill_sum(
    args: ctypes.Structure, plan: Plan, packets: Format, dtype: torch.dtype, op: str, num_bytes: int
) -> None:
    """Sets what an all-reduce of ``num_bytes`` is, apart from its addresses."""
    args.num_bytes = num_bytes
    args.num_units = num_units(plan, packets, num_bytes)
    args.signature = _signature(plan, packets.name, dtype, op, num_bytes)


def fill_sums(
    table: Iterable[ctypes.Structure],
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    plan: Plan,
    packets: Format,
    dtype: torch.dtype,
    op: str,
) -> bool:
    """Sets what every rank's all-reduce is, addresses too; returns what ``jit.KernelSpec.whole`` asks."""
    whole = True
    for args, x, out in zip(table, inputs, outputs, strict=True):
        args.in_, args.out = x.data_ptr(), out.data_ptr()
        fill_sum(args, plan, packets, dtype, op, x.nbytes)
        whole &= (args.in_ | args.out | args.num_bytes) % packets.align_bytes == 0
    return whole


def fill_rows(
    args: ctypes.Structure, plan: Plan, packets: Format, dtype: torch.dtype, rows: Rows, eps: float
) -> None:
    """Sets what a sum with residual and RMSNorm is, apart from its addresses."""
    units = rows.units_of_row(plan, packets)
    args.num_bytes = rows.num_rows * rows.row_bytes
    args.num_units = rows.num_rows * units
    norm = args.norm
    norm.num_rows, norm.row_bytes, norm.row_units = rows.num_rows, rows.row_bytes, units
    norm.share, norm.eps = dtype.itemsize / rows.row_bytes, eps
    args.signature = _signature(plan, packets.name, dtype, rows, eps)


class Function:
    """A loaded kernel, on one GPU.

    It asks for multiprocessors that give all they can to shared memory. A multiprocessor must be idle to
    divide its memory anew, so kernels that differ in it cannot share one: those of two communicators, or one
    that has begun early, would keep others from their place however much room there is.
    """

    def __init__(self, handle: int, device_idx: int) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._launch = driver.cuLaunchKernelEx
        self._handle = driver.CUfunction(handle)
        self._device_idx = device_idx
        carveout = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        self._set(carveout, 100, "dividing a multiprocessor's memory")

    def resident_blocks(self, threads: int, shared_bytes: int = 0) -> int:
        """Blocks of so many threads that a multiprocessor holds at once."""
        # The handle is a CUkernel, which launches take for a CUfunction and this query does not.
        status, function = self._driver.cuKernelGetFunction(
            self._driver.CUkernel(int(self._handle))
        )
        _check(status, "looking up a kernel")
        status, blocks = self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
            function, threads, shared_bytes
        )
        _check(status, "asking for the occupancy of a kernel")
        return max(1, int(blocks))

    def take_shared(self, shared_bytes: int) -> None:
        """Allows launches with so much dynamic shared memory."""
        most = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._set(most, shared_bytes, f"giving a kernel {shared_bytes} bytes of shared memory")

    def _set(self, attribute: object, value: int, doing: str) -> None:
        kernel, device = (
            self._driver.CUkernel(int(self._handle)),
            self._driver.CUdevice(self._device_idx),
        )
        (status,) = self._driver.cuKernelSetAttribute(attribute, value, kernel, device)
        _check(status, doing)

    def config(
        self,
        shape: LaunchShape,
        stream: int,
        ranks: int = 1,
        overlaps: bool = False,
        shared_bytes: int = 0,
    ) -> Any:
        """How to launch: made once, used for every launch of this shape on this stream.

        ``overlaps`` lets the launch begin while the kernel before it on the stream ends (programmatic
        dependent launch, from sm_90 on); the kernel itself waits before it touches memory.
        """
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = shape.blocks, ranks, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = shape.threads, 1, 1
        config.hStream, config.sharedMemBytes = self._driver.CUstream(stream), shared_bytes
        attributes = []
        ids = self._driver.CUlaunchAttributeID
        if overlaps:
            overlap = self._driver.CUlaunchAttribute()
            overlap.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            overlap.value.programmaticStreamSerializationAllowed = 1
            attributes.append(overlap)
        if shape.cluster > 1:
            cluster = self._driver.CUlaunchAttribute()
            cluster.id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            cluster.value.clusterDim.x = shape.cluster
            cluster.value.clusterDim.y = cluster.value.clusterDim.z = 1
            attributes.append(cluster)
        if attributes:
            config.attrs, config.numAttrs = attributes, len(attributes)
        return config

    def launch(self, config: Any, pointers: int) -> None:
        """``pointers`` is the address of an array of pointers to the kernel's arguments, which are read
        before this returns."""
        (status,) = self._launch(config, self._handle, pointers, 0)
        if status:
            _check(status, "launching a kernel")


def _check(status: object, doing: str) -> None:
    if status:
        raise NvrarError(f"{doing} failed: {status!r}")
