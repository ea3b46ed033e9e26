# SPDX-License-Identifier: Apache-2.0
"""What a layer must know of the other ranks: its place among them, and two verbs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

from yalis.parallel.all_reduce import AllReduce, AllReduceSwitch, NoAllReduce, make_all_reduce
from yalis.parallel.meeting import together

# Of torch's collectives: it bounds a hang, not a delay.
_GROUP_TIMEOUT = timedelta(minutes=5)


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

    @classmethod
    def over(
        cls,
        group: dist.ProcessGroup,
        all_reduce: str,
        plan: str,
        nodes: tuple[int, int] | None,
        *,
        is_batch_invariant: bool = False,
    ) -> TensorParallel:
        """This process's place in `group`. Collective. See `make_all_reduce` for the rest."""
        make = partial(
            make_all_reduce,
            group=group,
            nodes=nodes,
            plan=plan,
            is_batch_invariant=is_batch_invariant,
        )
        return cls(group.rank(), group.size(), AllReduceSwitch(make, all_reduce), group)

    def choose_all_reduce(self, name: str) -> None:
        """Use this backend from now on. Collective. A single rank has none, whatever its name."""
        if isinstance(self.all_reduce, AllReduceSwitch):
            self.all_reduce.choose(name)

    def gather(self, x: Tensor) -> Tensor | None:
        """The ranks' `x` side by side along the last dimension, on rank 0; None elsewhere. Collective."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x, parts, group=self.group, group_dst=0)
        return torch.cat(parts, dim=-1) if parts is not None else None

    def broadcast(self, x: Tensor) -> None:
        """Make `x` rank 0's on every rank, in place. Collective."""
        if self.size > 1:
            dist.broadcast(x, group=self.group, group_src=0)

    def barrier(self) -> None:
        """Wait for the other ranks. Collective."""
        if self.size > 1:
            dist.barrier(self.group)

    def together(self, phase: str) -> AbstractContextManager[None]:
        """A block that all ranks leave together, however slow one is. See `meeting.together`. Collective."""
        return nullcontext() if self.group is None else together(self.group, phase)

    def minimum(self, value: int, device: torch.device) -> int:
        """The ranks' least `value`. Collective; waits for the device."""
        if self.size == 1:
            return value
        least = torch.tensor(value, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
        return int(least)


def open_store(host: str, port: int, *, is_host: bool) -> TCPStore:
    """The place where ranks first meet. One process hosts it, and port 0 lets it choose a free one."""
    return TCPStore(host, port, is_master=is_host, wait_for_workers=False, timeout=_GROUP_TIMEOUT)


def join_default_group(
    store: Store | None, rank: int, world_size: int, device: torch.device
) -> dist.ProcessGroup:
    """torch's default group with the backend that carries `device`'s tensors. Collective.

    Without a store the ranks meet where the launcher's variables say.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=_GROUP_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    group = dist.group.WORLD
    assert group is not None  # it was made just above
    return group


@dataclass(frozen=True)
class Placement:
    """Where a layer's part of the weights lives, in what type, and whether products of it with a token must
    have the same bits whatever other tokens are beside it.
    """

    tp: TensorParallel
    dtype: torch.dtype
    device: torch.device
    is_batch_invariant: bool = False

    def empty(self, *shape: int) -> torch.nn.Parameter:
        data = torch.empty(shape, dtype=self.dtype, device=self.device)
        return torch.nn.Parameter(data, requires_grad=False)
