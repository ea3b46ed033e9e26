# SPDX-License-Identifier: Apache-2.0
"""Kernels in CUDA C++ (csrc/): compiled when first needed, kept on disk, launched so that they overlap."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch

from nvrar.gpu import jit
from nvrar.gpu.kernel import Function
from nvrar.gpu.layout import LaunchShape

log = logging.getLogger("yalis")

ENTRY = "yalis_kernel"
NUMBERS = {torch.bfloat16: "BFloat16", torch.float16: "Float16"}
NUM_THREADS = 256
_CSRC = Path(__file__).parent / "csrc"


class Spec(Protocol):
    """Everything that the machine code depends on, apart from csrc/."""

    def __hash__(self) -> int: ...

    @property
    def arch(self) -> str: ...

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        ...

    def source(self) -> str:
        """The translation unit: the few lines that instantiate the kernel `ENTRY`."""
        ...


def cubin(spec: Spec) -> bytes:
    """The machine code for `spec`, from the disk cache if it is there. Needs no GPU."""
    return jit.cubin_of_source(f"yalis's kernel {spec}", spec.source(), spec.arch, _CSRC)


def build(spec: Spec) -> jit.Built:
    """The same, compiled anew, and what it takes of a multiprocessor."""
    return jit.build_source(f"yalis's kernel {spec}", spec.source(), spec.arch, _CSRC)


def launch(
    spec: Spec, args: ctypes.Structure, device: torch.device, num_blocks: int, num_rows: int = 1
) -> None:
    """Launch `num_blocks x num_rows` blocks on the current stream. Capturable after the first time."""
    function = _load(spec, device.index or 0)
    config = _config(function, num_blocks, num_rows, stream_of(device), spec.shared_bytes)
    pointer = ctypes.c_void_p(ctypes.addressof(args))
    function.launch(config, ctypes.addressof(pointer))


def stream_of(device: torch.device) -> int:
    """The handle of the current stream."""
    return torch.cuda.current_stream(device).cuda_stream


def can_run(device: torch.device) -> bool:
    """Whether these kernels are for this device."""
    return device.type == "cuda" and _overlaps_copies(device) and _has_compiler()


@lru_cache
def _overlaps_copies(device: torch.device) -> bool:
    """Whether it has the instructions of csrc/ptx.cuh."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache
def arch_of(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@lru_cache
def num_processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache
def _has_compiler() -> bool:
    try:
        is_there = importlib.util.find_spec("cuda.core") is not None
    except ModuleNotFoundError:  # of `cuda` itself
        is_there = False
    if not is_there:
        log.warning(
            "cuda-core is not installed, so slower kernels than yalis's own are used; "
            "pip install 'nvrar[cu13]'"
        )
    return is_there


class _Loaded(Function):
    """A kernel that keeps its library, whose end would unload it."""

    def __init__(self, library: Any, device_idx: int) -> None:
        super().__init__(int(library.get_kernel(ENTRY).handle), device_idx)
        self._library = library


@cache
def _load(spec: Spec, device_idx: int) -> Function:
    from cuda.core import ObjectCode

    function = _Loaded(ObjectCode.from_cubin(cubin(spec), name=ENTRY), device_idx)
    function.take_shared(spec.shared_bytes)
    return function


@lru_cache(maxsize=1024)
def _config(
    function: Function, num_blocks: int, num_rows: int, stream: int, shared_bytes: int
) -> Any:
    shape = LaunchShape(num_blocks, NUM_THREADS)
    return function.config(shape, stream, num_rows, overlaps=True, shared_bytes=shared_bytes)
