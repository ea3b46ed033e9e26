# SPDX-License-Identifier: Apache-2.0
"""The virtual cluster: N x G ranks side by side in one launch on one GPU, from the same device code.

Grid dimension y is the rank; the ranks' inboxes are slices of one allocation, and stores into a peer's
inbox are stores into device memory. It shows that any topology is right; it says nothing of a network's
speed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nvrar.errors import ArgumentError, PeerTimeout
from nvrar.gpu import jit, kernel, layout
from nvrar.gpu.layout import Format, LaunchShape, Room, Rows
from nvrar.plan import Plan


@dataclass(frozen=True)
class Call:
    """The arguments of all ranks, on the device, and the kernel they are for."""

    table: Tensor
    function: kernel.Function
    shape: LaunchShape
    shared_bytes: int = 0


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
        self._spec = jit.KernelSpec(
            plan,
            packets,
            dtype,
            op,
            f"sm_{properties.major}{properties.minor}",
            virtual=True,
            jitter_ns=jitter_ns,
            args_bytes=ctypes.sizeof(self._args_type),
        )
        self._is_hopper = properties.major >= 9
        self._num_processors = properties.multi_processor_count
        self._functions: dict[jit.KernelSpec, kernel.Function] = {}
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
        levels = range(len(self.plan.levels))
        args.digit[: len(levels)] = self.plan.digits(position)
        peers = [p for i in levels for p in self.plan.members(position, i)]
        args.peer[: len(peers)] = [self._inbox_of(p) for p in peers]
        return args

    def _function(self, *, whole: bool = True, rows: bool = False) -> kernel.Function:
        spec = replace(self._spec, whole=whole, rows=rows)
        if spec not in self._functions:
            handle = int(jit.load(spec).get_kernel(jit.ENTRY).handle)
            self._functions[spec] = kernel.Function(handle, self._inbox.device.index)
        return self._functions[spec]

    def _room(self, function: kernel.Function, shared_bytes: int = 0) -> Room:
        # All blocks of all ranks must be on the device at once: they wait for each other.
        def resident(threads: int) -> int:
            blocks = function.resident_blocks(threads, shared_bytes) * self._num_processors
            if blocks < self.num_ranks:
                raise ArgumentError(
                    f"{self.num_ranks} virtual ranks need a block of {threads} threads each, and this GPU "
                    f"holds {blocks} at once; take fewer ranks or a smaller message"
                )
            return blocks // self.num_ranks

        return Room(resident)

    def prepare(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Call:
        """One all-reduce of these tensors, ready to launch as often as wanted."""
        self._check_room(layout.inbox_bytes(self.plan, self.packets, inputs[0].nbytes))
        whole = kernel.fill_sums(
            self._table, inputs, outputs, self.plan, self.packets, self.dtype, self.op
        )
        function = self._function(whole=whole)
        room = self._room(function)
        shape = layout.launch_shape(self.plan, self.packets, inputs[0].nbytes, room)
        return Call(self._packed_table(), function, shape)

    def prepare_rows(
        self,
        inputs: Sequence[Tensor],
        residuals: Sequence[Tensor],
        weight: Tensor,
        eps: float,
        outputs: Sequence[Tensor],
        residuals_out: Sequence[Tensor],
    ) -> Call:
        """The same with residual and RMSNorm (csrc/rows.cuh), of tensors ``[..., hidden]``."""
        hidden = weight.numel()
        rows = Rows(inputs[0].numel() // hidden, hidden * weight.element_size())
        self._check_room(rows.inbox_bytes(self.plan, self.packets))
        tensors = zip(inputs, residuals, outputs, residuals_out, strict=True)
        for args, (x, residual, out, residual_out) in zip(self._table, tensors, strict=True):
            args.in_, args.out = x.data_ptr(), out.data_ptr()
            args.norm.residual = residual.data_ptr()
            args.norm.residual_out = residual_out.data_ptr()
            args.norm.weight = weight.data_ptr()
            kernel.fill_rows(args, self.plan, self.packets, self.dtype, rows, eps)
        function, shared = self._function(rows=True), rows.shared_bytes(self.plan, self.packets)
        room = self._room(function, shared)
        shape = rows.launch_shape(self.plan, self.packets, room, self._is_hopper)
        return Call(self._packed_table(), function, shape, shared)

    def _check_room(self, inbox_bytes: int) -> None:
        if inbox_bytes > self._parity_bytes:
            raise ArgumentError(
                f"the message needs an inbox of {inbox_bytes} bytes, and the virtual cluster was made for "
                f"{self._parity_bytes}; give it a larger max_bytes"
            )

    def _packed_table(self) -> Tensor:
        packed = b"".join(bytes(args) for args in self._table)
        return torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(self._inbox.device)

    def launch(self, call: Call, shape: LaunchShape | None = None) -> None:
        """One call of all ranks on the current stream; capturable."""
        table = ctypes.c_uint64(call.table.data_ptr())
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(table))
        stream = torch.cuda.current_stream().cuda_stream
        config = call.function.config(
            shape or call.shape, stream, self.num_ranks, shared_bytes=call.shared_bytes
        )
        call.function.launch(config, ctypes.addressof(pointers))

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
            if kind != kernel.NO_FAILURE:
                peer = self.plan.members(position, level)[digit]
                why = (
                    "it made another call" if kind == kernel.OTHER_CALL else "no data came in time"
                )
                raise PeerTimeout(
                    f"virtual rank {position} gave up on {peer} at level {level} of call {epoch}: {why}",
                    rank=position, peers=(peer,), epoch=epoch, level=level,
                )  # fmt: skip
