"""What the user holds: an all-reduce over the ranks of a process group.

tensor -> checks -> plan for its size -> executor -> tensor; or, where no executor can,
``torch.distributed.all_reduce`` on the same group, logged once and counted.
"""

from __future__ import annotations

import logging
import math
import os
import time
import uuid
import weakref
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

from nvrar import host, tune
from nvrar._version import __version__
from nvrar.cost import Machine, machine_named
from nvrar.errors import ArgumentError, ClosedError, DisagreementError, NvrarError, TopologyError
from nvrar.plan import Plan
from nvrar.sideband import Report, Sideband, exchange_values, is_destroyed, resolve_group
from nvrar.topology import Topology, from_sightings, sighting

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("nvrar")

# torch.compile calls operators with strings; this finds the communicator again. It keeps none alive.
by_name: weakref.WeakValueDictionary[str, Communicator] = weakref.WeakValueDictionary()

_DENSE = torch.contiguous_format
_TORCH_OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,  # not every backend has AVG: divided afterwards
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}
# How a backend says that it lacks a type or an operation, the same on every rank.
_UNSUPPORTED = ("invalid scalar type", "not support", "unsupported", "not implemented")


@dataclass
class Stats:
    """What a communicator has done so far, on this rank."""

    calls: int = 0
    bytes: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)  # calls left to torch, by reason


class Communicator:
    """An all-reduce over ``group``. Creation is collective over the group, and so is every call.

    Several may live in one process, on the same, different or overlapping groups. One communicator is
    not thread-safe: its calls are made one after the other, in the same order on all ranks.

    Args:
        group: a torch process group that holds this rank; None is the default group.
        topology: who sits where; None detects it as :meth:`Topology.detect` does.
        plan: ``"auto"`` chooses by size; else a name (``"nvrar"``, ``"one-shot"``, ``"two-shot"``,
            ``"direct"``, ``"halving-doubling"``), a word (``"split:4 exchange:2"``) or a Plan.
        max_bytes: larger messages go to ``torch.distributed.all_reduce``.
        timeout_s: bound on every wait for a peer, creation included.
        deterministic: ``plan="auto"`` keeps one list of radices for all sizes, so that the bits of a
            result do not depend on the size of the message it was part of.
        wire_dtype: ``torch.float32`` keeps 16-bit inputs in fp32 across levels and rounds once, at the
            end, for twice the bytes; None sends the tensor's own type.
        machine: what ``plan="auto"`` optimises for: a Machine, the name of one, or None for gloo.
        executor: ``"auto"``, or ``"host"`` for point-to-point messages whatever the device.

    Raises:
        NvrarError: a value that cannot work, or not the same on all ranks; raised on every rank.
        PeerTimeout: ranks of the group did not come within ``timeout_s``; it names them.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        topology: Topology | None = None,
        plan: str | Plan = "auto",
        max_bytes: int = 8 << 20,
        timeout_s: float = 30.0,
        deterministic: bool = False,
        *,
        wire_dtype: torch.dtype | None = None,
        machine: Machine | str | None = None,
        executor: str = "auto",
    ) -> None:
        self.group = resolve_group(group)
        self.rank = self.group.rank()
        self.world_size = self.group.size()
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s
        self.deterministic = deterministic
        self.wire_dtype = wire_dtype
        self.executor = executor
        self.stats = Stats()

        refusal = self._refusal_of_options(topology, plan, machine)
        wait_s = timeout_s if refusal is None else 30.0  # the value refused may be timeout_s itself
        said = self._agree(refusal, topology, plan, machine, wait_s)
        self.topology = topology or from_sightings(
            [s["sighting"] for s in said], dist.get_process_group_ranks(self.group)
        )
        self.plan = plan if plan == "auto" else Plan.resolve(plan, self.topology)
        self.machine = machine if isinstance(machine, Machine) else machine_named(machine or "gloo")
        self.name: str = said[0]["name"]

        self._host = host.HostExecutor(self.group, self.topology, self.name)
        self._sideband = Sideband(self.group, self.name, timeout_s)
        self._epoch = 0
        self._ended: NvrarError | None = None  # why no further call can be made
        self._warned: set[str] = set()
        by_name[self.name] = self

    # -- the call ----------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, *, out: Tensor | None = None, op: str = "sum") -> Tensor:
        """The reduction of all ranks' ``x``, with the same bits on every rank. Collective.

        Args:
            x: any shape, strides and length, zero included; the same shape and dtype on all ranks.
            out: receives the result; ``out=x`` works in place; None makes a new contiguous tensor.
            op: ``"sum"``, ``"avg"`` (floating types), ``"max"`` or ``"min"``.

        Returns:
            ``out``, or the new tensor. No gradient flows through it.

        float32, float64, float16, bfloat16, int32 and int64 run the plan; other types, and more than
        ``max_bytes``, go to ``torch.distributed.all_reduce``. 16-bit types are added in fp32, in digit
        order, and rounded once a level. Works under ``torch.compile(fullgraph=True)``.

        Raises:
            ArgumentError: this rank's arguments cannot work; the others are told, see next.
            DisagreementError: ranks made different calls, or one refused its arguments; within ``timeout_s``.
            PeerTimeout: a peer died or did not come within ``timeout_s``; the communicator is broken.
            ClosedError: it was closed.
        """
        if torch.compiler.is_compiling():
            return _compiled(self.name, x, out, op)
        if self._ended is not None:
            raise self._ended.with_traceback(None)  # else it would grow with every call
        self._epoch += 1
        refusal = _refusal_of_call(x, out, op)
        if refusal:
            self._sideband.publish(Report(self._epoch, "", refused=refusal))
            raise ArgumentError(refusal)
        with torch.no_grad():
            if out is None:
                out = torch.empty_like(x, memory_format=_DENSE)
            self.stats.calls += 1
            self.stats.bytes += x.nbytes
            if x.numel():
                self._run(x, out, op)
        return out

    def plan_for(self, num_bytes: int, dtype: torch.dtype = torch.bfloat16) -> Plan:
        """The plan that a message of ``num_bytes`` would run; the same on every rank. Not collective."""
        if isinstance(self.plan, Plan):
            return self.plan
        num_bytes = num_bytes * host.wire_type(dtype, self.wire_dtype).itemsize // dtype.itemsize
        return tune.choose(self.topology, num_bytes, self.machine, self.deterministic)

    def close(self) -> None:
        """Ends this rank's use of it. Not collective; may be called more than once."""
        if not isinstance(self._ended, ClosedError):
            self._ended = ClosedError(
                f"communicator {self.name} was closed; make a new one for further calls"
            )

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<nvrar.Communicator {self.name}: rank {self.rank} of {self.world_size}, "
            f"{self.topology}, plan {self.plan}>"
        )

    # -- running -----------------------------------------------------------------------------------

    def _run(self, x: Tensor, out: Tensor, op: str) -> None:
        deadline = time.monotonic() + self.timeout_s
        reason = self._fallback_reason(x)
        if reason:
            return self._run_torch(x, out, op, reason, deadline)
        plan = self.plan_for(x.nbytes, x.dtype)
        wire = host.wire_type(x.dtype, self.wire_dtype)
        flat = x.contiguous().view(-1).to(wire)
        # The result is built in `out` itself where its memory allows, else beside it.
        direct = out.is_contiguous() and wire == x.dtype
        result = out.view(-1) if direct else torch.empty_like(flat)
        call = f"all_reduce of {x.numel()} x {x.dtype} ({op}) by '{plan}'"
        self._run_plan(flat, result, plan, op, call, deadline)
        if not direct:
            out.copy_(result.view(out.shape))
        return None

    def _run_plan(
        self, flat: Tensor, result: Tensor, plan: Plan, op: str, call: str, deadline: float
    ) -> None:
        budget_s = deadline - time.monotonic() - self._sideband.grace_s
        try:
            self._host.all_reduce(flat, result, plan, op, self._epoch, call, budget_s)
        except host.PeerLost as lost:
            peer = None if lost.position is None else self.topology.rank_at(lost.position)
            report = Report(self._epoch, call, peer, lost.reason, lost.timed_out, lost.level)
            self._end(report, deadline, lost)
        except ValueError as error:  # what torch says of a group that it no longer knows
            if not is_destroyed(self.group):
                raise
            self._end(Report(self._epoch, call), deadline, error)

    def _run_torch(self, x: Tensor, out: Tensor, op: str, reason: str, deadline: float) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            log.warning("%s: using torch.distributed.all_reduce for such calls", reason)
        self.stats.fallbacks[reason] += 1
        call = f"all_reduce of {x.numel()} x {x.dtype} ({op}) by torch.distributed"
        if x.device.type == "cpu":
            # gloo ends the process of a rank that is sent more than it expects. So ranks whose calls
            # differ must not get there: the executor's messages match only between equal calls.
            token = torch.zeros(1)
            plan = Plan.named("nvrar", self.topology)
            self._run_plan(token, token, plan, "sum", call, deadline)
        total = out if out.is_contiguous() else torch.empty_like(x, memory_format=_DENSE)
        if total is not x:
            total.copy_(x)
        try:
            work = dist.all_reduce(total, _TORCH_OPS[op], group=self.group, async_op=True)
            left = deadline - time.monotonic() - self._sideband.grace_s
            work.wait(timedelta(seconds=max(left, 0.001)))
        except (RuntimeError, ValueError) as error:
            text = str(error).splitlines()[0][:200]
            if is_destroyed(self.group):
                self._end(Report(self._epoch, call), deadline, error)
            if isinstance(error, ValueError) or any(word in text.lower() for word in _UNSUPPORTED):
                raise ArgumentError(
                    f"torch.distributed.all_reduce does not take {x.dtype} ({op}) on this process "
                    f"group, and no executor of nvrar does: {text}; convert it to another type first"
                ) from error
            timed_out = time.monotonic() >= deadline - self._sideband.grace_s - 0.01
            report = Report(self._epoch, call, reason=text, timed_out=timed_out)
            self._end(report, deadline, error)
        if op == "avg":
            total /= self.world_size
        if total is not out:
            out.copy_(total)

    def _end(self, report: Report, deadline: float, cause: Exception) -> NoReturn:
        """Raises what ``report`` amounts to, now and in every later call."""
        if is_destroyed(self.group):
            self._ended = ClosedError(
                f"the process group of communicator {self.name} was destroyed; make a new group, and "
                "a new communicator on it"
            )
        else:
            self._ended = self._sideband.explain(report, deadline)
        raise self._ended from cause

    def _fallback_reason(self, x: Tensor) -> str:
        """Why no executor takes ``x``; empty if one does. Equal on all ranks that make the same call."""
        if x.nbytes > self.max_bytes:
            return f"messages above max_bytes ({self.max_bytes})"
        if x.dtype not in host.DTYPES:
            return f"dtype {x.dtype}"
        if x.device.type != "cpu" and self.executor != "host":
            return f"no executor for {x.device.type} tensors"
        return ""

    # -- creation ----------------------------------------------------------------------------------

    def _refusal_of_options(
        self, topology: Topology | None, plan: str | Plan, machine: Machine | str | None
    ) -> NvrarError | None:
        """What is wrong with this rank's arguments, before any other rank is asked."""
        try:
            if not isinstance(self.timeout_s, (int, float)) or not 0 < self.timeout_s < math.inf:
                raise ArgumentError(f"timeout_s is {self.timeout_s!r}; it must be a time above 0")
            if not isinstance(self.max_bytes, int) or self.max_bytes < 0:
                raise ArgumentError(f"max_bytes is {self.max_bytes!r}; it must be 0 or more bytes")
            if self.wire_dtype not in (None, torch.float32):
                raise ArgumentError(
                    f"wire_dtype is {self.wire_dtype}; it must be torch.float32 or None"
                )
            if self.executor not in ("auto", "host"):
                raise ArgumentError(f"executor is {self.executor!r}; it must be 'auto' or 'host'")
            if isinstance(machine, str):
                machine_named(machine)
            elif machine is not None and not isinstance(machine, Machine):
                raise ArgumentError(f"machine is {machine!r}; it must be a name or a Machine")
            if topology is not None and not isinstance(topology, Topology):
                raise ArgumentError(
                    f"topology is {topology!r}; it must be a Topology, such as Topology(2, 4) or "
                    "Topology.parse('2x4')"
                )
            if topology is not None and topology.world_size != self.world_size:
                raise TopologyError(
                    f"topology {topology} has {topology.world_size} ranks, the group has "
                    f"{self.world_size}; num_nodes * ranks_per_node must be {self.world_size}"
                )
            if not isinstance(plan, (str, Plan)):
                raise ArgumentError(f"plan is {plan!r}; it must be a name, a word or a Plan")
            if plan != "auto":
                Plan.resolve(plan, topology or Topology.flat(self.world_size))
        except NvrarError as error:
            return error
        return None

    def _agree(
        self,
        refusal: NvrarError | None,
        topology: Topology | None,
        plan: str | Plan,
        machine: Machine | str | None,
        wait_s: float,
    ) -> list[dict[str, Any]]:
        """What every rank said of itself, once all have said the same of what must be equal."""
        common = {
            "version": __version__,
            "topology": repr(topology),
            "plan": str(plan),
            "max_bytes": str(self.max_bytes),
            "timeout_s": str(self.timeout_s),
            "deterministic": str(bool(self.deterministic)),
            "wire_dtype": str(self.wire_dtype),
            "machine": str(machine),
            "executor": str(self.executor),
        }
        mine = {
            "name": uuid.uuid4().hex[:12],  # the first rank's becomes the communicator's
            "refusal": None if refusal is None else str(refusal),
            "sighting": sighting(os.environ),
            "common": common,
        }
        try:
            said = exchange_values(self.group, "communicator", mine, wait_s)
        except NvrarError as error:
            raise refusal or error from None
        if refusal is not None:
            raise refusal
        for rank, other in enumerate(said):
            if other["refusal"] is not None:
                raise DisagreementError(f"rank {rank} refused its arguments: {other['refusal']}")
        for key in common:
            values = [other["common"].get(key) for other in said]
            if any(value != values[0] for value in values):
                odd = next(r for r, value in enumerate(values) if value != values[0])
                raise DisagreementError(
                    f"{key} is {values[0]} on rank 0 and {values[odd]} on rank {odd}; give the "
                    "same arguments (and install the same version) on all ranks of the group"
                )
        return said


def _refusal_of_call(x: Tensor, out: Tensor | None, op: str) -> str:
    if not isinstance(x, torch.Tensor):
        return f"x is {type(x).__name__}, not a torch.Tensor"
    if x.layout != torch.strided:
        return f"x has layout {x.layout}; all_reduce takes dense tensors: call x.to_dense() first"
    if op not in host.OPS:
        return f"op is {op!r}; it must be one of {', '.join(host.OPS)}"
    if op == "avg" and not x.dtype.is_floating_point:
        return f"op 'avg' needs a floating type and x is {x.dtype}; use 'sum' and divide"
    if out is None:
        return ""
    if not isinstance(out, torch.Tensor):
        return f"out is {type(out).__name__}, not a torch.Tensor"
    for what in ("shape", "dtype", "device", "layout"):
        if getattr(out, what) != getattr(x, what):
            return (
                f"out has {what} {getattr(out, what)}, x has {getattr(x, what)}; they must be equal"
            )
    if any(n > 1 and s == 0 for n, s in zip(out.shape, out.stride(), strict=True)):
        return "elements of out share memory, as those of an expanded tensor do; give out.clone()"
    if _partly_overlap(x, out):
        return "x and out share part of their memory; give out=x, or memory of its own"
    return ""


def _partly_overlap(x: Tensor, out: Tensor) -> bool:
    # Where one of them has gaps there is a buffer in between, and overlap does no harm.
    if not (x.is_contiguous() and out.is_contiguous()):
        return False
    return 0 < abs(x.data_ptr() - out.data_ptr()) < x.nbytes


def _compiled(name: str, x: Tensor, out: Tensor | None, op: str) -> Tensor:
    if out is x:
        torch.ops.nvrar.all_reduce_(x, name, op)
        return x
    total: Tensor = torch.ops.nvrar.all_reduce(x, name, op)
    if out is None:
        return total
    if out.shape != x.shape or out.dtype != x.dtype:  # copy_ would broadcast, and convert
        raise ArgumentError(
            f"out is {out.dtype} {tuple(out.shape)}, x is {x.dtype} {tuple(x.shape)}; "
            "they must be equal"
        )
    return out.copy_(total)
