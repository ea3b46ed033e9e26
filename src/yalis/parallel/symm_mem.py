# SPDX-License-Identifier: Apache-2.0
"""torch's own all-reduces over symmetric memory: nvrar's peers within one node.

Each rank copies its part into a buffer that the others can address. One-shot: every rank reads all buffers
and adds. Two-shot: every rank adds its share of the elements and writes the sums into all buffers.
"""

from __future__ import annotations

import socket
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from yalis.errors import ConfigError
from yalis.layers import functional
from yalis.parallel.all_reduce import AllReduce

_MAX_BYTES = 8 << 20


class SymmMemAllReduce(AllReduce):
    """`torch.ops.symm_mem`'s sum of float32 and bfloat16, "symm-one-shot" or "symm-two-shot". Capturable.

    Creation is collective, uses the current CUDA device, and raises ConfigError on every rank where they
    cannot share memory. More than 8 MiB, or an odd number of 16-bit elements, goes to
    `torch.distributed.all_reduce` on the same group, and is counted.
    """

    def __init__(self, name: str, group: dist.ProcessGroup) -> None:
        self._name, self._group = name, group
        self._is_one_shot = name == "symm-one-shot"
        self._num_calls, self._fallbacks = 0, Counter[str]()
        hosts: list[Any] = [None] * group.size()
        dist.all_gather_object(hosts, socket.gethostname(), group=group)
        if len(set(hosts)) > 1:
            raise ConfigError(
                f"all_reduce is {name!r}, which works within one node, but the ranks are on "
                f'{", ".join(sorted(set(hosts)))}; use all_reduce="nvrar" or "torch"'
            )
        buffer, error = open_buffer(group)
        errors: list[Any] = [None] * group.size()
        dist.all_gather_object(errors, error, group=group)
        first = next((error for error in errors if error), None)
        if first is not None or buffer is None:
            raise ConfigError(
                f"all_reduce is {name!r}, but torch cannot share memory between these GPUs ({first}); "
                'use all_reduce="nvrar" or "torch"'
            )
        self._buffer = buffer

    def __call__(self, x: Tensor) -> Tensor:
        total = self._sum(x)
        return x.copy_(total) if self._is_in_buffer(total) else total

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        # The sum is read where it is: only a later call writes there again.
        return functional.add_rms_norm(self._sum(x), residual, weight, eps)

    def describe(self) -> dict[str, Any]:
        return {
            "backend": self._name,
            "calls": self._num_calls,
            "fallbacks": dict(self._fallbacks),
        }

    def close(self) -> None:
        pass

    def _sum(self, x: Tensor) -> Tensor:
        """The sum, in a new tensor, in the buffer, or in `x`."""
        self._num_calls += 1
        reason = why_not(x)
        if reason is not None:
            self._fallbacks[reason] += 1
            dist.all_reduce(x, group=self._group)
            return x
        if not x.numel():
            return x
        place = self._buffer[: x.nbytes].view(x.dtype).view(x.shape)
        operations, group_name = torch.ops.symm_mem, self._group.group_name
        if self._is_one_shot:
            x = x if x.data_ptr() % 16 == 0 else x.clone()  # aligned like the buffer
            out = torch.empty_like(x)
            operations.one_shot_all_reduce_copy_out(place, x, "sum", group_name, out)
            return out
        place.copy_(x)
        operations.two_shot_all_reduce_(place, "sum", group_name)
        return place

    def _is_in_buffer(self, total: Tensor) -> bool:
        return total.data_ptr() == self._buffer.data_ptr()


def why_not(x: Tensor) -> str | None:
    """Why torch's kernels cannot sum this, equal on all ranks; None if they can."""
    if x.nbytes > _MAX_BYTES:
        return f"more than {_MAX_BYTES} bytes"
    if x.nbytes % 4:
        return "an odd number of 16-bit elements"
    return None


def require_symm_mem(name: str, device_type: str, dtype: str) -> None:
    """Raise ConfigError where this host's devices, or the model's dtype, rule it out."""
    if device_type != "cuda":
        raise ConfigError(
            f"all_reduce is {name!r}, which needs CUDA symmetric memory, and the device is "
            f'{device_type}; use all_reduce="nvrar" or "torch"'
        )
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(
            f"all_reduce is {name!r}, which adds float32 and bfloat16, and dtype is {dtype}; "
            'use dtype="bfloat16", or all_reduce="nvrar" or "torch"'
        )


def open_buffer(group: dist.ProcessGroup) -> tuple[Tensor | None, str]:
    """This rank's buffer, which the others of `group` can address, or why there is none. Collective."""
    try:
        import torch.distributed._symmetric_memory as symm_mem

        device = torch.device("cuda", torch.cuda.current_device())
        buffer = symm_mem.empty(_MAX_BYTES, dtype=torch.uint8, device=device)
        symm_mem.rendezvous(buffer, group)
        return buffer, ""
    except (ImportError, RuntimeError, AssertionError) as error:
        return None, str(error).partition("\n")[0] or type(error).__name__
