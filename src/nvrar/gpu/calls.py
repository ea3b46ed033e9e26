# SPDX-License-Identifier: Apache-2.0
"""The GPU executor as a communicator uses it: any tensor in, one launch out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch

from nvrar.blame import Report
from nvrar.gpu.algorithms import Algorithm, Algorithms
from nvrar.gpu.executor import GpuExecutor, Prepared
from nvrar.gpu.jit import OPS, TYPES
from nvrar.gpu.kernel import NO_FAILURE, OTHER_CALL
from nvrar.gpu.layout import LL128, MOST_ROW_BYTES, Rows
from nvrar.host import is_plain, type_name, wire_type
from nvrar.meeting import Meeting
from nvrar.plan import Plan
from nvrar.rms_norm import DTYPES
from nvrar.topology import Topology
from nvrar.tune import Choice

if TYPE_CHECKING:
    from torch import Tensor

_MOST_PREPARED = 4096  # sizes, types and operations whose arguments are kept
_ROW_ALIGN = 16  # bytes at which rows and tensors of rows start
_DENSE = torch.contiguous_format
_NO_SUM = Algorithm(Plan(()), LL128)


class GpuCalls:
    """Collective to make; see :class:`nvrar.gpu.executor.GpuExecutor` for what it raises.

    ``choose`` (see :meth:`nvrar.tune.Chooser.choose`) is of messages as they are sent, which ``wire_dtype``
    may widen; ``max_bytes`` is of tensors. ``link`` says how the peers are reached, in the words of
    :class:`nvrar.table.Key`.
    """

    def __init__(
        self,
        meeting: Meeting,
        topology: Topology,
        choose: Callable[..., Choice],
        max_bytes: int,
        wire_dtype: torch.dtype | None,
        budget_s: float,
    ) -> None:
        self._max_bytes, self._wire_dtype = max_bytes, wire_dtype
        self._topology = topology
        self._position = topology.position_of(meeting.group.rank())

        # Whatever the type, since a narrow one may be sent as a wide one.
        most_sent = max_bytes * (1 if wire_dtype is None else 2)

        def algorithms(link: str) -> dict[Algorithm, int]:
            self.link = link
            for dtype in TYPES:
                of_type = partial(choose, dtype=type_name(dtype), link=link)
                self._algorithms[dtype] = Algorithms(of_type, most_sent, link)
            return _largest(self._algorithms.values())

        self._algorithms: dict[torch.dtype, Algorithms] = {}
        self._executor = GpuExecutor(meeting, topology, algorithms, budget_s)
        self._prepared: dict[object, Prepared] = {}
        self.device = self._executor.device

    def why_unsupported(self, dtype: torch.dtype, op: str) -> str:
        """Why there is no kernel for it; empty if there is. Equal on all ranks that make the same call."""
        if dtype not in TYPES:
            return f"dtype {dtype} on a GPU"
        if op not in OPS:
            return f"op {op} on a GPU"
        return ""

    def all_reduce(self, x: Tensor, out: Tensor, op: str) -> None:
        """Of any layout, on :attr:`device`, of a type that :meth:`why_unsupported` lets pass; not empty."""
        if torch.cuda.current_device() != self.device.index:  # launches go to the current device
            with torch.cuda.device(self.device):
                return self.all_reduce(x, out, op)
        wire = x.dtype if self._wire_dtype is None else wire_type(x.dtype, self._wire_dtype)
        if not (wire is x.dtype and is_plain(x) and is_plain(out)):
            with torch.no_grad():
                packed = x.to(wire, memory_format=_DENSE, copy=True)
                self._launch(packed, packed, op)
                out.copy_(packed)
                return None
        self._launch(x, out, op)
        return None

    def _launch(self, x: Tensor, out: Tensor, op: str) -> None:
        key = (x.nbytes, x.dtype, op)
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._prepare(*key)
        self._executor.launch(prepared, x, out)

    def takes_rows(self, x: Tensor) -> bool:
        """Whether :meth:`add_rms_norm` has a kernel for the rows of ``x``. By shape and type alone."""
        row_bytes = x.shape[-1] * x.element_size()
        return row_bytes % _ROW_ALIGN == 0 and row_bytes <= MOST_ROW_BYTES

    def sums_rows(self, x: Tensor) -> bool:
        """Whether it may also sum over the ranks in the same launch. Equal on all of them."""
        if wire_type(x.dtype, self._wire_dtype) != x.dtype:
            return False
        rows = Rows(x.numel() // x.shape[-1], x.shape[-1] * x.element_size())
        room = self._executor.has_room_for
        return self.takes_rows(x) and room(rows, self._algorithms[x.dtype].of_rows(x.nbytes))

    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        out: Tensor,
        residual_out: Tensor,
        sums: bool,
    ) -> None:
        """csrc/rows.cuh in one launch. With ``sums``, of the sum of all ranks' ``x``, and then collective.

        Any layout: what is not contiguous and aligned is copied, for a peer cannot know of it.
        """
        if torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self.add_rms_norm(x, residual, weight, eps, out, residual_out, sums)
        hidden = x.shape[-1]
        key = (x.nbytes, x.dtype, hidden, eps, sums)
        prepared = self._prepared.get(key)
        if prepared is None:
            algorithm = self._algorithms[x.dtype].of_rows(x.nbytes) if sums else _NO_SUM
            rows = Rows(x.numel() // hidden, hidden * x.element_size())
            prepared = self._keep(key, self._executor.prepare_rows(rows, x.dtype, eps, algorithm))
        inputs = [t if _is_tidy(t) else _tidied(t) for t in (x, residual, weight)]
        results = [
            t if _is_tidy(t) else torch.empty_like(t, memory_format=_DENSE)
            for t in (out, residual_out)
        ]
        self._executor.launch_rows(prepared, *inputs, *results)
        for wanted, result in zip((out, residual_out), results, strict=True):
            if result is not wanted:
                wanted.copy_(result)
        return None

    def warmup(self, sizes: Iterable[int], dtype: torch.dtype, op: str = "sum") -> None:
        """Compiles and loads what tensors of ``sizes`` bytes need, up to ``max_bytes``; nothing where
        :meth:`why_unsupported` names a reason. Local."""
        if self.why_unsupported(dtype, op):
            return
        wire = wire_type(dtype, self._wire_dtype)
        wider = wire.itemsize // dtype.itemsize
        with torch.cuda.device(self.device):
            for num_bytes in self._sent(sizes):
                self._prepare(num_bytes * wider, wire, op)

    def warmup_norm(self, sizes: Iterable[int], dtype: torch.dtype) -> None:
        """The same of :meth:`add_rms_norm`, with sums of ``sizes`` bytes and without. Local."""
        if dtype not in DTYPES:
            return
        # Of what is sent wider, the sum has a launch of its own.
        summed = self._sent(sizes) if wire_type(dtype, self._wire_dtype) == dtype else []
        algorithms = [_NO_SUM, *(self._algorithms[dtype].of_rows(n) for n in summed)]
        with torch.cuda.device(self.device):
            for algorithm in dict.fromkeys(algorithms):
                self._executor.load_rows(dtype, algorithm)

    def _sent(self, sizes: Iterable[int]) -> list[int]:
        return [n for n in sizes if 0 < n <= self._max_bytes]

    def _prepare(self, num_bytes: int, dtype: torch.dtype, op: str) -> Prepared:
        algorithm = self._algorithms[dtype].of(num_bytes)
        prepared = self._executor.prepare(num_bytes, dtype, op, algorithm)
        return self._keep((num_bytes, dtype, op), prepared)

    def _keep(self, key: object, prepared: Prepared) -> Prepared:
        if len(self._prepared) >= _MOST_PREPARED:
            self._prepared.clear()
        self._prepared[key] = prepared
        return prepared

    def next_call(self) -> int:
        """The number of the next call, as :meth:`report` counts. Waits for the GPU."""
        return self._executor.epoch() - 1

    @property
    def has_failed(self) -> bool:
        """Whether a kernel that has run left word of a failure. Reads host memory, waits for nothing."""
        return bool(self._executor.failure.kind != NO_FAILURE)

    def report(self) -> Report:
        """What went wrong on the device, for the other ranks and for the error."""
        failure = self._executor.failure
        call, plan = self._executor.failed_call()
        peer = plan.members(self._position, failure.level)[failure.digit]
        other_call = failure.kind == OTHER_CALL
        return Report(
            failure.epoch - 1,  # the first that the device counts is 2
            call,
            waits_on=self._topology.rank_at(peer),
            reason="it made another call" if other_call else "its data did not come in time",
            timed_out=not other_call,
            level=failure.level,
        )

    def close(self) -> None:
        self._executor.close()


def _largest(every: Iterable[Algorithms]) -> dict[Algorithm, int]:
    largest: dict[Algorithm, int] = {}
    for algorithms in every:
        for algorithm, num_bytes in algorithms.largest().items():
            largest[algorithm] = max(num_bytes, largest.get(algorithm, 0))
    return largest


def _is_tidy(tensor: Tensor) -> bool:
    return is_plain(tensor) and tensor.data_ptr() % _ROW_ALIGN == 0


def _tidied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=_DENSE)
