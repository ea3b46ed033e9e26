"""From a plan to a loaded kernel: generate, compile with NVRTC, link with nvJitLink, keep on disk.

No nvcc and no toolkit: the compilers and headers come as wheels, CUDA C++ sources as package data.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nvrar.errors import GpuUnavailable
from nvrar.gpu.layout import Format, most_threads
from nvrar.plan import Plan

if TYPE_CHECKING:
    from cuda.core import ObjectCode

log = logging.getLogger("nvrar")

TYPES = {
    torch.float32: "Float32",
    torch.float16: "Float16",
    torch.bfloat16: "BFloat16",
    torch.int32: "Int32",
}
OPS = {"sum": "Sum", "max": "Max"}
ENTRY = "nvrar_all_reduce"
_SOURCES = Path(__file__).parent / "csrc"
_DIGEST_BYTES = 32  # a cache entry is the digest of what follows, then the cubin


class CompileError(GpuUnavailable):
    """The kernel does not compile on this machine; the compiler's log is in the message."""


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


def load(spec: KernelSpec) -> ObjectCode:
    """The kernel as a library of the current CUDA context, from the cache if it is there."""
    from cuda.core import ObjectCode

    return ObjectCode.from_cubin(cubin(spec), name=ENTRY)


def cubin(spec: KernelSpec) -> bytes:
    """The machine code for ``spec``. Compiles on the first use on this machine, GPU or none.

    Raises:
        CompileError: NVRTC or nvJitLink refused.
    """
    path = cache_folder() / f"{_key(spec)}.cubin"
    found = _read(path)
    if found is None:
        found = build(spec).cubin
        _publish(path, found)
    return found


def cache_folder() -> Path:
    """``NVRAR_CACHE_DIR``, else ``nvrar`` in the user's cache folder."""
    chosen = os.environ.get("NVRAR_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nvrar"


# -- the cache -------------------------------------------------------------------------------------


def _key(spec: KernelSpec) -> str:
    parts = [spec.source(), spec.arch, *_versions(spec.uses_put), _sources_digest()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _sources_digest() -> str:
    digest = hashlib.sha256()
    for file in sorted(_SOURCES.iterdir()):
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


def _read(path: Path) -> bytes | None:
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    digest, code = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
    if hashlib.sha256(code).digest() == digest:
        return code
    log.warning(
        "compile cache entry %s is corrupt and is made anew; if this comes again, delete %s or set "
        "NVRAR_CACHE_DIR to a folder on a local disk",
        path, path.parent,
    )  # fmt: skip
    return None


def _publish(path: Path, code: bytes) -> None:
    """All or nothing, whoever else writes the same entry: the last rename wins, and all are equal."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        log.warning(
            "compiled kernels cannot be kept in %s (%s): every process compiles its own; set "
            "NVRAR_CACHE_DIR to a folder that can be written",
            path.parent, error,
        )  # fmt: skip


# -- the compilers ---------------------------------------------------------------------------------


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
    from cuda.core import Linker, LinkerOptions, ObjectCode, Program, ProgramOptions

    nvshmem = _nvshmem_folder() if spec.uses_put else None
    folders = [str(_SOURCES), *map(str, _cuda_includes())]
    folders += [str(nvshmem / "include")] if nvshmem else []
    messages = io.StringIO()
    try:
        program = Program(
            spec.source(),
            code_type="c++",
            options=ProgramOptions(
                arch=spec.arch,
                std="c++17",
                device_as_default_execution_space=True,
                relocatable_device_code=spec.uses_put or None,
                include_path=folders,
                ptxas_options=["-v"],
            ),
        )
        code = program.compile("cubin", logs=messages)
        if nvshmem:
            library = ObjectCode.from_library(str(nvshmem / "lib" / "libnvshmem_device.a"))
            linker = Linker(code, library, options=LinkerOptions(arch=spec.arch))
            code = linker.link("cubin")
    except Exception as error:
        raise CompileError(
            f"the kernel for plan '{spec.plan}' ({spec.packets.name}, {spec.dtype}, {spec.arch}) does "
            f"not compile: {error}\n{messages.getvalue()}\nInclude folders: {folders}"
        ) from error
    return Built(bytes(code.code), *_resources(messages.getvalue()))


def _resources(report: str) -> tuple[int, int, int]:
    """Registers, and bytes of stack and spills, by ptxas's report of the kernel and what it calls."""
    stacks = [int(n) for n in re.findall(r"(\d+) bytes stack frame", report)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", report)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    return max(registers, default=0), max(stacks, default=0), max(spills, default=0)


def _cuda_includes() -> list[Path]:
    """The CUDA headers and those of libcu++: from the wheels, else from a toolkit."""
    import nvidia

    roots = [
        Path(p) / sub for p in nvidia.__path__ for sub in ("cu13", "cuda_runtime", "cuda_cccl")
    ]
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


def _nvshmem_folder() -> Path:
    import nvidia

    for root in nvidia.__path__:
        folder = Path(root) / "nvshmem"
        if (folder / "lib" / "libnvshmem_device.a").exists():
            return folder
    raise CompileError(
        "no NVSHMEM device library among the installed wheels; pip install 'nvrar[cu13]' brings it"
    )
