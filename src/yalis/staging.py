# SPDX-License-Identifier: Apache-2.0
"""From the host to a device and back without waiting.

Pinned memory comes from torch's own cache, which hands none out again before the copy from or to it is done.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGN = 4  # int32


class Staging:
    """Small int32 arrays of the host, laid end to end, to one place on the device by one copy.

    The place moves only when more is uploaded than ever before, and more than `capacity` in `num_parts`.
    """

    def __init__(self, capacity: int, num_parts: int, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        size = capacity + num_parts * _ALIGN
        self._on_device = torch.empty(size, dtype=torch.int32, device=device)

    def upload(self, parts: Sequence[NDArray[np.int32]]) -> list[Tensor]:
        """Each part as a tensor on the device: valid, in stream order, until the next upload.

        Parts begin at multiples of 16 bytes: kernels are compiled for aligned pointers.
        """
        rooms = [-(-len(part) // _ALIGN) * _ALIGN for part in parts]
        total = sum(rooms)
        if total > len(self._on_device):
            self._on_device = self._on_device.new_empty(max(total, 2 * len(self._on_device)))
        host = torch.empty(total, dtype=torch.int32, pin_memory=self._is_cuda)
        on_device = self._on_device[:total]
        numbers, start = host.numpy(), 0
        for part, room in zip(parts, rooms, strict=True):
            numbers[start : start + len(part)] = part
            start += room
        on_device.copy_(host, non_blocking=True)
        placed = torch.split(on_device, rooms)
        return [room[: len(part)] for part, room in zip(parts, placed, strict=True)]


class Download:
    """A tensor on its way to the host. On CUDA the copy follows what is on the current stream."""

    def __init__(self, tensor: Tensor) -> None:
        self._event = None
        self._host = tensor
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> Tensor:
        """The tensor on the host, once the device has written it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
