"""The all-reduce as torch operators, so that torch.compile can see it whole.

``torch.ops.nvrar.all_reduce(x, comm, op)`` gives a new tensor, ``torch.ops.nvrar.all_reduce_`` works in
place, ``torch.ops.nvrar.all_reduce_add_rms_norm`` gives two new ones; ``comm`` is ``Communicator.name``.
User code calls the methods of :class:`nvrar.Communicator`, which turn into these when it is compiled. A
compiled program leaves out an ``all_reduce`` whose result it does not use; all ranks must therefore
compile the same program, as they must make the same calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvrar.communicator import Communicator, by_name
from nvrar.errors import ClosedError


def _communicator(name: str) -> Communicator:
    found = by_name.get(name)
    if found is None:
        raise ClosedError(
            f"no communicator {name!r} lives in this process: it was deleted after the graph was "
            "compiled; keep it alive as long as the compiled function"
        )
    return found


@torch.library.custom_op("nvrar::all_reduce", mutates_args=())
def all_reduce(x: Tensor, comm: str, op: str = "sum") -> Tensor:
    return _communicator(comm).all_reduce(x, op=op)


@all_reduce.register_fake
def _(x: Tensor, comm: str, op: str = "sum") -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("nvrar::all_reduce_", mutates_args=("x",))
def all_reduce_(x: Tensor, comm: str, op: str = "sum") -> None:
    _communicator(comm).all_reduce(x, out=x, op=op)


@all_reduce_.register_fake
def _(x: Tensor, comm: str, op: str = "sum") -> None:
    return None


@torch.library.custom_op("nvrar::all_reduce_add_rms_norm", mutates_args=())
def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, comm: str
) -> tuple[Tensor, Tensor]:
    return _communicator(comm).all_reduce_add_rms_norm(x, residual, weight, eps)


@all_reduce_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, comm: str) -> tuple[Tensor, Tensor]:
    dense = torch.contiguous_format
    return torch.empty_like(x, memory_format=dense), torch.empty_like(x, memory_format=dense)
