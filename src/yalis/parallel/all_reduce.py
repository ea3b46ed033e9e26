# SPDX-License-Identifier: Apache-2.0
"""How partial sums meet: one verb, and what stands behind it.

The protocol is all that a layer knows, so a backend is swapped by a word in the options. Backends derive
from it for `add_rms_norm`, which they replace where they can do all of it at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

import nvrar
from yalis.errors import ConfigError
from yalis.layers import functional

SYMM_MEM_ALL_REDUCES = ("symm-one-shot", "symm-two-shot")
ALL_REDUCES = ("nvrar", "torch", *SYMM_MEM_ALL_REDUCES)


class AllReduce(Protocol):
    """Sums a tensor over the ranks of the tensor-parallel group."""

    @property
    def max_bytes(self) -> int:
        """Larger messages are left to torch's backend, which sets no time limit to what a graph replays."""
        return sys.maxsize

    def __call__(self, x: Tensor) -> Tensor:
        """The sum over all ranks, of `x`'s shape and dtype, the same bits on every rank.

        May overwrite `x` and return it. Collective: every rank calls it in the same order with the
        same shape. Raises when a peer is gone; the partial sum is then never returned.
        """
        ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """`(normed, s)`: s is the sum of all ranks' `x`, plus `residual`; normed its RMSNorm.

        `x` and `residual` `[num_tokens, size]` and `weight` `[size]`, of one dtype; `residual` is equal on
        all ranks, as the results are. Bits: the sum over ranks is rounded to the dtype, s is rounded, and
        normed is `functional.rms_norm` of that. Collective, like the call; may overwrite `x`.
        """
        return functional.add_rms_norm(self(x), residual, weight, eps)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Get ready for messages of `dtype` of any size, so that calls can be captured in a CUDA graph."""
        return

    def check(self) -> None:
        """Raise where a call that has run on the device found a peer gone: its result was NaN. Local, any
        thread, waits for nothing. For callers who have waited for results, of graphs' replays above all.
        """
        return

    def describe(self) -> dict[str, Any]:
        """What runs, and how often it has run on this rank: for reports and tests."""
        ...

    def close(self) -> None: ...


class NoAllReduce(AllReduce):
    """One rank: the sum is the value itself."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def describe(self) -> dict[str, Any]:
        return {"backend": "none"}

    def close(self) -> None:
        pass


class TorchAllReduce(AllReduce):
    """`torch.distributed.all_reduce`: gloo on CPU, NCCL on CUDA. The peer that nvrar is measured by."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._num_calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self._num_calls += 1
        dist.all_reduce(x, group=self._group)
        return x

    def describe(self) -> dict[str, Any]:
        return {"backend": "torch", "calls": self._num_calls}

    def close(self) -> None:
        pass


class NvrarAllReduce(AllReduce):
    """`nvrar.Communicator`, in place."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        nodes: tuple[int, int] | None,
        plan: str,
        *,
        deterministic: bool = False,
    ) -> None:
        topology = None  # nvrar detects it from the launcher's variables or the host names
        if nodes is not None:
            topology = nvrar.Topology(num_nodes=nodes[0], ranks_per_node=nodes[1])
        self._communicator = nvrar.Communicator(
            group=group, topology=topology, plan=plan, deterministic=deterministic
        )

    @property
    def max_bytes(self) -> int:
        return self._communicator.max_bytes

    def __call__(self, x: Tensor) -> Tensor:
        return self._communicator.all_reduce(x, out=x)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if not x.is_cuda:
            return super().add_rms_norm(x, residual, weight, eps)
        return self._communicator.all_reduce_add_rms_norm(x, residual, weight, eps, out=x)

    def warm_up(self, dtype: torch.dtype) -> None:
        most = self._communicator.max_bytes
        sizes = [*(1 << exponent for exponent in range(most.bit_length())), most]
        self._communicator.warmup(sizes, dtype, norm=True)

    def check(self) -> None:
        self._communicator.check(wait=False)

    def describe(self) -> dict[str, Any]:
        stats = self._communicator.stats
        return {
            "backend": "nvrar",
            "communicator": repr(self._communicator),  # the link that carries it, too
            "calls": stats.calls,
            "fallbacks": dict(stats.fallbacks),
        }

    def close(self) -> None:
        self._communicator.close()


class BatchInvariantAllReduce(NvrarAllReduce):
    """The same, with bits of a row that do not depend on the number of rows.

    Raises ConfigError at a call which only torch's all-reduce could do, whose bits do.
    """

    def __init__(self, group: dist.ProcessGroup, nodes: tuple[int, int] | None, plan: str) -> None:
        super().__init__(group, nodes, plan, deterministic=True)

    def __call__(self, x: Tensor) -> Tensor:
        for part in torch.split(x, self._most_rows(x)):
            super().__call__(part)
        self._require_no_fallback()
        return x

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        most = self._most_rows(x)
        parts = zip(torch.split(x, most), torch.split(residual, most), strict=True)
        results = [
            super(BatchInvariantAllReduce, self).add_rms_norm(*p, weight, eps) for p in parts
        ]
        self._require_no_fallback()
        if len(results) == 1:
            return results[0]
        normed, total = zip(*results, strict=True)
        return torch.cat(normed), torch.cat(total)

    def _most_rows(self, x: Tensor) -> int:
        """How many to sum at once: nvrar leaves messages above max_bytes to torch."""
        return max(self._communicator.max_bytes * len(x) // max(x.nbytes, 1), 1)

    def _require_no_fallback(self) -> None:
        reason = next(iter(self._communicator.stats.fallbacks), None)
        if reason is not None:
            raise ConfigError(
                "batch_invariant is set, but nvrar leaves sums to torch, whose bits depend on the size of a "
                f"message: {reason}; leave batch_invariant out, or see what `nvrar info` says is missing"
            )


class AllReduceSwitch(AllReduce):
    """One of several backends, chosen while the model stays: to measure them side by side.

    `make` gives the backend of a name and is collective; each is made when first chosen.
    """

    def __init__(self, make: Callable[[str], AllReduce], name: str) -> None:
        self._make = make
        self._made: dict[str, AllReduce] = {}
        self.choose(name)

    def choose(self, name: str) -> None:
        """Use `name` from now on. Collective. Graphs that were captured keep what they were captured with."""
        if name not in self._made:
            self._made[name] = self._make(name)
        self._chosen = self._made[name]

    @property
    def max_bytes(self) -> int:
        return self._chosen.max_bytes

    def __call__(self, x: Tensor) -> Tensor:
        return self._chosen(x)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return self._chosen.add_rms_norm(x, residual, weight, eps)

    def warm_up(self, dtype: torch.dtype) -> None:
        self._chosen.warm_up(dtype)

    def check(self) -> None:
        self._chosen.check()

    def describe(self) -> dict[str, Any]:
        return self._chosen.describe()

    def close(self) -> None:
        for made in self._made.values():
            made.close()


def make_all_reduce(
    name: str,
    *,
    group: dist.ProcessGroup,
    nodes: tuple[int, int] | None,
    plan: str,
    is_batch_invariant: bool = False,
) -> AllReduce:
    """The backend called `name` over `group`. Collective. `nodes` is (num_nodes, ranks_per_node).

    Of those, nvrar alone can be batch invariant.
    """
    if name == "torch":
        return TorchAllReduce(group)
    if name in SYMM_MEM_ALL_REDUCES:
        from yalis.parallel.symm_mem import SymmMemAllReduce  # which derives from AllReduce

        return SymmMemAllReduce(name, group)
    if is_batch_invariant:
        return BatchInvariantAllReduce(group, nodes, plan)
    return NvrarAllReduce(group, nodes, plan)
