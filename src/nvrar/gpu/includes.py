# SPDX-License-Identifier: Apache-2.0
"""Where the headers and libraries are that kernels are compiled against: wheels, else a toolkit."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from nvrar.errors import GpuUnavailable

SOURCES = Path(__file__).parent / "csrc"


class CompileError(GpuUnavailable):
    """The kernel does not compile on this machine; the compiler's log is in the message."""


def cuda_includes() -> list[Path]:
    """The CUDA headers and those of libcu++: from the wheels, else from a toolkit."""
    roots = [w / sub for w in _wheels() for sub in ("cu13", "cuda_runtime", "cuda_cccl")]
    roots += [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")]
    folders = [root / "include" for root in roots]
    folders += [folder / "cccl" for folder in folders]
    # Of each kind the first: mixing two versions of a header is worse than missing one.
    found = [
        next((f for f in folders if (f / header).exists()), None)
        for header in ("cuda_bf16.h", "cuda/std/type_traits")
    ]
    if None in found:
        raise CompileError(
            f"no CUDA headers in {', '.join(map(str, folders))}; pip install 'nvrar[cu13]' brings them, "
            "or set CUDA_HOME to a toolkit"
        )
    return list(dict.fromkeys(f for f in found if f is not None))


def _wheels() -> list[Path]:
    """The folders of NVIDIA's wheels; none where all of CUDA is a toolkit's."""
    found = importlib.util.find_spec("nvidia")
    return [] if found is None else [Path(p) for p in found.submodule_search_locations or ()]


def nvshmem_folder() -> Path:
    for root in _wheels():
        folder = root / "nvshmem"
        if (folder / "lib" / "libnvshmem_device.a").exists():
            return folder
    raise CompileError(
        "no NVSHMEM device library among the installed wheels; pip install 'nvrar[cu13]' brings it"
    )
