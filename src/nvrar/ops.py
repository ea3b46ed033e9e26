# SPDX-License-Identifier: Apache-2.0
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

from nvrar.errors import ArgumentError
from nvrar.registry import find


@torch.library.custom_op("nvrar::all_reduce", mutates_args=())
def all_reduce(x: Tensor, comm: str, op: str = "sum") -> Tensor:
    return find(comm).all_reduce(x, op=op)


@all_reduce.register_fake
def _(x: Tensor, comm: str, op: str = "sum") -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("nvrar::all_reduce_", mutates_args=("x",))
def all_reduce_(x: Tensor, comm: str, op: str = "sum") -> None:
    find(comm).all_reduce(x, out=x, op=op)


@all_reduce_.register_fake
def _(x: Tensor, comm: str, op: str = "sum") -> None:
    return None


@torch.library.custom_op("nvrar::all_reduce_add_rms_norm", mutates_args=())
def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, comm: str
) -> tuple[Tensor, Tensor]:
    return find(comm).all_reduce_add_rms_norm(x, residual, weight, eps)


@all_reduce_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, comm: str) -> tuple[Tensor, Tensor]:
    dense = torch.contiguous_format
    return torch.empty_like(x, memory_format=dense), torch.empty_like(x, memory_format=dense)


def compiled_all_reduce(name: str, x: Tensor, out: Tensor | None, op: str) -> Tensor:
    """What :meth:`nvrar.Communicator.all_reduce` is to torch.compile."""
    if out is x:
        torch.ops.nvrar.all_reduce_(x, name, op)
        return x
    total: Tensor = torch.ops.nvrar.all_reduce(x, name, op)
    return total if out is None else _copied(out, total)


def compiled_add_rms_norm(
    name: str,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    residual_out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What :meth:`nvrar.Communicator.all_reduce_add_rms_norm` is to torch.compile."""
    results = torch.ops.nvrar.all_reduce_add_rms_norm(x, residual, weight, eps, name)
    wanted = zip((out, residual_out), results, strict=True)
    first, second = (r if into is None else _copied(into, r) for into, r in wanted)
    return first, second


def _copied(out: Tensor, total: Tensor) -> Tensor:
    if out.shape != total.shape or out.dtype != total.dtype:  # copy_ would broadcast, and convert
        raise ArgumentError(
            f"out is {out.dtype} {tuple(out.shape)}, x is {total.dtype} {tuple(total.shape)}; "
            "they must be equal"
        )
    return out.copy_(total)
