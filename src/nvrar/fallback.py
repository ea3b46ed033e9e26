# SPDX-License-Identifier: Apache-2.0
"""Where no executor can: torch's own all-reduce, with what goes wrong in it told apart."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from nvrar.errors import ArgumentError
from nvrar.host import is_plain
from nvrar.meeting import is_destroyed

_TORCH_OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,  # not every backend has AVG: divided afterwards
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}
# How a backend says that it lacks a type or an operation, the same on every rank.
_UNSUPPORTED = ("invalid scalar type", "not support", "unsupported", "not implemented")


class CollectiveLost(Exception):
    """torch's collective ended without a result. Private: the communicator finds out whose fault it was."""

    def __init__(self, reason: str, timed_out: bool) -> None:
        super().__init__(reason)
        self.reason, self.timed_out = reason, timed_out


def all_reduce_by_torch(
    x: Tensor, out: Tensor, op: str, group: dist.ProcessGroup, wait_until: float
) -> None:
    """``torch.distributed.all_reduce`` of any layout of ``x`` into ``out``. Collective.

    ``wait_until`` is a time of ``time.monotonic``, for tensors on the CPU. Work on a GPU is only queued, and
    has the time limit of the process group; it can be captured in a graph, whose replays have none.

    Raises:
        ArgumentError: the backend lacks the type or the operation; the same on every rank.
        CollectiveLost: a rank died or did not come by ``wait_until``, or the group was destroyed.
    """
    dense = torch.contiguous_format
    total = out if is_plain(out) else torch.empty_like(x, memory_format=dense)
    if total is not x:
        total.copy_(x)
    on_cpu = total.device.type == "cpu"
    try:
        work = dist.all_reduce(total, _TORCH_OPS[op], group=group, async_op=on_cpu)
        if on_cpu:  # on a GPU a wait with a time limit would keep the host until the work is done
            work.wait(timedelta(seconds=max(wait_until - time.monotonic(), 0.001)))
    except (RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0][:200]
        lacks = isinstance(error, ValueError) or any(w in text.lower() for w in _UNSUPPORTED)
        if lacks and not is_destroyed(group):
            raise ArgumentError(
                f"torch.distributed.all_reduce does not take {x.dtype} ({op}) on this process "
                f"group, and no executor of nvrar does: {text}; convert it to another type first"
            ) from error
        raise CollectiveLost(text, time.monotonic() >= wait_until - 0.01) from error
    if op == "avg":
        total /= group.size()
    if total is not out:
        out.copy_(total)
