# SPDX-License-Identifier: Apache-2.0
"""Executor 2: all-reduces of one communicator on this rank's GPU, one launch each."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from nvrar.errors import ArgumentError
from nvrar.gpu import jit, kernel, layout
from nvrar.gpu.algorithms import Algorithm
from nvrar.gpu.layout import LaunchShape, Room, Rows
from nvrar.gpu.workspace import Workspace
from nvrar.meeting import Meeting
from nvrar.plan import Plan
from nvrar.topology import Topology

if TYPE_CHECKING:
    from torch import Tensor


_MOST_NAMED = 1 << 16  # calls that are told apart in reports


@dataclass
class Prepared:
    """A call of one size, type and operation, ready but for the addresses."""

    args: Any  # of kernel.args_type_of
    pointers: ctypes.Array[ctypes.c_void_p]
    whole: kernel.Function
    ragged: kernel.Function
    shape: LaunchShape
    align: int
    shared_bytes: int = 0
    configs: dict[int, Any] = field(default_factory=dict)  # by stream


class GpuExecutor:
    """Collective to make. Kernels of one executor run in stream order.

    Args:
        algorithms: told the link (:class:`nvrar.table.Key`), gives every algorithm that may run with its
            largest message in bytes; equal on all ranks. It sizes the workspace.
        budget_s: bound on every wait inside a kernel.

    Raises:
        NvrarError: see :class:`nvrar.gpu.workspace.Workspace`.
    """

    def __init__(
        self,
        meeting: Meeting,
        topology: Topology,
        algorithms: Callable[[str], dict[Algorithm, int]],
        budget_s: float,
    ) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self._arch = f"sm_{properties.major}{properties.minor}"
        self._num_processors = properties.multi_processor_count
        self._workspace = Workspace(meeting, topology, algorithms)
        self._control = torch.zeros(4, dtype=torch.int32, device=self.device)
        self._control[0] = 2  # the first epoch: 0 is what fresh memory holds
        self._failure_memory = torch.zeros(8, dtype=torch.int32).pin_memory()
        self.failure = kernel.Failure.from_address(self._failure_memory.data_ptr())
        self._budget_ticks = kernel.budget_ticks(budget_s)
        self._functions: dict[jit.KernelSpec, kernel.Function] = {}
        # The stream itself and not its handle: the default stream's is 0, which names no stream to torch.
        self._last_stream: torch.cuda.Stream | None = None
        self._last_raw_stream: int | None = None
        self._is_hopper = properties.major >= 9  # or newer
        self._overlaps = self._is_hopper and os.environ.get("NVRAR_OVERLAP", "1") != "0"
        self._calls: dict[tuple[str, Plan], int] = {}  # by what a kernel calls them in a report
        torch.cuda.synchronize(self.device)

    # -- calls -------------------------------------------------------------------------------------

    def launch(self, prepared: Prepared, x: Tensor, out: Tensor) -> None:
        """Puts the reduction of all ranks' ``x`` into ``out`` on the current stream. Collective, capturable.

        Both are contiguous, of the length and type that was prepared, on this executor's device.
        """
        args = prepared.args
        args.in_ = source = x.data_ptr()
        args.out = target = out.data_ptr()
        whole = (source | target | args.num_bytes) % prepared.align == 0
        self._launch(prepared, prepared.whole if whole else prepared.ragged)

    def launch_rows(
        self,
        prepared: Prepared,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        out: Tensor,
        residual_out: Tensor,
    ) -> None:
        """The same with what :meth:`prepare_rows` says. All contiguous, at multiples of 16 bytes."""
        args, norm = prepared.args, prepared.args.norm
        args.in_, args.out = x.data_ptr(), out.data_ptr()
        norm.residual, norm.residual_out = residual.data_ptr(), residual_out.data_ptr()
        norm.weight = weight.data_ptr()
        self._launch(prepared, prepared.whole)

    def _launch(self, prepared: Prepared, function: kernel.Function) -> None:
        # What torch.cuda.current_stream(device).cuda_stream gives, a microsecond sooner.
        raw_stream: int = torch._C._cuda_getCurrentRawStream(self.device.index)
        if raw_stream != self._last_raw_stream:
            self._follow(torch.cuda.current_stream(self.device))
        config = prepared.configs.get(raw_stream)
        if config is None:
            config = function.config(
                prepared.shape,
                raw_stream,
                overlaps=bool(prepared.args.overlaps),
                shared_bytes=prepared.shared_bytes,
            )
            prepared.configs[raw_stream] = config
        function.launch(config, ctypes.addressof(prepared.pointers))

    def _follow(self, stream: torch.cuda.Stream) -> None:
        """Keeps the kernels of this communicator in order when the caller changes streams. A captured
        graph is ordered by whoever launches it."""
        if torch.cuda.is_current_stream_capturing():
            return
        if self._last_stream is not None:
            stream.wait_stream(self._last_stream)
        self._last_stream, self._last_raw_stream = stream, stream.cuda_stream

    def prepare(
        self, num_bytes: int, dtype: torch.dtype, op: str, algorithm: Algorithm
    ) -> Prepared:
        """What an all-reduce needs. Compiles and loads its kernels the first time; local.

        Raises:
            ArgumentError: the message is larger than the workspace was made for, or kernels would have to
                be compiled while a graph is captured.
        """
        plan, packets = algorithm.plan, algorithm.packets
        needed = layout.inbox_bytes(plan, packets, num_bytes)
        if needed > self._workspace.room_for(packets):
            raise ArgumentError(
                f"{num_bytes} bytes by '{plan}' in {packets.name} packets need {needed} bytes, the workspace "
                f"was made for {self._workspace.room_for(packets)}; raise max_bytes"
            )
        text = f"all_reduce of {num_bytes // dtype.itemsize} x {dtype} ({op}) by '{plan}'"
        args, pointers = self._args(algorithm, text)
        kernel.fill_sum(args, plan, packets, dtype, op, num_bytes)
        whole, ragged = (self._function(algorithm, dtype, op, whole=w) for w in (True, False))
        room = self._room(whole, ragged)
        shape = layout.launch_shape(plan, packets, num_bytes, room, algorithm.shape)
        args.overlaps = self._overlaps and room.overlaps(shape)
        return Prepared(args, pointers, whole, ragged, shape, packets.align_bytes)

    def has_room_for(self, rows: Rows, algorithm: Algorithm) -> bool:
        packets = algorithm.packets
        return rows.fits(algorithm.plan, packets, self._workspace.room_for(packets))

    def prepare_rows(
        self, rows: Rows, dtype: torch.dtype, eps: float, algorithm: Algorithm
    ) -> Prepared:
        """What a sum needs whose launch goes on with the residual and RMSNorm of each row (csrc/rows.cuh).

        As :meth:`prepare`; there must be room for the rows. The plan of no levels does without the sum.
        """
        plan, packets = algorithm.plan, algorithm.packets
        text = (
            f"all_reduce_add_rms_norm of {rows.num_rows} rows of {rows.row_bytes} bytes ({dtype}, "
            f"eps {eps:g}) by '{plan}'"
        )
        args, pointers = self._args(algorithm, text)
        kernel.fill_rows(args, plan, packets, dtype, rows, eps)
        function = self._function(algorithm, dtype, "sum", rows=True)
        shared = rows.shared_bytes(plan, packets)
        room = self._room(function, shared_bytes=shared)
        shape = rows.launch_shape(plan, packets, room, has_clusters=self._is_hopper)
        args.overlaps = self._overlaps and room.overlaps(shape)
        return Prepared(args, pointers, function, function, shape, packets.align_bytes, shared)

    def load_rows(self, dtype: torch.dtype, algorithm: Algorithm) -> None:
        """Compiles and loads what :meth:`prepare_rows` would. Local."""
        # CUDA may put the loading off to the first question or launch, and then wait for all streams.
        self._function(algorithm, dtype, "sum", rows=True).resident_blocks(32)

    def _args(
        self, algorithm: Algorithm, text: str
    ) -> tuple[ctypes.Structure, ctypes.Array[ctypes.c_void_p]]:
        args = kernel.args_type_of(algorithm.plan)()
        args.budget_ticks = self._budget_ticks
        args.control = self._control.data_ptr()
        args.failure = self._failure_memory.data_ptr()
        args.call = self._number_of(text, algorithm.plan)
        self._workspace.fill(args, algorithm.plan, algorithm.packets)
        return args, (ctypes.c_void_p * 1)(ctypes.addressof(args))

    def _room(self, *functions: kernel.Function, shared_bytes: int = 0) -> Room:
        def resident(threads: int) -> int:
            return min(f.resident_blocks(threads, shared_bytes) for f in functions)

        return Room(lambda threads: self._num_processors * resident(threads))

    def _function(
        self,
        algorithm: Algorithm,
        dtype: torch.dtype,
        op: str,
        *,
        whole: bool = True,
        rows: bool = False,
    ) -> kernel.Function:
        plan = algorithm.plan
        spec = jit.KernelSpec(
            plan,
            algorithm.packets,
            dtype,
            op,
            self._arch,
            put=self._workspace.puts(plan),
            whole=whole,
            rows=rows,
            args_bytes=ctypes.sizeof(kernel.args_type_of(plan)),
        )
        if spec not in self._functions:
            if torch.cuda.is_current_stream_capturing():
                raise ArgumentError(
                    f"the kernel for {dtype} ({op}) by '{plan}' is not loaded, and cannot be while a graph "
                    "is captured; call Communicator.warmup with the sizes and the type before the capture"
                )
            library = jit.load(spec)
            if spec.uses_put:
                self._workspace.initialise(library)
            handle = int(library.get_kernel(jit.ENTRY).handle)
            self._functions[spec] = kernel.Function(handle, self.device.index)
        return self._functions[spec]

    def _number_of(self, text: str, plan: Plan) -> int:
        """What a kernel calls the call that ``text`` describes, in a report."""
        if len(self._calls) >= _MOST_NAMED and (text, plan) not in self._calls:
            text = f"a call by '{plan}'"  # few plans, but any number of sizes
        return self._calls.setdefault((text, plan), len(self._calls))

    def failed_call(self) -> tuple[str, Plan]:
        """The call that a kernel left word of, in words, and its plan."""
        index: int = self.failure.call
        return list(self._calls)[index]

    def epoch(self) -> int:
        """The epoch of the next launch. Waits for those under way."""
        torch.cuda.synchronize(self.device)
        return int(self._control[0].item()) & 0xFFFFFFFF

    def close(self) -> None:
        """Local. The workspace is given back unless a call went wrong: then packets may still come in."""
        torch.cuda.synchronize(self.device)
        if self.failure.kind == kernel.NO_FAILURE:
            with torch.cuda.device(self.device):
                self._workspace.release()
