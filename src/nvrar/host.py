# SPDX-License-Identifier: Apache-2.0
"""Executor 1: a plan carried out by point-to-point messages of a torch process group.

Any backend that has isend and irecv, any device. It is the readable specification of what the GPU
executor computes, bit for bit: at each level the contributions are added in digit order, 16-bit types
in fp32, and rounded once.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from nvrar.plan import Plan, Step
from nvrar.topology import Topology

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = frozenset(
    {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64}
)
OPS = ("sum", "avg", "max", "min")
WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}

_schedule = lru_cache(maxsize=256)(Plan.schedule)


class PeerLost(Exception):
    """A wait ended without its data. Private: the communicator finds out whose fault it was."""

    def __init__(self, position: int | None, level: int, reason: str, timed_out: bool) -> None:
        super().__init__(reason)
        self.position, self.level, self.reason, self.timed_out = position, level, reason, timed_out


def type_name(dtype: torch.dtype) -> str:
    """Such as ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def backends_of(group: dist.ProcessGroup) -> dict[str, str]:
    """What of ``group`` carries the tensors of each type of device: ``cpu:gloo,cuda:nccl`` by device."""
    config = str(dist.get_backend_config(group))
    return dict(entry.split(":") for entry in config.split(","))


def backend_of(group: dist.ProcessGroup, device: str) -> str:
    """What of ``group`` carries tensors of ``device``; all that it has, where nothing does."""
    backends = backends_of(group)
    return backends.get(device) or ",".join(map(":".join, backends.items()))


def is_plain(tensor: Tensor) -> bool:
    """Whether its memory holds its elements one after the other and as they are: neither strided, nor
    conjugated or negated only by its look at memory, as ``z.conj().imag`` is. c10d ignores that look."""
    return tensor.is_contiguous() and not (tensor.is_neg() or tensor.is_conj())


def wire_type(dtype: torch.dtype, wire_dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor of ``dtype`` is sent as: ``wire_dtype`` widens the 16-bit types and no other."""
    return wire_dtype if wire_dtype is not None and dtype in WIDE else dtype


def reduce_in_order(contributions: list[Tensor], op: str, divisor: int = 1) -> Tensor:
    """The contributions (equal shapes and dtypes) combined first to last; a new tensor of their dtype.

    Sums of 16-bit types accumulate in fp32 and are rounded once, at the end; ``divisor`` divides before
    that, and nan is the one nan of the type. ``max`` and ``min`` keep the first of equals (so of -0.0 and
    0.0) and the first nan.
    """
    first, *rest = contributions
    if op in ("max", "min"):
        # Not torch.maximum: of -0.0 and 0.0 it takes one or the other, depending on the position.
        best = first.clone()
        for other in rest:
            better = other > best if op == "max" else other < best
            best = torch.where((better | other.isnan()) & ~best.isnan(), other, best)
        return best
    total = first.to(WIDE.get(first.dtype, first.dtype), copy=True)
    for other in rest:
        total += other
    if divisor > 1:
        total /= divisor
    total = total.to(first.dtype)
    if total.is_floating_point():  # vector loops and their tails round one nan to different ones
        total.masked_fill_(total.isnan(), math.nan)
    return total


class HostExecutor:
    """Runs plans for one rank of ``group``. Not thread-safe: one call at a time."""

    def __init__(self, group: dist.ProcessGroup, topology: Topology, name: str) -> None:
        self._group = group
        self._topology = topology
        self._position = topology.position_of(group.rank())
        self._name = name

    def all_reduce(
        self, x: Tensor, out: Tensor, plan: Plan, op: str, epoch: int, call: str, budget_s: float
    ) -> None:
        """Writes the reduction of all ranks' ``x`` into ``out`` (both 1-D, :func:`is_plain`, same dtype and
        length; may be the same tensor). Collective.

        ``call`` describes the call; ranks that made another one never exchange data with this one.

        Raises:
            PeerLost: a peer's data did not come within ``budget_s``.
        """
        deadline = time.monotonic() + budget_s
        source = x  # until the first sum is written, a rank's block is its input
        for index, step in enumerate(_schedule(plan, self._position, x.numel())):
            tag = self._tag(epoch, call, index)
            if step.phase == "gather":
                into = {d: out[slice(*step.receives[d])] for d, _ in step.peers()}
                self._exchange(step, out, into, tag, deadline)
                continue
            length = step.span[1] - step.span[0]
            into = {d: x.new_empty(length) for d, _ in step.peers()}
            own = source[slice(*step.span)]
            self._exchange(step, source, into, tag, deadline)
            last = op == "avg" and step.level == len(plan.levels) - 1
            contributions = [into.get(d, own) for d in range(len(step.members))]
            total = reduce_in_order(contributions, op, plan.world_size if last else 1)
            out[slice(*step.span)] = total
            source = out
        if source is x and out is not x:  # no levels: one rank
            out.copy_(x)

    def _exchange(
        self, step: Step, source: Tensor, into: dict[int, Tensor], tag: int, deadline: float
    ) -> None:
        """All messages of one step; returns when all have arrived and all buffers may be reused."""
        operations: list[dist.P2POp] = []
        peers: list[tuple[int, str]] = []

        def add(action: Callable[..., object], data: Tensor, position: int, what: str) -> None:
            if data.numel():  # both sides know the lengths, so neither sends an empty message
                rank = self._topology.rank_at(position)
                operations.append(
                    dist.P2POp(action, data, group=self._group, tag=tag, group_peer=rank)
                )
                peers.append((position, what))

        for digit, position in step.peers():
            add(dist.irecv, into[digit], position, "its data did not come")
        for digit, position in step.peers():
            add(dist.isend, source[slice(*step.sends[digit])], position, "it took no data")
        if source.device.type == "cpu":  # one by one, to know whose connection was found broken
            batches = [[operation] for operation in operations]
        else:  # NCCL needs the messages of a step in one batch
            batches = [operations] if operations else []
        works: list[dist.Work] = []
        for batch in batches:
            try:
                works += dist.batch_isend_irecv(batch)
            except RuntimeError as error:
                broken = peers[len(works)][0] if len(batch) == 1 else None
                raise PeerLost(broken, step.level, _reason(error, "broken"), False) from error
        # NCCL hands back one work for the batch, gloo one for each message.
        for work, (position, what) in zip(works, peers, strict=False):
            left = max(deadline - time.monotonic(), 0.001)
            try:
                work.wait(timedelta(seconds=left))
            except RuntimeError as error:
                timed_out = time.monotonic() >= deadline - 0.01  # waits are rounded to milliseconds
                raise PeerLost(position, step.level, _reason(error, what), timed_out) from error

    def _tag(self, epoch: int, call: str, index: int) -> int:
        # Two ranks whose calls differ must never match: gloo ends the process of a receiver whose
        # buffer is too small, and equal sizes would be summed wrongly. So the tag says it all.
        return zlib.crc32(f"{self._name}/{epoch}/{call}/{index}".encode()) & 0x7FFFFFFF


def _reason(error: RuntimeError, what: str) -> str:
    text = str(error)
    if "closed by peer" in text or "Connection reset" in text or "Broken pipe" in text:
        return "it closed its connection (it exited, was killed, or gave up itself)"
    if "pair closure" in text:  # gloo's words, in every call after the one whose time ran out
        return "an earlier call waited in vain, and gloo closed the connection; make a new process group"
    if "Timed out" in text or "timeout" in text.lower():
        return f"{what} in time"
    return text.splitlines()[0][:200]
