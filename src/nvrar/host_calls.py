# SPDX-License-Identifier: Apache-2.0
"""The host executor as a communicator uses it, for any tensor; where no executor can, torch's all-reduce."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from nvrar.blame import Report
from nvrar.fallback import CollectiveLost, all_reduce_by_torch
from nvrar.host import HostExecutor, PeerLost, is_plain, wire_type
from nvrar.meeting import is_destroyed
from nvrar.plan import Plan
from nvrar.topology import Topology

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor


class CallLost(Exception):
    """A call ended without its data. Private: the communicator finds out whose fault it was."""

    def __init__(self, report: Report) -> None:
        super().__init__(report.reason)
        self.report = report


class HostCalls:
    """``wait_until`` is a time of ``time.monotonic``, ``epoch`` the number of the call.

    Calls are collective, and raise CallLost where a rank died or did not come in time.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        topology: Topology,
        name: str,
        wire_dtype: torch.dtype | None,
    ) -> None:
        self._group, self._topology, self._wire_dtype = group, topology, wire_dtype
        self._executor = HostExecutor(group, topology, name)

    def all_reduce(
        self, x: Tensor, out: Tensor, op: str, plan: Plan, epoch: int, wait_until: float
    ) -> None:
        """Of any layout, of a type of :data:`nvrar.host.DTYPES`."""
        wire = wire_type(x.dtype, self._wire_dtype)
        flat = x.resolve_neg().contiguous().view(-1).to(wire)
        # The result is built in `out` itself where its memory allows, else beside it.
        direct = is_plain(out) and wire == x.dtype
        result = out.view(-1) if direct else torch.empty_like(flat)
        call = f"all_reduce of {x.numel()} x {x.dtype} ({op}) by '{plan}'"
        self._run(flat, result, plan, op, epoch, call, wait_until)
        if not direct:
            out.copy_(result.view(out.shape))

    def all_reduce_by_torch(
        self, x: Tensor, out: Tensor, op: str, epoch: int, wait_until: float
    ) -> None:
        """See :func:`nvrar.fallback.all_reduce_by_torch`."""
        call = f"all_reduce of {x.numel()} x {x.dtype} ({op}) by torch.distributed"
        if x.device.type == "cpu":
            # gloo ends the process of a rank that is sent more than it expects. So ranks whose calls
            # differ must not get there: the executor's messages match only between equal calls.
            token = torch.zeros(1)
            plan = Plan.named("nvrar", self._topology)
            self._run(token, token, plan, "sum", epoch, call, wait_until)
        try:
            all_reduce_by_torch(x, out, op, self._group, wait_until)
        except CollectiveLost as lost:
            report = Report(epoch, call, reason=lost.reason, timed_out=lost.timed_out)
            raise CallLost(report) from lost

    def _run(
        self,
        flat: Tensor,
        result: Tensor,
        plan: Plan,
        op: str,
        epoch: int,
        call: str,
        wait_until: float,
    ) -> None:
        budget_s = wait_until - time.monotonic()
        try:
            self._executor.all_reduce(flat, result, plan, op, epoch, call, budget_s)
        except PeerLost as lost:
            peer = None if lost.position is None else self._topology.rank_at(lost.position)
            report = Report(epoch, call, peer, lost.reason, lost.timed_out, lost.level)
            raise CallLost(report) from lost
        except ValueError as error:  # what torch says of a group that it no longer knows
            if not is_destroyed(self._group):
                raise
            raise CallLost(Report(epoch, call)) from error
