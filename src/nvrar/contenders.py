"""Who takes part in a comparison of all-reduces: torch's own, and communicators with a plan each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nvrar.communicator import Communicator
from nvrar.errors import PeerTimeout
from nvrar.plan import Plan
from nvrar.topology import Topology

BASELINE = "torch"
_TORCH_OPS = {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Contender(Protocol):
    """Something that all-reduces."""

    name: str

    def all_reduce(self, x: Tensor, op: str) -> None:
        """Reduces ``x`` in place. Collective."""

    def plan_for(self, num_bytes: int, dtype: torch.dtype) -> Plan | None:
        """The plan that gives its bits; None if another algorithm does."""

    def executor_for(self, device: str) -> str:
        """What does the work on tensors of ``device``, where it does not fall back."""

    def fallbacks(self) -> Mapping[str, int]:
        """How many calls so far something else did instead, by reason."""


def lost(group: dist.ProcessGroup, error: RuntimeError) -> PeerTimeout:
    """The error to raise for one of torch's collectives, which do not say who is missing."""
    return PeerTimeout(
        f"rank {group.rank()} lost another rank in torch.distributed: {str(error).splitlines()[0]}; look "
        "first at what the other ranks said",
        rank=group.rank(),
        peers=(),
    )


class TorchContender:
    """``torch.distributed.all_reduce``: gloo for CPU tensors, NCCL for CUDA tensors."""

    name = BASELINE

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def all_reduce(self, x: Tensor, op: str) -> None:
        try:
            dist.all_reduce(x, _TORCH_OPS.get(op, dist.ReduceOp.SUM), group=self._group)
        except RuntimeError as error:
            raise lost(self._group, error) from error
        if op == "avg":  # gloo has no AVG
            x /= self._group.size()

    def plan_for(self, num_bytes: int, dtype: torch.dtype) -> Plan | None:
        return None

    def executor_for(self, device: str) -> str:
        return "torch.distributed"

    def fallbacks(self) -> Mapping[str, int]:
        return {}


class PlanContender:
    """A communicator, by the name under which its plan was asked for."""

    def __init__(self, name: str, communicator: Communicator) -> None:
        self.name = name
        self._communicator = communicator

    def all_reduce(self, x: Tensor, op: str) -> None:
        self._communicator.all_reduce(x, out=x, op=op)

    def plan_for(self, num_bytes: int, dtype: torch.dtype) -> Plan | None:
        return self._communicator.plan_for(num_bytes, dtype)

    def executor_for(self, device: str) -> str:
        return self._communicator.executor_for(device)

    def fallbacks(self) -> Mapping[str, int]:
        return self._communicator.stats.fallbacks


@contextmanager
def contenders(
    group: dist.ProcessGroup, topology: Topology, plans: Sequence[str], **options: Any
) -> Iterator[list[Contender]]:
    """torch, then a communicator for each of ``plans`` (names, words, ``"auto"``), closed on leaving.

    ``options`` go to :class:`Communicator`; its errors come through. Collective.
    """
    with ExitStack() as stack:
        ours = [
            PlanContender(name, stack.enter_context(Communicator(group, topology, name, **options)))
            for name in dict.fromkeys(plans)
            if name != BASELINE
        ]
        yield [TorchContender(group), *ours]
