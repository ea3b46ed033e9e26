# SPDX-License-Identifier: Apache-2.0
"""Who carries out a call: an executor, by which plan, or torch, and then why.

Every answer is a pure function of the call and of what the ranks agreed on; so it is the same on all ranks
that make the same call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nvrar import host
from nvrar.table import bucket
from nvrar.tune import Choice, Chooser

if TYPE_CHECKING:
    from torch import Tensor

FASTER_BY_TORCH = "sizes at which the measured table has torch faster"


class Routing:
    """Of one communicator.

    Args:
        chooser: chooses among plans, for a type as it is sent.
        link: what carries the data; see :class:`nvrar.table.Key`.
        max_bytes: larger tensors go to torch.
        wire_dtype: what 16-bit tensors are sent as.
        executor: what carries out calls on CUDA tensors; see :meth:`nvrar.Communicator.executor_for`.
        why_no_gpu: why that is not the GPU's executor.
    """

    def __init__(
        self,
        chooser: Chooser,
        link: str,
        max_bytes: int,
        wire_dtype: torch.dtype | None,
        executor: str,
        why_no_gpu: str,
    ) -> None:
        self._chooser, self._link = chooser, link
        self._max_bytes, self._wire_dtype = max_bytes, wire_dtype
        self._executor, self._why_no_gpu = executor, why_no_gpu
        self._too_large = f"messages above max_bytes ({max_bytes})"
        self._choices: dict[tuple[int, torch.dtype], Choice] = {}

    def choice(self, num_bytes: int, dtype: torch.dtype) -> Choice:
        """For a tensor of ``num_bytes``; what is sent may be wider."""
        wire = host.wire_type(dtype, self._wire_dtype)
        key = (bucket(num_bytes * wire.itemsize // dtype.itemsize), wire)
        found = self._choices.get(key)
        if found is None:
            found = self._chooser.choose(key[0], host.type_name(wire), self._link)
            self._choices[key] = found
        return found

    def why_not_host(self, x: Tensor) -> str:
        """Why the host executor does not take ``x``; empty if it does."""
        if x.dtype not in host.DTYPES:
            return f"dtype {x.dtype}"
        if x.device.type != "cpu" and self._executor != "host":
            return f"no executor for {x.device.type} tensors: {self._why_no_gpu}"
        return self.why_torch(x)

    def why_torch(self, x: Tensor) -> str:
        """Why torch's all-reduce takes ``x`` though an executor could; empty if it does not."""
        if x.nbytes > self._max_bytes:
            return self._too_large
        # A table of the GPU's says nothing of tensors on the CPU.
        if self._chooser.tables and (x.is_cuda or self._executor != "gpu"):
            return FASTER_BY_TORCH if self.choice(x.nbytes, x.dtype).by_torch else ""
        return ""
