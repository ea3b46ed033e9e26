# SPDX-License-Identifier: Apache-2.0
"""Who takes part in a comparison of all-reduces: torch's own, and communicators with a plan each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nvrar.communicator import Communicator
from nvrar.plan import Plan
from nvrar.timing import lost
from nvrar.topology import Topology

BASELINE = "torch"
_TORCH_OPS = {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Contender(Protocol):
    """Something that all-reduces."""

    name: str

    def buffer(self, num_elements: int, dtype: torch.dtype, device: str) -> Tensor:
        """Memory for its input, of the kind that it takes: contents undefined. Collective."""

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        """The reduction, in ``x`` or in another tensor. ``x`` is from :meth:`buffer`. Collective."""

    def plan_for(self, num_bytes: int, dtype: torch.dtype) -> Plan | None:
        """The plan that gives its bits; None if another algorithm does."""

    def executor_for(self, device: str) -> str:
        """What does the work on tensors of ``device``, where it does not fall back."""

    def fallbacks(self) -> Mapping[str, int]:
        """How many calls so far something else did instead, by reason."""


class TorchContender:
    """``torch.distributed.all_reduce``: gloo for CPU tensors, NCCL for CUDA tensors."""

    name = BASELINE

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def buffer(self, num_elements: int, dtype: torch.dtype, device: str) -> Tensor:
        return torch.empty(num_elements, dtype=dtype, device=device)

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        try:
            dist.all_reduce(x, _TORCH_OPS.get(op, dist.ReduceOp.SUM), group=self._group)
        except RuntimeError as error:
            raise lost(self._group, error) from error
        if op == "avg":  # gloo has no AVG
            x /= self._group.size()
        return x

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

    def buffer(self, num_elements: int, dtype: torch.dtype, device: str) -> Tensor:
        return torch.empty(num_elements, dtype=dtype, device=device)

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        return self._communicator.all_reduce(x, out=x, op=op)

    def plan_for(self, num_bytes: int, dtype: torch.dtype) -> Plan | None:
        return self._communicator.plan_for(num_bytes, dtype)

    def executor_for(self, device: str) -> str:
        return self._communicator.executor_for(device)

    def link_for(self, device: str) -> str:
        """See :meth:`Communicator.link_for`; one for all plans."""
        return self._communicator.link_for(device)

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
