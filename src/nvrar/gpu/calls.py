"""The GPU executor as a communicator uses it: a size and a type in, one launch out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from nvrar.gpu.algorithms import Algorithm, Algorithms
from nvrar.gpu.executor import GpuExecutor, Prepared
from nvrar.gpu.jit import OPS, TYPES
from nvrar.plan import Plan
from nvrar.sideband import Report
from nvrar.topology import Topology

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

_FOREIGN = 3  # Failure.kind of a packet that belongs to another call
_MOST_PREPARED = 4096  # sizes, types and operations whose arguments are kept


class GpuCalls:
    """Collective to make; see :class:`nvrar.gpu.executor.GpuExecutor` for what it raises.

    ``choose`` and ``max_bytes`` are of messages as they are sent.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        topology: Topology,
        choose: Callable[[int], Plan],
        max_bytes: int,
        timeout_s: float,
        budget_s: float,
    ) -> None:
        self._topology = topology
        self._position = topology.position_of(group.rank())

        def algorithms(lines_travel_whole: bool) -> dict[Algorithm, int]:
            self._algorithms = Algorithms(choose, max_bytes, lines_travel_whole)
            return self._algorithms.largest()

        self._executor = GpuExecutor(group, topology, algorithms, timeout_s, budget_s)
        self._prepared: dict[tuple[int, torch.dtype, str], Prepared] = {}
        self.device = self._executor.device

    def lack(self, dtype: torch.dtype, op: str) -> str:
        """Why there is no kernel for it; empty if there is. Equal on all ranks that make the same call."""
        if dtype not in TYPES:
            return f"dtype {dtype} on a GPU"
        if op not in OPS:
            return f"op {op} on a GPU"
        return ""

    def all_reduce(self, x: Tensor, out: Tensor, op: str) -> None:
        """Both contiguous, on :attr:`device`, of one type that :meth:`lack` lets pass; not empty."""
        if torch.cuda.current_device() != self.device.index:  # launches go to the current device
            with torch.cuda.device(self.device):
                return self.all_reduce(x, out, op)
        key = (x.nbytes, x.dtype, op)
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._prepare(*key)
        self._executor.launch(prepared, x, out)
        return None

    def warmup(self, sizes: Iterable[int], dtype: torch.dtype, op: str = "sum") -> None:
        """Compiles and loads what messages of ``sizes`` bytes need; nothing where :meth:`lack` names a
        reason. Local."""
        if self.lack(dtype, op):
            return
        with torch.cuda.device(self.device):
            for num_bytes in sizes:
                if num_bytes:
                    self._prepare(num_bytes, dtype, op)

    def _prepare(self, num_bytes: int, dtype: torch.dtype, op: str) -> Prepared:
        if len(self._prepared) >= _MOST_PREPARED:
            self._prepared.clear()
        algorithm = self._algorithms.of(num_bytes)
        prepared = self._executor.prepare(num_bytes, dtype, op, algorithm)
        self._prepared[num_bytes, dtype, op] = prepared
        return prepared

    @property
    def has_failed(self) -> bool:
        """Whether a kernel that has run left word of a failure. Reads host memory, waits for nothing."""
        return bool(self._executor.failure.kind)

    def report(self) -> Report:
        """What went wrong on the device, for the other ranks and for the error."""
        failure = self._executor.failure
        call, plan = self._executor.call_of(failure.signature)
        peer = plan.members(self._position, failure.level)[failure.digit]
        foreign = failure.kind == _FOREIGN
        return Report(
            failure.epoch - 1,  # the first that the device counts is 2
            call,
            waits_on=self._topology.rank_at(peer),
            reason="it made another call" if foreign else "its data did not come in time",
            timed_out=not foreign,
            level=failure.level,
        )

    def close(self) -> None:
        self._executor.close()
