# SPDX-License-Identifier: Apache-2.0
"""What a layer must know of the other ranks: its place among them, and two verbs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from yalis.parallel.all_reduce import AllReduce, NoAllReduce


@dataclass(frozen=True)
class TensorParallel:
    """One rank's place in its tensor-parallel group; passed to whoever needs it, kept by nobody else."""

    rank: int
    size: int
    all_reduce: AllReduce
    group: dist.ProcessGroup | None = None

    @classmethod
    def single(cls) -> TensorParallel:
        return cls(0, 1, NoAllReduce())

    def gather(self, x: Tensor) -> Tensor | None:
        """The ranks' `x` side by side along the last dimension, on rank 0; None elsewhere. Collective."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x, parts, group=self.group, group_dst=0)
        return torch.cat(parts, dim=-1) if parts is not None else None


@dataclass(frozen=True)
class Placement:
    """Where a layer's part of the weights lives, and in what type."""

    tp: TensorParallel
    dtype: torch.dtype
    device: torch.device

    def empty(self, *shape: int) -> torch.nn.Parameter:
        data = torch.empty(shape, dtype=self.dtype, device=self.device)
        return torch.nn.Parameter(data, requires_grad=False)
