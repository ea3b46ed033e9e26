# SPDX-License-Identifier: Apache-2.0
"""One safetensors file, of which regions of tensors are read straight into memory that is already there.

The library checks the file. It would read through a mapping, one thread at a time; reads at an offset go on
in several threads, into pinned memory too, so that the disk is what bounds them.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from yalis.errors import CheckpointError

# Of what the format can hold, the types that weights are read from.
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Entry:
    """A tensor in the file: its dtype in the format's words, and where its first byte is."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class Shard:
    """What a file holds. Raises CheckpointError when it is truncated or damaged. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # checks every offset and the file's length
                pass
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); make it readable, or fetch the shard again"
            ) from None
        except (SafetensorError, ValueError) as error:
            num_bytes = path.stat().st_size
            raise CheckpointError(
                f"{path} ({num_bytes} bytes) is truncated or damaged ({error}); fetch the shard again"
            ) from None
        self.entries = {
            name: Entry(raw["dtype"], tuple(raw["shape"]), 8 + size + raw["data_offsets"][0])
            for name, raw in header.items()
            if name != "__metadata__"
        }

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.entries[name].dtype]

    def read(self, name: str, region: tuple[slice, ...]) -> Tensor:
        """A region of a tensor, in its dtype, on the CPU."""
        out = torch.empty([part.stop - part.start for part in region], dtype=self.dtype(name))
        self.read_into(out, name, region)
        return out

    def read_into(self, out: Tensor, name: str, region: tuple[slice, ...]) -> None:
        """Fill `out`, contiguous and on the CPU, of the tensor's dtype and the region's shape."""
        rows, columns = (slice(0, 1), *region)[-2:]  # a vector is one row
        entry, size = self.entries[name], out.element_size()
        width = entry.shape[-1] * size
        first = entry.offset + rows.start * width + columns.start * size
        memory = memoryview(cast("bytes", out.view(-1).view(torch.uint8).numpy()))
        try:
            with self.path.open("rb", buffering=0) as file:
                if len(memory) == (rows.stop - rows.start) * width:
                    return self._read(file.fileno(), memory, first, name)
                # Pieces of rows: their neighbours are other ranks', who want them as soon, so fetch whole
                # rows from the disk, in one go.
                if sys.platform == "linux":
                    length = (rows.stop - rows.start) * width
                    os.posix_fadvise(file.fileno(), first, length, os.POSIX_FADV_WILLNEED)
                piece = len(memory) // (rows.stop - rows.start)
                for start in range(0, len(memory), piece):
                    self._read(file.fileno(), memory[start : start + piece], first, name)
                    first += width
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {name} cannot be read ({error})") from None

    def _read(self, file: int, memory: memoryview, offset: int, name: str) -> None:
        while memory:
            num_bytes = os.preadv(file, [memory], offset)
            if not num_bytes:
                raise CheckpointError(
                    f"{self.path} ends before tensor {name} does; did it change? Fetch the shard again"
                )
            memory, offset = memory[num_bytes:], offset + num_bytes
