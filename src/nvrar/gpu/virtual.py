"""The virtual cluster: N x G ranks side by side in one launch on one GPU, from the same device code.

Grid dimension y is the rank; the ranks' inboxes are slices of one allocation, and stores into a peer's
inbox are stores into device memory. It shows that any topology is right; it says nothing of a network's
speed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nvrar.errors import PeerTimeout
from nvrar.gpu import jit, kernel, layout
from nvrar.gpu.layout import Format, LaunchShape
from nvrar.plan import Plan


@dataclass(frozen=True)
class Call:
    """The arguments of all ranks, on the device; ``whole`` tells which kernel they are for."""

    table: Tensor
    num_bytes: int
    whole: bool


class VirtualCluster:
    """All ranks of ``plan`` on the current CUDA device.

    Args:
        max_bytes: the largest message of a rank.
        first_epoch: where the ranks' counters start; near 2**32 to see them wrap around.
        jitter_ns: random delays of up to this before sends.
        budget_s: how long a wait may last.
    """

    def __init__(
        self,
        plan: Plan,
        packets: Format,
        dtype: torch.dtype,
        op: str = "sum",
        *,
        max_bytes: int,
        first_epoch: int = 2,
        jitter_ns: int = 0,
        budget_s: float = 5.0,
    ) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(device)
        self.plan, self.packets, self.dtype, self.op = plan, packets, dtype, op
        self.num_ranks = plan.world_size
        self._args_type = kernel.args_type_of(plan)
        self._parity_bytes = layout.inbox_bytes(plan, packets, max_bytes)
        self._inbox = torch.zeros(
            self.num_ranks * 2 * self._parity_bytes + 1024, dtype=torch.uint8, device=device
        )
        self._control = torch.zeros(self.num_ranks, 4, dtype=torch.int32, device=device)
        self._control[:, 0] = first_epoch if first_epoch < 1 << 31 else first_epoch - (1 << 32)
        self._failure = torch.zeros(self.num_ranks, 5, dtype=torch.int32).pin_memory()
        specs = [
            jit.KernelSpec(
                plan,
                packets,
                dtype,
                op,
                f"sm_{properties.major}{properties.minor}",
                virtual=True,
                jitter_ns=jitter_ns,
                whole=whole,
                args_bytes=ctypes.sizeof(self._args_type),
            )
            for whole in (False, True)
        ]
        self._libraries = [jit.load(spec) for spec in specs]
        self._functions = [
            kernel.Function(int(library.get_kernel(jit.ENTRY).handle))
            for library in self._libraries
        ]
        # All blocks of all ranks must be on the device at once: they wait for each other.
        threads = layout.most_threads(plan)
        resident = min(f.resident_blocks(threads) for f in self._functions)
        resident *= properties.multi_processor_count
        self.most_blocks = max(1, resident // self.num_ranks)
        self._table = [self._rank_args(r, budget_s) for r in range(self.num_ranks)]

    def _inbox_of(self, position: int) -> int:
        start = -(-self._inbox.data_ptr() // 1024) * 1024
        return start + position * 2 * self._parity_bytes

    def _rank_args(self, position: int, budget_s: float) -> ctypes.Structure:
        args = self._args_type()
        args.budget_ticks = kernel.budget_ticks(budget_s)
        args.inbox = self._inbox_of(position)
        args.parity_bytes = self._parity_bytes
        args.control = self._control[position].data_ptr()
        args.failure = self._failure[position].data_ptr()
        args.digit[:] = self.plan.digits(position)
        levels = range(len(self.plan.levels))
        peers = [p for i in levels for p in self.plan.members(position, i)]
        args.peer[:] = [self._inbox_of(p) for p in peers]
        return args

    def prepare(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Call:
        """One call on these tensors, ready to launch as often as wanted."""
        whole = True
        for args, x, out in zip(self._table, inputs, outputs, strict=True):
            kernel.fill_call(
                args, self.plan, self.packets, self.dtype, self.op,
                x.data_ptr(), out.data_ptr(), x.nbytes,
            )  # fmt: skip
            whole &= (args.in_ | args.out | args.num_bytes) % self.packets.align_bytes == 0
        packed = b"".join(bytes(args) for args in self._table)
        table = torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(self._inbox.device)
        return Call(table, inputs[0].nbytes, whole)

    def launch(self, call: Call, shape: LaunchShape | None = None) -> None:
        """One all-reduce of all ranks on the current stream; capturable."""
        if shape is None:
            shape = layout.launch_shape(self.plan, self.packets, call.num_bytes, self.most_blocks)
        function = self._functions[call.whole]
        table = ctypes.c_uint64(call.table.data_ptr())
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(table))
        stream = torch.cuda.current_stream().cuda_stream
        function.launch(function.config(shape, stream, self.num_ranks), ctypes.addressof(pointers))

    def all_reduce(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """``inputs[r]`` and ``outputs[r]`` are rank r's tensors: contiguous, on the device, equal lengths.

        Raises:
            PeerTimeout: a wait ran out of its budget.
        """
        results = [torch.empty_like(x) for x in inputs] if outputs is None else list(outputs)
        self.launch(self.prepare(inputs, results))
        self.check()
        return results

    def check(self) -> None:
        """Waits for the device and raises what went wrong on it."""
        torch.cuda.synchronize()
        for position, failure in enumerate(self._failure.tolist()):
            kind, level, digit, epoch, _ = failure
            if kind:
                peer = self.plan.members(position, level)[digit]
                raise PeerTimeout(
                    f"virtual rank {position} gave up on {peer} at level {level} of call {epoch} "
                    f"(kind {kind})",
                    rank=position, peers=(peer,), epoch=epoch, level=level,
                )  # fmt: skip
