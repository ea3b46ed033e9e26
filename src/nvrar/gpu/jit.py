# SPDX-License-Identifier: Apache-2.0
"""From a plan to a loaded kernel: generate, compile with NVRTC, link with nvJitLink, keep on disk.

No nvcc and no toolkit: the compilers and headers come as wheels, CUDA C++ sources as package data.
"""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nvrar.gpu.disk_cache import kept
from nvrar.gpu.includes import SOURCES, CompileError, cuda_includes, nvshmem_folder
from nvrar.gpu.layout import Format, most_threads
from nvrar.plan import Plan

if TYPE_CHECKING:
    from cuda.core import ObjectCode

TYPES = {
    torch.float32: "Float32",
    torch.float16: "Float16",
    torch.bfloat16: "BFloat16",
    torch.int32: "Int32",
}
OPS = {"sum": "Sum", "max": "Max"}
ENTRY = "nvrar_all_reduce"
_OPTIONS: dict[str, Any] = {
    "std": "c++17",
    "device_as_default_execution_space": True,
    "ptxas_options": ["-v"],
}


@dataclass(frozen=True)
class KernelSpec:
    """Everything that the machine code of a kernel depends on, apart from the sources."""

    plan: Plan
    packets: Format
    dtype: torch.dtype
    op: str
    arch: str  # such as "sm_90"
    put: tuple[bool, ...] = ()  # by level: whether packets travel by NVSHMEM put; empty: none do
    virtual: bool = False  # all ranks in one launch, args in a table indexed by blockIdx.y
    jitter_ns: int = 0  # random delays in front of sends, for tests
    whole: bool = True  # tensors start and end at multiples of packets.align_bytes
    rows: bool = False  # the sum, then residual and RMSNorm (csrc/rows.cuh); whole, op sum
    args_bytes: int = 0  # what the host thinks the kernel's argument takes

    @property
    def uses_put(self) -> bool:
        return any(self.put)

    def source(self) -> str:
        """The translation unit: the few lines that instantiate the kernel."""
        put = self.put or (False,) * len(self.plan.levels)
        levels = ", ".join(
            f"nvrar::Level<nvrar::Mode::k{level.mode.capitalize()}, {level.radix}, "
            f"nvrar::Transport::k{'Put' if by_put else 'Direct'}>"
            for level, by_put in zip(self.plan.levels, put, strict=True)
        )
        defines = ["#define NVRAR_PUT"] if self.uses_put else []
        if self.jitter_ns:
            defines.append(f"#define NVRAR_JITTER_NS {self.jitter_ns}")
        threads = most_threads(self.plan)
        types = f"nvrar::{self.packets.name}, nvrar::{TYPES[self.dtype]}"
        if self.rows:
            kernel = f"nvrar::all_reduce_add_rms_norm<{types}>"
        else:
            whole = str(self.whole).lower()
            kernel = f"nvrar::all_reduce<{types}, nvrar::{OPS[self.op]}, {whole}>"
        parameter, argument = (
            ("const nvrar::Args<P>* table", "table[blockIdx.y]")
            if self.virtual
            else ("const __grid_constant__ nvrar::Args<P> args", "args")
        )
        return "\n".join(
            [
                *defines,
                f'#include "{"rows" if self.rows else "all_reduce"}.cuh"',
                f"using P = nvrar::Plan<{levels}>;",
                f"static_assert(sizeof(nvrar::Args<P>) == {self.args_bytes}, "
                '"nvrar/gpu/kernel.py packs the arguments differently");',
                f'extern "C" __global__ void __launch_bounds__({threads}, 1) {ENTRY}({parameter}) {{',
                f"    {kernel}({argument});",
                "}",
                "",
            ]
        )


@cache
def load(spec: KernelSpec) -> ObjectCode:
    """The kernel as a library of this process. All communicators share it, and it stays: it has no state but
    NVSHMEM's, and cuda-core (1.2) unloads none."""
    from cuda.core import ObjectCode

    return ObjectCode.from_cubin(cubin(spec), name=ENTRY)


def cubin(spec: KernelSpec) -> bytes:
    """The machine code for ``spec``. Compiles on the first use on this machine, GPU or none.

    Raises:
        CompileError: NVRTC or nvJitLink refused.
    """
    return kept(_key(spec.source(), spec.arch, spec.uses_put), lambda: build(spec).cubin)


def cubin_of_source(what: str, source: str, arch: str, folder: Path) -> bytes:
    """The machine code of another package's kernel, kept like those of all-reduces.

    ``what`` names it in errors; ``folder`` holds all that ``source`` includes besides CUDA's headers.

    Raises:
        CompileError: NVRTC refused.
    """
    key = _key(source, arch, False, folder)
    return kept(key, lambda: build_source(what, source, arch, folder).cubin)


def build_source(what: str, source: str, arch: str, folder: Path) -> Built:
    """What :func:`cubin_of_source` compiles, whatever the cache holds."""
    code, messages = _compile(what, source, arch, False, folder)
    return Built(code, *_resources(messages))


def _key(source: str, arch: str, with_nvshmem: bool, folder: Path = SOURCES) -> str:
    parts = [source, arch, repr(_OPTIONS), *_versions(with_nvshmem), _sources_digest(folder)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _sources_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@cache
def _versions(with_nvshmem: bool) -> tuple[str, ...]:
    stems = ["nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cuda-cccl"]
    stems += ["nvidia-nvjitlink", "nvidia-nvshmem"] if with_nvshmem else []
    names = ["cuda-core", *(stem + end for stem in stems for end in ("", "-cu13", "-cu12"))]
    found = []
    for name in names:
        try:
            found.append(f"{name}={metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return tuple(found)


@dataclass(frozen=True)
class Built:
    """Machine code, and what its kernel takes of a multiprocessor."""

    cubin: bytes
    num_registers: int
    stack_bytes: int
    spill_bytes: int


def build(spec: KernelSpec) -> Built:
    """Compiles ``spec``, whatever the cache holds.

    Raises:
        CompileError: NVRTC or nvJitLink refused.
    """
    what = f"the kernel for plan '{spec.plan}' ({spec.packets.name}, {spec.dtype})"
    code, messages = _compile(what, spec.source(), spec.arch, to_be_linked=spec.uses_put)
    if spec.uses_put:
        code = _link(what, [code, _put(spec.arch)], spec.arch)
    return Built(code, *_resources(messages))


def _put(arch: str) -> bytes:
    """NVSHMEM's part of a kernel that puts, apart: its headers take ten times longer than all the rest."""
    source = '#include "put_by_nvshmem.cuh"\n'

    def make() -> bytes:
        return _compile("NVSHMEM's put", source, arch, to_be_linked=True)[0]

    return kept(_key(source, arch, True), make)


def _compile(
    what: str, source: str, arch: str, to_be_linked: bool, folder: Path = SOURCES
) -> tuple[bytes, str]:
    from cuda.core import Program, ProgramOptions

    folders = [str(folder), *map(str, cuda_includes())]
    if to_be_linked:
        folders.append(str(nvshmem_folder() / "include"))
    options = ProgramOptions(
        arch=arch,
        relocatable_device_code=to_be_linked or None,
        include_path=folders,
        **_OPTIONS,
    )
    messages = io.StringIO()
    try:
        code = Program(source, code_type="c++", options=options).compile("cubin", logs=messages)
    except Exception as error:
        raise CompileError(
            f"{what} does not compile for {arch}: {error}\n{messages.getvalue()}\n"
            f"Include folders: {folders}"
        ) from error
    return bytes(code.code), messages.getvalue()


def _link(what: str, codes: list[bytes], arch: str) -> bytes:
    from cuda.core import Linker, LinkerOptions, ObjectCode

    library = nvshmem_folder() / "lib" / "libnvshmem_device.a"
    try:
        parts = [ObjectCode.from_cubin(code) for code in codes]
        parts.append(ObjectCode.from_library(str(library)))
        linked = Linker(*parts, options=LinkerOptions(arch=arch)).link("cubin")
    except Exception as error:
        raise CompileError(f"{what} does not link for {arch} with {library}: {error}") from error
    return bytes(linked.code)


def _resources(report: str) -> tuple[int, int, int]:
    """Registers, and bytes of stack and spills, by ptxas's report of the kernel and what it calls."""
    stacks = [int(n) for n in re.findall(r"(\d+) bytes stack frame", report)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", report)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    return max(registers, default=0), max(stacks, default=0), max(spills, default=0)
