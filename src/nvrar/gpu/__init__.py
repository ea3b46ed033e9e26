# SPDX-License-Identifier: Apache-2.0
"""Executor 2: the plan as one fused CUDA kernel."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from nvrar.errors import GpuUnavailable
from nvrar.meeting import Meeting

if TYPE_CHECKING:
    from nvrar.gpu.calls import GpuCalls
    from nvrar.topology import Topology
    from nvrar.tune import Choice

COMPILE_S = 300.0  # what a rank may take longer than others to compile its kernels

_PACKAGES = {
    "nvshmem": "nvshmem4py-cu13 and nvidia-nvshmem-cu13",
    "cuda.core": "cuda-core",
    "cuda.bindings": "cuda-bindings",
}


def why_unavailable(group: dist.ProcessGroup | None) -> str:
    """What keeps this rank from the GPU executor, and how to get it; empty if nothing does.

    Without a group, of this machine alone. Imports nothing heavy and touches no GPU.
    """
    if not torch.cuda.is_available():
        return "sees no GPU, or its torch was built without CUDA"
    missing = [what for name, what in _PACKAGES.items() if not _is_installed(name)]
    if missing:
        cuda = "cu13" if str(torch.version.cuda or "13").startswith("13") else "cu12"
        return f"lacks {', '.join(missing)}: pip install 'nvrar[{cuda}]'"
    if group is not None and "nccl" not in dist.get_backend_config(group):
        return "has no NCCL in its process group: init_process_group('cpu:gloo,cuda:nccl')"
    return ""


def open_for(group: dist.ProcessGroup, timeout_s: float) -> str:
    """Opens the symmetric heap, unless something keeps this rank from the GPU executor: what does.

    The first time collective over the default process group, and before anything that is collective over
    ``group``: so no order in which ranks make communicators on several groups can block it.

    Raises:
        NvrarError: see :func:`nvrar.gpu.heap.open_heap`.
    """
    here = why_unavailable(None)
    of_group = why_unavailable(group)
    if of_group and not here:  # the same on all ranks of the group
        return of_group
    from nvrar.gpu.heap import open_heap

    try:
        open_heap(here, timeout_s)
    except GpuUnavailable as error:
        return str(error)
    return ""


def make_calls(
    meeting: Meeting,
    topology: Topology,
    choose: Callable[..., Choice],
    max_bytes: int,
    wire_dtype: torch.dtype | None,
    budget_s: float,
) -> GpuCalls:
    """The executor, with its kernels for bfloat16 sums of up to ``max_bytes``. Collective, where
    :func:`open_for` found nothing on any rank.

    Args:
        choose: see :meth:`nvrar.tune.Chooser.choose`.
        budget_s: bound on every wait inside a kernel.

    Raises:
        GpuUnavailable: a rank's kernels do not compile, or the heap has no place; on every rank.
        NvrarError: see :func:`nvrar.meeting.together`.
    """
    from nvrar.gpu.calls import GpuCalls

    made = GpuCalls(meeting, topology, choose, max_bytes, wire_dtype, budget_s)
    sizes = [*(1 << exponent for exponent in range(max_bytes.bit_length())), max_bytes]

    def compile_all() -> None:
        made.warmup(sizes, torch.bfloat16)

    try:
        meeting.together("kernels", compile_all, COMPILE_S)
    except GpuUnavailable:
        made.close()
        raise
    return made


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False
