"""The kernels of csrc/ on a CPU: compiled by g++ against tests/emulation, which stands in for CUDA and PTX.

A block is a thread of the system and its threads take turns in it, so a few ranks of a few blocks are quick
enough for tests. Puts travel by a network of its own, which delays them and mixes their order.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from nvrar.gpu import jit, kernel, layout
from nvrar.gpu.includes import SOURCES
from nvrar.gpu.layout import Format, LaunchShape, Room, Rows
from nvrar.plan import Plan

_FOLDER = Path(__file__).parent / "emulation"
# As a GPU rounds: no product is joined with a sum unless the source says so.
_GXX = [
    "g++",
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-shared",
    "-w",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
]
_CACHE = Path(tempfile.gettempdir()) / f"nvrar-emulation-{os.getuid()}"


@cache
def _core() -> ctypes.CDLL:
    built = _compiled((_FOLDER / "emulation.cpp").read_text(), _FOLDER, "-pthread")
    return ctypes.CDLL(str(built), ctypes.RTLD_GLOBAL)


@cache
def _function(source: str, sources: Path, call: str) -> ctypes.c_void_p:
    """The address of the kernel that `source` defines and `call` calls, with a pointer to its `args`."""
    _core()
    entry = f'extern "C" void emulated(const void* args) {{ {call} }}'
    library = ctypes.CDLL(str(_compiled(f'#include "emulation.h"\n{source}\n{entry}\n', sources)))
    return ctypes.cast(library.emulated, ctypes.c_void_p)  # nothing unloads it


def _compiled(source: str, sources: Path, *options: str) -> Path:
    """A shared library of `source`, which includes the files of `sources`, but for those that have a
    stand-in. Kept, as machine code that depends on nothing else."""
    stand_ins = {f.name: f for f in _FOLDER.iterdir()}
    package = sources.parts[-3] if sources != _FOLDER else ""
    files = {f.name: f for f in sources.iterdir()} | stand_ins
    for name, file in stand_ins.items():
        if package and name.startswith(f"{package}_"):
            files[name.removeprefix(f"{package}_")] = file
    digest = hashlib.sha256(source.encode() + " ".join([*_GXX, *options]).encode())
    for name in sorted(files):
        digest.update(name.encode() + files[name].read_bytes())
    built = _CACHE / f"{digest.hexdigest()[:32]}.so"
    if built.exists():
        return built
    with tempfile.TemporaryDirectory() as scratch:
        for name, file in files.items():
            shutil.copy(file, Path(scratch, name))
        unit, made = Path(scratch, "unit.cpp"), Path(scratch, "made.so")
        unit.write_text(source)
        command = [*_GXX, *options, f"-I{scratch}", "-o", str(made), str(unit)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        _CACHE.mkdir(exist_ok=True)
        beside = _CACHE / f"{made.stem}.{os.getpid()}.so"
        shutil.copy(made, beside)
        beside.rename(built)
    return built


class Call(ctypes.Structure):
    """`Call` of emulation.cpp."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("args", ctypes.c_void_p),
        ("blocks", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("cluster", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
    )


def emulate(calls: Sequence[Sequence[Call]], heap: Tensor | None = None, seed: int = 0) -> None:
    """Every rank makes its calls, `calls[rank]`, in turn. `heap` `[num_ranks, bytes]` is what puts reach."""
    flat = [call for of_rank in calls for call in of_rank]
    num_late_stores = _core().emulate(
        (Call * len(flat))(*flat),
        len(calls[0]),
        len(calls),
        ctypes.c_void_p(heap.data_ptr() if heap is not None else 0),
        ctypes.c_uint64(heap.shape[1] if heap is not None else 1),
        seed,
    )
    assert num_late_stores == 0, f"{num_late_stores} blocks were written to after they had left"


@dataclass(frozen=True)
class Prepared:
    """A call of all ranks, with what must live as long as it."""

    call: Call
    alive: tuple[Tensor, ...]


class EmulatedCluster:
    """All ranks of `plan`, as :class:`nvrar.gpu.virtual.VirtualCluster` has them on a GPU; `put` by level."""

    def __init__(
        self,
        plan: Plan,
        dtype: torch.dtype,
        op: str = "sum",
        *,
        put: tuple[bool, ...] = (),
        max_bytes: int,
        first_epoch: int = 2,
        budget_s: float = 30.0,
    ) -> None:
        self.plan, self.dtype, self.op = plan, dtype, op
        self.num_ranks = plan.world_size
        self._spec = jit.KernelSpec(plan, layout.LL, dtype, op, "cpu", put=put, virtual=True)
        # Each format has its own region, and each region two inboxes and, for put, two outboxes.
        self._room = {
            f.name: -(-layout.inbox_bytes(plan, f, max_bytes) // 1024) * 1024
            for f in layout.FORMATS.values()
        }
        size = 4 * sum(self._room.values())
        spare = torch.zeros(self.num_ranks * size + 1024, dtype=torch.uint8)
        start = -spare.data_ptr() % 1024
        self.heap = spare[start : start + self.num_ranks * size].view(self.num_ranks, size)
        self.control = torch.zeros(self.num_ranks, 4, dtype=torch.int32)
        self.control[:, 0] = first_epoch if first_epoch < 1 << 31 else first_epoch - (1 << 32)
        self.failure = torch.zeros(self.num_ranks, 5, dtype=torch.int32)
        self._budget_ticks = kernel.budget_ticks(budget_s)

    def _args(self, position: int, packets: Format, plan: Plan) -> ctypes.Structure:
        args = kernel.args_type_of(plan)()
        before = 0 if packets is layout.LL else self._room["LL"]
        args.budget_ticks = self._budget_ticks
        args.parity_bytes = self._room[packets.name]

        def inbox_of(rank: int) -> int:
            return self.heap[rank].data_ptr() + 4 * before

        args.inbox = inbox_of(position)
        args.outbox = args.inbox + 2 * args.parity_bytes
        args.control = self.control[position].data_ptr()
        args.failure = self.failure[position].data_ptr()
        levels = range(len(plan.levels))
        args.digit[: len(levels)] = plan.digits(position) if plan.levels else ()
        peers = [p for i in levels for p in plan.members(position, i)]
        args.pe[: len(peers)] = peers
        args.peer[: len(peers)] = [inbox_of(p) for p in peers]
        return args

    def _prepared(
        self,
        table: list[ctypes.Structure],
        spec: jit.KernelSpec,
        shape: LaunchShape,
        shared_bytes: int,
        *tensors: Tensor,
    ) -> Prepared:
        spec = replace(spec, args_bytes=ctypes.sizeof(table[0]))
        call = f"{jit.ENTRY}((const nvrar::Args<P>*)args);"
        function = _function(spec.source(), SOURCES, call)
        packed = torch.frombuffer(bytearray(b"".join(map(bytes, table))), dtype=torch.uint8)
        call = Call(
            function, packed.data_ptr(), shape.blocks, shape.threads, shape.cluster, shared_bytes
        )
        return Prepared(call, (packed, *tensors))

    def prepare(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        packets: Format,
        shape: LaunchShape,
    ) -> Prepared:
        """An all-reduce of `inputs[r]` into `outputs[r]`, contiguous, in at most so many blocks."""
        num_bytes = inputs[0].nbytes
        assert layout.inbox_bytes(self.plan, packets, num_bytes) <= self._room[packets.name]
        table = [self._args(rank, packets, self.plan) for rank in range(len(inputs))]
        whole = kernel.fill_sums(table, inputs, outputs, self.plan, packets, self.dtype, self.op)
        room = Room(lambda threads: shape.blocks * 8 // 3 + 1)
        shape = layout.launch_shape(self.plan, packets, num_bytes, room, shape)
        spec = replace(self._spec, packets=packets, whole=whole)
        return self._prepared(table, spec, shape, 0, *inputs, *outputs)

    def prepare_rows(
        self,
        inputs: Sequence[Tensor],
        residuals: Sequence[Tensor],
        weight: Tensor,
        eps: float,
        packets: Format,
        shape: LaunchShape,
        *,
        sums: bool = True,
    ) -> Prepared:
        """The sum, unless the inputs are sums, residual and RMSNorm of `[rows, hidden]` tensors, in place."""
        plan = self.plan if sums else Plan(())
        rows = Rows(inputs[0].shape[0], inputs[0].shape[1] * weight.element_size())
        assert rows.inbox_bytes(plan, packets) <= self._room[packets.name]
        table = []
        for rank, (x, residual) in enumerate(zip(inputs, residuals, strict=True)):
            args = self._args(rank, packets, plan)
            args.in_ = args.out = x.data_ptr()
            args.norm.residual = args.norm.residual_out = residual.data_ptr()
            args.norm.weight = weight.data_ptr()
            kernel.fill_rows(args, plan, packets, self.dtype, rows, eps)
            table.append(args)
        put = self._spec.put if sums else ()
        spec = replace(self._spec, plan=plan, packets=packets, put=put, rows=True)
        shared_bytes = rows.shared_bytes(plan, packets)
        blocks = min(shape.blocks, rows.num_rows * shape.cluster)  # no team may be without a row
        shape = replace(shape, blocks=blocks)
        return self._prepared(table, spec, shape, shared_bytes, weight, *inputs, *residuals)

    def run(self, *calls: Prepared, seed: int = 0) -> None:
        """Every rank makes these calls."""
        self.run_apart([calls] * self.num_ranks, seed=seed)

    def run_apart(self, calls: Sequence[Sequence[Prepared | None]], seed: int = 0) -> None:
        """Every rank makes its own, and None is a call that it misses."""
        missed = Call()
        emulate([[missed if c is None else c.call for c in of] for of in calls], self.heap, seed)

    def check(self) -> None:
        assert not self.failure.any(), self.failure
