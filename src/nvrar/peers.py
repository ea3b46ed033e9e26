# SPDX-License-Identifier: Apache-2.0
"""Other all-reduces of one GPU host that come with torch, to be measured beside ours.

They work on memory of their own kind, which a caller would have to copy into; here they are given it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from nvrar.contenders import Contender, TorchContender
from nvrar.errors import NvrarError
from nvrar.meeting import exchange_values
from nvrar.plan import Plan


def available(
    group: dist.ProcessGroup, dtype: torch.dtype, op: str, timeout_s: float
) -> tuple[list[Contender], list[str]]:
    """Those that work here, and for each of the others why not. Collective over ``group``.

    A process that has made them ends by :func:`leave`.
    """
    if op != "sum" or not dtype.is_floating_point or dtype == torch.float64:
        return [], [f"symmetric memory: no {op} of {dtype}"]
    if len(set(exchange_values(group, "peer hosts", socket.gethostname(), timeout_s))) > 1:
        return [], ["symmetric memory: the ranks are on several hosts"]
    makers: dict[str, Callable[[], Contender]] = {
        NcclPool.name: partial(NcclPool, group),
        **{f"symm_mem {way}": partial(SymmMem, group, way) for way in SymmMem.WAYS},
    }
    found, lacking = [], []
    for name, make in makers.items():
        contender, reason = None, ""
        try:
            contender = make()
            contender.buffer(1024, dtype, "cuda")
        except (RuntimeError, AttributeError, ImportError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        reasons = exchange_values(group, f"peer {name}", reason, timeout_s)
        if any(reasons):
            lacking.append(f"{name}: {next(filter(None, reasons))}")
        elif contender is not None:
            found.append(contender)
    return found, lacking


def leave(group: dist.ProcessGroup, code: int, timeout_s: float) -> NoReturn:
    """Ends this process with exit code ``code``, without destroying the group: NCCL 2.28 does not come back
    from destroying one that has a registered pool. Collective where ``code`` is 0."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0:  # nobody leaves while another still needs the store
        with contextlib.suppress(NvrarError):
            exchange_values(group, "leave", True, timeout_s)
        if group.rank() == 0:
            time.sleep(0.2)  # it may host the store that the others are reading
    os._exit(code)


class SymmMem:
    """torch.ops.symm_mem's one-shot or two-shot all-reduce."""

    WAYS = ("one-shot", "two-shot")

    def __init__(self, group: dist.ProcessGroup, way: str) -> None:
        import torch.distributed._symmetric_memory as symm_mem

        self.name = f"symm_mem {way}"
        self._symm_mem, self._group_name = symm_mem, group.group_name
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}  # making one takes long
        operations = torch.ops.symm_mem
        self._run = (
            operations.one_shot_all_reduce if way == "one-shot" else operations.two_shot_all_reduce_
        )

    def buffer(self, num_elements: int, dtype: torch.dtype, device: str) -> Tensor:
        kept = self._buffers.get((num_elements, dtype))
        if kept is None:
            kept = self._symm_mem.empty(num_elements, dtype=dtype, device=_current(device))
            self._symm_mem.rendezvous(kept, self._group_name)
            self._buffers[num_elements, dtype] = kept
        return kept

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        result: Tensor = self._run(x, op, self._group_name)
        return result

    def plan_for(self, num_bytes: int, dtype: torch.dtype) -> Plan | None:
        return None

    def executor_for(self, device: str) -> str:
        return self.name

    def fallbacks(self) -> Mapping[str, int]:
        return {}


class NcclPool(TorchContender):
    """NCCL on a registered symmetric memory pool, which lets it use its symmetric kernels.

    On a group of its own: what a pool's registration changes is not to reach the plain NCCL beside it.
    """

    name = "nccl pool"

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.new_group(dist.get_process_group_ranks(group)))
        self._backend = self._group._get_backend(torch.device(_current("cuda")))
        self._pools: list[torch.cuda.MemPool] = []
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}

    def buffer(self, num_elements: int, dtype: torch.dtype, device: str) -> Tensor:
        if (num_elements, dtype) in self._buffers:
            return self._buffers[num_elements, dtype]
        pool = torch.cuda.MemPool(self._backend.mem_allocator)
        with torch.cuda.use_mem_pool(pool):
            x = torch.zeros(num_elements, dtype=dtype, device=device)
        self.all_reduce(x, "sum")  # makes the communicator that the pool is registered with
        torch.cuda.synchronize()
        self._backend.register_mem_pool(pool, symm=True)  # type: ignore[attr-defined]
        self._pools.append(pool)
        self._buffers[num_elements, dtype] = x
        return x

    def executor_for(self, device: str) -> str:
        return self.name


def _current(device: str) -> torch.device:
    return torch.device(device, torch.cuda.current_device())
