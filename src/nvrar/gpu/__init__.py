"""Executor 2: the plan as one fused CUDA kernel."""

from __future__ import annotations

import importlib.util

import torch
import torch.distributed as dist

from nvrar.errors import GpuUnavailable

_PACKAGES = {
    "nvshmem": "nvshmem4py-cu13 and nvidia-nvshmem-cu13",
    "cuda.core": "cuda-core",
    "cuda.bindings": "cuda-bindings",
}


def lack(group: dist.ProcessGroup | None) -> str:
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
    here = lack(None)
    of_group = lack(group)
    if of_group and not here:  # the same on all ranks of the group
        return of_group
    from nvrar.gpu.heap import open_heap

    try:
        open_heap(here, timeout_s)
    except GpuUnavailable as error:
        return str(error)
    return ""


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False
