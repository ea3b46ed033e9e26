# SPDX-License-Identifier: Apache-2.0
"""What the user holds: an all-reduce over the ranks of a process group.

tensor -> checks -> plan for its size -> executor -> tensor; or, where no executor can,
``torch.distributed.all_reduce`` on the same group, logged once and counted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist

from nvrar import gpu, host, ops
from nvrar.arguments import refusal_of_call
from nvrar.cost import USUAL, Machine, machine_named
from nvrar.ending import Ending
from nvrar.errors import ArgumentError, GpuUnavailable
from nvrar.host_calls import HostCalls
from nvrar.meeting import Meeting, is_destroyed, resolve_group
from nvrar.options import Options, agree
from nvrar.plan import Plan
from nvrar.registry import by_name
from nvrar.rms_norm import add_rms_norm, refusal_of_norm
from nvrar.routing import FASTER_BY_TORCH, Routing
from nvrar.topology import Topology
from nvrar.tune import Chooser

if TYPE_CHECKING:
    from torch import Tensor

    from nvrar.gpu.calls import GpuCalls

log = logging.getLogger("nvrar")

_DENSE = torch.contiguous_format
_MOST_KEPT = 4096


@dataclass
class Stats:
    """What a communicator has done so far, on this rank."""

    calls: int = 0
    bytes: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)  # calls left to torch, by reason


class Communicator:
    """An all-reduce over ``group``. Creation is collective over the group, and so is every call.

    Several may live in one process, on the same, different or overlapping groups. One communicator is
    not thread-safe: its calls are made one after the other, in the same order on all ranks. On GPUs, two
    communicators may work at the same time on two streams, whichever order each rank begins them in; a third
    with messages of megabytes may find no room, as each takes up to three eighths of a GPU's while it waits
    for peers. The first communicator with a GPU is collective over the default process group, because NVSHMEM
    is. Keep it, and do not close it, while a CUDA graph that captured its calls is replayed; then close it,
    as nothing else gives its symmetric memory back. A copy of a communicator is itself; it can neither be
    pickled nor used in a forked process.

    Args:
        group: a torch process group that holds this rank; None is the default group.
        topology: who sits where; None detects it as :meth:`Topology.detect` does.
        plan: ``"auto"`` chooses by size; else a name (``"nvrar"``, ``"one-shot"``, ``"two-shot"``,
            ``"direct"``, ``"halving-doubling"``), a word (``"split:4 exchange:2"``) or a Plan.
        max_bytes: larger messages go to ``torch.distributed.all_reduce``.
        timeout_s: bound on every wait for a peer, creation included; but a peer may take five minutes more
            to compile its kernels, and NVSHMEM, which starts with the first communicator, has no bound.
        deterministic: ``plan="auto"`` keeps one list of radices for all sizes, so that the bits of a
            result do not depend on the size of the message it was part of.
        wire_dtype: ``torch.float32`` keeps 16-bit inputs in fp32 across levels and rounds once, at the
            end, for twice the bytes; None sends the tensor's own type.
        machine: what ``plan="auto"`` chooses for where no measured table holds: a Machine, the name of
            one, or None: gloo for CPU tensors, h100-ndr where there is the GPU executor.
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

        options = Options(
            topology, plan, max_bytes, timeout_s, deterministic, wire_dtype, machine, executor
        )
        # Then any tensor goes by messages of the group, wherever it lies.
        self._is_host_only = executor == "host" or self.world_size == 1
        if self._is_host_only:
            unavailable = gpu.why_unavailable(self.group)
        else:
            unavailable = gpu.open_for(self.group, options.wait_s())
        agreement = agree(self.group, options, unavailable)
        self.name = agreement.name
        self.topology = agreement.topology
        self.plan = plan if plan == "auto" else Plan.resolve(plan, self.topology)
        usual = USUAL["host" if agreement.gpu_unavailable else "gpu"]
        self.machine = machine_named(machine) if isinstance(machine, str) else machine or usual
        chooser = Chooser(
            self.topology,
            self.machine,
            self.plan if isinstance(self.plan, Plan) else None,
            deterministic,
            may_use_torch=wire_dtype is None and executor == "auto",
            tables=agreement.tables,
        )
        self._link = agreement.link
        self._host = HostCalls(self.group, self.topology, self.name, wire_dtype)
        self._backends = host.backends_of(self.group)
        self._ending = Ending(self.group, self.name, timeout_s)
        self._gpu_unavailable = agreement.gpu_unavailable
        self._gpu: GpuCalls | None = None
        if not self._is_host_only and not self._gpu_unavailable:
            try:
                self._gpu = gpu.make_calls(
                    Meeting(self.group, self.name, timeout_s),
                    self.topology,
                    chooser.choose,
                    max_bytes,
                    wire_dtype,
                    self._ending.wait_s,
                )
                self._link = self._gpu.link
            except GpuUnavailable as error:  # the same on every rank
                self._gpu_unavailable = str(error)
        by = self.executor_for("cuda")
        self._routing = Routing(
            chooser, self._link, max_bytes, wire_dtype, by, self._gpu_unavailable
        )
        self._on_gpu: set[tuple[int, torch.dtype, str]] = set()  # sizes, types, operations it takes
        self._epoch = 0
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
            ``out``, or the new tensor. No gradient flows through it; with ``out=x`` that of x stays as it
            was. Where one should, call it in a ``torch.autograd.Function``.

        float32, float64, float16, bfloat16, int32 and int64 run the plan, on GPUs sum and max of float32,
        float16, bfloat16 and int32; others, and more than ``max_bytes``, go to
        ``torch.distributed.all_reduce``. 16-bit types are added in fp32, in digit order, and rounded once a
        level. Works under ``torch.compile(fullgraph=True)``.

        Raises:
            ArgumentError: this rank's arguments cannot work; the others are told, see next.
            DisagreementError: ranks made different calls, or one refused its arguments; within ``timeout_s``.
            PeerTimeout: a peer died or did not come within ``timeout_s``; the communicator is broken.
            ClosedError: it was closed.
        """
        if torch.compiler.is_compiling():
            return ops.compiled_all_reduce(self.name, x, out, op)
        self._begin(x, refusal_of_call(x, out, op))
        if out is None:
            out = torch.empty_like(x, memory_format=_DENSE, requires_grad=False)
        self._reduce(x, out, op)
        return out

    def all_reduce_add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float = 1e-6,
        *,
        out: Tensor | None = None,
        residual_out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The sum over ranks, the residual added to it, and the RMSNorm of that; collective, and on GPUs one
        launch. What a transformer layer does after each of its row-parallel products.

        Args:
            x: ``[..., hidden]`` float32, float16 or bfloat16; the same shape and dtype on all ranks.
            residual: of the same shape and dtype; each rank's own result uses its own.
            weight: ``[hidden]`` of that dtype.
            eps: added to the mean of squares.
            out, residual_out: receive the results; ``out=x`` and ``residual_out=residual`` work in place.

        Returns:
            ``(normalised, sum + residual)``, with the bits that :meth:`all_reduce` and
            :func:`nvrar.rms_norm.add_rms_norm` have one after the other. No gradient flows through them.

        Capturable in a CUDA graph after :meth:`warmup` with ``norm=True``. It takes two launches or more
        where rows are not a multiple of 16 bytes, or longer than 64 KB; where the message comes near
        ``max_bytes``; and, but for NVLink, where it is large and the plan cuts its rows into small parts.

        Raises:
            NvrarError: as :meth:`all_reduce`.
        """
        if torch.compiler.is_compiling():
            return ops.compiled_add_rms_norm(self.name, x, residual, weight, eps, out, residual_out)
        self._begin(x, refusal_of_norm(x, residual, weight, eps, out, residual_out))
        new = (torch.empty_like(x, memory_format=_DENSE, requires_grad=False) for _ in range(2))
        out = next(new) if out is None else out
        residual_out = next(new) if residual_out is None else residual_out
        if not x.numel():
            return out, residual_out
        calls = self._gpu if x.is_cuda else None
        with torch.no_grad():
            if calls is not None and not self._routing.why_torch(x) and calls.sums_rows(x):
                self._check_gpu_call(calls, x)
                calls.add_rms_norm(x, residual, weight, eps, out, residual_out, sums=True)
                return out, residual_out
            total = torch.empty_like(x, memory_format=_DENSE)
            self._reduce(x, total, "sum")
            if calls is not None and calls.takes_rows(x):
                calls.add_rms_norm(total, residual, weight, eps, out, residual_out, sums=False)
            else:
                normed, h = add_rms_norm(total, residual, weight, eps)
                out.copy_(normed)
                residual_out.copy_(h)
        return out, residual_out

    def warmup(
        self,
        sizes: Iterable[int],
        dtype: torch.dtype = torch.bfloat16,
        op: str = "sum",
        *,
        norm: bool = False,
    ) -> None:
        """Compiles and loads what CUDA messages of ``sizes`` bytes need, so that no call does. Local.

        Creation has done it for bfloat16 sums of all sizes; ``norm`` does it for
        :meth:`all_reduce_add_rms_norm` too. Without a GPU there is nothing to do.
        """
        if self._gpu is not None:
            sizes = list(sizes)
            self._gpu.warmup(sizes, dtype, op)
            if norm:
                self._gpu.warmup_norm(sizes, dtype)

    def check(self, *, wait: bool = True) -> None:
        """Waits for the GPU, and raises what went wrong in calls so far. Local.

        A call on CUDA tensors returns before it has run, as every CUDA operation does; where it fails, the
        result is NaN, and the next call raises. Call this before trusting results without another call, as
        after a graph's replay. With ``wait=False`` it takes a microsecond, and knows of what has run: for
        callers that have waited for their results already.

        Raises:
            PeerTimeout, DisagreementError, ClosedError: as :meth:`all_reduce`.
        """
        if self._gpu is not None:
            if wait:
                torch.cuda.synchronize(self._gpu.device)
            self._raise_gpu_failure(self._gpu)
        self._ending.raise_if_over()

    def plan_for(self, num_bytes: int, dtype: torch.dtype = torch.bfloat16) -> Plan:
        """The plan that a message of ``num_bytes`` would run; the same on every rank. Not collective.

        Raises:
            ArgumentError: ``num_bytes`` is no whole number of at least 0.
        """
        if not isinstance(num_bytes, int) or num_bytes < 0:
            raise ArgumentError(f"num_bytes is {num_bytes!r}; it must be a whole number, 0 or more")
        return self._routing.choice(num_bytes, dtype).plan

    def executor_for(self, device: str) -> str:
        """What carries out calls on tensors of ``"cpu"`` or ``"cuda"``: ``"host"``, ``"gpu"``, or
        ``"torch.distributed"`` where neither can. Single calls may still fall back; ``stats`` counts them."""
        if device == "cpu" or self._is_host_only:
            return "host"
        return "gpu" if self._gpu is not None else "torch.distributed"

    def link_for(self, device: str) -> str:
        """What carries the data of calls on tensors of ``"cpu"`` or ``"cuda"``; the same on every rank.

        Of the GPU executor: ``"nvlink"``; ``"peer"``, memory that is mapped otherwise (PCIe); ``"network"``,
        where some rank's memory is not mapped and NVSHMEM's put goes there; ``"put"`` where NVRAR_TRANSPORT
        forces it everywhere. Else the backend of the process group, such as ``"gloo"`` or ``"nccl"``.
        """
        executor = self.executor_for(device)
        if executor == "gpu":
            return self._link
        return host.backend_of(self.group, "cpu" if executor == "host" else device)

    def close(self) -> None:
        """Ends this rank's use of it. Not collective; may be called more than once."""
        if self._ending.close() and self._gpu is not None:
            self._gpu.close()

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
            f"{self.topology}, plan {self.plan}, {self._carried()}>"
        )

    def _carried(self) -> str:
        if is_destroyed(self.group):
            return "process group destroyed"
        if self._gpu is not None:
            return f"gpu executor over {self._link}"
        text = f"host executor over {self.link_for('cpu')}"
        if self._gpu_unavailable and self.executor == "auto":
            return f"{text} (no GPU executor: {self._gpu_unavailable})"
        return text

    def __copy__(self) -> Communicator:
        """Itself: a copy would count calls for itself, and disagree with the other ranks."""
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Communicator:
        """Itself, so that modules that hold one can be copied; they share it."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"communicator {self.name} belongs to its process and cannot be pickled; leave it out of "
            "what is saved or sent, and make one in every process"
        )

    def end_in_child(self) -> None:
        """Makes it useless in a process that was forked from its own (see :mod:`nvrar.registry`)."""
        self._ending.end_in_child()

    def let_go_of_group(self) -> None:
        """Forgets a group that was destroyed; for the end of the process (see :mod:`nvrar.registry`)."""
        del self.group, self._host, self._ending

    # -- running -----------------------------------------------------------------------------------

    def _begin(self, x: Tensor, refusal: str) -> None:
        """Every call begins so: one that cannot work ends here."""
        self._ending.raise_if_over()
        self._epoch += 1
        if refusal:
            self._refuse(x, refusal)
        self.stats.calls += 1
        self.stats.bytes += x.nbytes

    def _reduce(self, x: Tensor, out: Tensor, op: str) -> None:
        if not x.numel():
            return
        if self._gpu is not None and x.is_cuda:
            self._run_gpu(self._gpu, x, out, op)
        else:
            with torch.no_grad():
                self._run(x, out, op)

    def _refuse(self, x: object, refusal: str) -> NoReturn:
        """Raises on this rank, and tells the others why their wait is in vain."""
        epoch = self._epoch
        if self._gpu is not None and isinstance(x, torch.Tensor) and x.is_cuda:
            # Kernels report calls as the device counts them, replays of graphs too.
            if torch.cuda.is_current_stream_capturing():
                raise ArgumentError(refusal)  # nobody waits yet
            epoch = self._gpu.next_call()
        self._ending.refuse(refusal, epoch)

    def _run_gpu(self, calls: GpuCalls, x: Tensor, out: Tensor, op: str) -> None:
        self._check_gpu_call(calls, x)
        call = (x.nbytes, x.dtype, op)
        if call not in self._on_gpu:
            reason = calls.why_unsupported(x.dtype, op) or self._routing.why_torch(x)
            if reason:
                with torch.no_grad():
                    return self._run_torch(x, out, op, reason)
            if len(self._on_gpu) < _MOST_KEPT:
                self._on_gpu.add(call)
        return calls.all_reduce(x, out, op)

    def _check_gpu_call(self, calls: GpuCalls, x: Tensor) -> None:
        if calls.has_failed:
            self._raise_gpu_failure(calls)
        if x.get_device() != calls.device.index:
            self._refuse(
                x,
                f"x is on {x.device}, the communicator was made on {calls.device}; make it while the "
                "device of its tensors is the current one (torch.cuda.set_device)",
            )

    def _raise_gpu_failure(self, calls: GpuCalls) -> None:
        if calls.has_failed and self._ending.error is None:
            self._ending.fail(calls.report())

    def _run(self, x: Tensor, out: Tensor, op: str) -> None:
        if self.world_size > 1 and x.device.type not in self._backends:
            self._refuse(
                x,
                f"x is on {x.device}, and the process group carries tensors of "
                f"{', '.join(self._backends)} alone; give init_process_group a backend for each device, "
                "such as 'cpu:gloo,cuda:nccl'",
            )
        reason = self._routing.why_not_host(x)
        if reason:
            return self._run_torch(x, out, op, reason)
        plan = self.plan_for(x.nbytes, x.dtype)
        call = partial(self._host.all_reduce, x, out, op, plan, self._epoch)
        return self._ending.within_time(call)

    def _run_torch(self, x: Tensor, out: Tensor, op: str, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            # Once in a job, not once a rank: the reason is the same on all of them.
            level = logging.WARNING if self.rank == 0 else logging.DEBUG
            is_meant = reason == FASTER_BY_TORCH or not self.max_bytes
            level = min(level, logging.INFO) if is_meant else level
            log.log(level, "nvrar leaves calls to torch.distributed.all_reduce: %s", reason)
        self.stats.fallbacks[reason] += 1
        call = partial(self._host.all_reduce_by_torch, x, out, op, self._epoch)
        self._ending.within_time(call)
