"""Executor 2: all-reduces of one communicator on this rank's GPU, one launch each."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nvrar.errors import ArgumentError
from nvrar.gpu import heap, jit, kernel, layout
from nvrar.gpu.algorithms import Algorithm
from nvrar.gpu.layout import LL, LL128, Format, LaunchShape
from nvrar.plan import Plan
from nvrar.sideband import exchange_values
from nvrar.topology import Topology

if TYPE_CHECKING:
    from torch import Tensor

TRANSPORTS = ("auto", "direct", "put")


@dataclass
class Prepared:
    """A call of one size, type and operation, ready but for the addresses."""

    args: ctypes.Structure
    pointers: ctypes.Array[ctypes.c_void_p]
    whole: kernel.Function
    ragged: kernel.Function
    shape: LaunchShape
    align: int
    configs: dict[int, Any] = field(default_factory=dict)  # by stream


class GpuExecutor:
    """Collective to make over ``group``. Kernels of one executor run in stream order.

    Args:
        algorithms: told whether LL128 may be used, gives every algorithm that may run with its largest
            message in bytes; equal on all ranks. It sizes the workspace.
        timeout_s: bound on waits for peers during creation.
        budget_s: bound on every wait inside a kernel.

    Raises:
        GpuUnavailable: NVSHMEM cannot be had, or has no memory left.
        ArgumentError: NVRAR_TRANSPORT asks for what the links cannot do.
        PeerTimeout: a rank did not come.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        topology: Topology,
        algorithms: Callable[[bool], dict[Algorithm, int]],
        timeout_s: float,
        budget_s: float,
    ) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=self.device)  # makes the context that everything below lives in
        properties = torch.cuda.get_device_properties(self.device)
        self._arch = f"sm_{properties.major}{properties.minor}"
        self._num_processors = properties.multi_processor_count
        self._topology = topology
        self._position = topology.position_of(group.rank())
        self._transport = _transport_option()
        self._heap = heap.open_heap(timeout_s)
        self._pes = exchange_values(group, "pe", self._heap.pe, timeout_s)
        self._mapped = [self._heap.is_mapped(pe) for pe in self._pes]
        if self._transport == "direct" and not all(self._mapped):
            far = [r for r, mapped in enumerate(self._mapped) if not mapped]
            raise ArgumentError(
                f"NVRAR_TRANSPORT=direct, but the memory of ranks {far} is not mapped on rank "
                f"{group.rank()}; leave it unset, and such ranks are reached by put"
            )
        near = all(self._mapped) and self._transport != "put" and _links_keep_lines(self._pes)
        self.algorithms = algorithms(all(exchange_values(group, "near", near, timeout_s)))

        self._region_bytes = {f: _largest(self.algorithms, f) for f in (LL, LL128)}
        inbox_bytes = 2 * sum(self._region_bytes.values())
        # Inboxes, and behind them an outbox of the LL region's size for what travels by put.
        self._piece = self._heap.allocate(
            group, inbox_bytes + 2 * self._region_bytes[LL], timeout_s
        )
        self._outbox = self._piece.address + inbox_bytes
        self._control = torch.zeros(4, dtype=torch.int32, device=self.device)
        self._control[0] = 2  # the first epoch: 0 is what fresh memory holds
        self._failure_memory = torch.zeros(8, dtype=torch.int32).pin_memory()
        self.failure = kernel.Failure.from_address(self._failure_memory.data_ptr())
        self._budget_ticks = kernel.budget_ticks(budget_s)
        self._functions: dict[jit.KernelSpec, kernel.Function] = {}
        self._libraries: list[object] = []
        # The stream itself and not its handle: the default stream's is 0, which names no stream to torch.
        self._last_stream: torch.cuda.Stream | None = None
        self._last_raw_stream: int | None = None
        self._overlaps = properties.major >= 9 and os.environ.get("NVRAR_OVERLAP", "1") != "0"
        self._calls: dict[int, tuple[str, Plan]] = {}  # what each signature stands for
        torch.cuda.synchronize(self.device)
        exchange_values(group, "gpu executor", True, timeout_s)

    # -- calls -------------------------------------------------------------------------------------

    def launch(self, prepared: Prepared, x: Tensor, out: Tensor) -> None:
        """Puts the reduction of all ranks' ``x`` into ``out`` on the current stream. Collective, capturable.

        Both are contiguous, of the length and type that was prepared, on this executor's device.
        """
        args = prepared.args
        args.in_ = source = x.data_ptr()
        args.out = target = out.data_ptr()
        whole = (source | target | args.num_bytes) % prepared.align == 0
        function = prepared.whole if whole else prepared.ragged
        stream = torch.cuda.current_stream(self.device)
        raw_stream = stream.cuda_stream
        if raw_stream != self._last_raw_stream:
            self._follow(stream)
        config = prepared.configs.get(raw_stream)
        if config is None:
            config = function.config(prepared.shape, raw_stream, overlaps=self._overlaps)
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
        """What a call needs. Compiles and loads its kernels the first time; local.

        Raises:
            ArgumentError: the message is larger than the workspace was made for, or kernels would have to
                be compiled while a graph is captured.
        """
        plan, packets = algorithm.plan, algorithm.packets
        args = kernel.args_type_of(plan)()
        parity_bytes = self._region_bytes[packets]
        if layout.inbox_bytes(plan, packets, num_bytes) > parity_bytes:
            raise ArgumentError(
                f"{num_bytes} bytes by '{plan}' in {packets.name} packets need more than the "
                f"{parity_bytes} bytes that the workspace was made for; raise max_bytes"
            )
        region = 0 if packets is LL else 2 * self._region_bytes[LL]
        args.budget_ticks = self._budget_ticks
        args.inbox = self._piece.address + region
        args.outbox = self._outbox
        args.parity_bytes = parity_bytes
        args.control = self._control.data_ptr()
        args.failure = self._failure_memory.data_ptr()
        args.digit[:] = plan.digits(self._position)
        members = [p for i in range(len(plan.levels)) for p in plan.members(self._position, i)]
        pes = [self._pes[self._topology.rank_at(p)] for p in members]
        args.pe[:] = pes
        addresses = [self._heap.address_at(self._piece, pe) for pe in pes]
        args.peer[:] = [address + region if address else 0 for address in addresses]
        kernel.fill_call(args, plan, packets, dtype, op, 0, 0, num_bytes)
        text = f"all_reduce of {num_bytes // dtype.itemsize} x {dtype} ({op}) by '{plan}'"
        self._calls[args.signature] = (text, plan)
        whole, ragged = (self._function(plan, packets, dtype, op, w) for w in (True, False))
        threads = layout.most_threads(plan)
        resident = min(whole.resident_blocks(threads), ragged.resident_blocks(threads))
        shape = layout.launch_shape(plan, packets, num_bytes, self._num_processors * resident)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        return Prepared(args, pointers, whole, ragged, shape, packets.align_bytes)

    def _function(
        self, plan: Plan, packets: Format, dtype: torch.dtype, op: str, whole: bool
    ) -> kernel.Function:
        spec = jit.KernelSpec(
            plan,
            packets,
            dtype,
            op,
            self._arch,
            put=self._puts(plan),
            whole=whole,
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
                heap.initialise_library(int(library.handle))
            self._libraries.append(library)
            self._functions[spec] = kernel.Function(int(library.get_kernel(jit.ENTRY).handle))
        return self._functions[spec]

    def _puts(self, plan: Plan) -> tuple[bool, ...]:
        """By level, whether any member is out of reach of plain stores."""
        if self._transport == "put":
            return (True,) * len(plan.levels)
        return tuple(
            not all(
                self._mapped[self._topology.rank_at(p)] for p in plan.members(self._position, i)
            )
            for i in range(len(plan.levels))
        )

    def call_of(self, signature: int) -> tuple[str, Plan]:
        """The call that a kernel reported by its signature, in words, and its plan."""
        return self._calls[signature]

    def close(self) -> None:
        """Local. The workspace is given back unless a call went wrong: then packets may still come in."""
        torch.cuda.synchronize(self.device)
        if self.failure.kind == 0:
            self._heap.release(self._piece)


def _transport_option() -> str:
    chosen = os.environ.get("NVRAR_TRANSPORT") or "auto"
    if chosen not in TRANSPORTS:
        raise ArgumentError(f"NVRAR_TRANSPORT is {chosen!r}; it must be {', '.join(TRANSPORTS)}")
    return chosen


def _links_keep_lines(pes: list[int]) -> bool:
    """Whether the GPUs of this process are joined by NVLink rather than PCIe, as far as CUDA says."""
    if len(pes) == 1:
        return True
    here = torch.cuda.current_device()
    others = [d for d in range(torch.cuda.device_count()) if d != here]
    if not others:  # one visible GPU a process: the peers may be behind PCIe, which tears lines
        return False
    from cuda.bindings import runtime

    attribute = runtime.cudaDeviceP2PAttr.cudaDevP2PAttrNativeAtomicSupported
    answers = [runtime.cudaDeviceGetP2PAttribute(attribute, here, d) for d in others]
    return all(int(status) == 0 and supported for status, supported in answers)


def _largest(algorithms: dict[Algorithm, int], packets: Format) -> int:
    """Bytes of one parity's inbox that covers every algorithm of a format."""
    needs = [
        layout.inbox_bytes(a.plan, packets, num_bytes)
        for a, num_bytes in algorithms.items()
        if a.packets is packets
    ]
    return -(-max(needs, default=0) // heap.GRANULE) * heap.GRANULE
