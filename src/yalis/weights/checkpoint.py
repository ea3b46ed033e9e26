# SPDX-License-Identifier: Apache-2.0
"""A folder of safetensors, read in place: headers first, then only the regions asked for."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Set
from pathlib import Path

import torch

from yalis.config import DTYPES as COMPUTED
from yalis.config import read_json
from yalis.errors import CheckpointError
from yalis.weights.loader import WeightPart
from yalis.weights.shard import DTYPES, Shard

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Bytes on their way between disk and target, for each thread.
_PORTION = 64 << 20


class Checkpoint:
    """Where each tensor of a checkpoint is. Opening reads the index and every shard's header.

    Raises CheckpointError when the index is damaged, or a shard is missing, truncated or unreadable.
    """

    num_threads = 4

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._file_of = self._read_index()
        self._shards = {name: self._open(name) for name in sorted(set(self._file_of.values()))}

    @property
    def dtype(self) -> str:
        """The type that most of its numbers have; float32 where that is none to compute in."""
        counts: Counter[str] = Counter()
        for shard in self._shards.values():
            for entry in shard.entries.values():
                counts[entry.dtype] += math.prod(entry.shape)
        most = max(counts, key=counts.__getitem__, default="F32")
        name = str(DTYPES.get(most, torch.float32)).removeprefix("torch.")
        return name if name in COMPUTED else "float32"

    def check(self, part: WeightPart) -> None:
        shard, name = self._find(part)
        if part.twin in self._file_of and name != part.twin:
            other = self._shard_of(part.twin, part.shape)
            if not _are_equal(shard, name, other, part.twin):
                raise CheckpointError(
                    f"{self._folder}: config.json ties {part.twin} to {name} (tie_word_embeddings), but the "
                    "checkpoint has both, and they differ; set tie_word_embeddings to false to use both"
                )

    def warn_of_others(self, used: Set[str]) -> None:
        """Log a warning when there are tensors that no layer uses: config.json may be another model's."""
        others = sorted(
            name
            for name in self._file_of.keys() - used
            if not name.endswith(".rotary_emb.inv_freq")  # tables that old checkpoints carry along
        )
        if others:
            logging.getLogger("yalis").warning(
                "%s holds %d tensors that config.json gives no place (%s), and they are left out; "
                "see whether the two belong together",
                self._folder,
                len(others),
                ", ".join(others[:3]) + (", ..." if len(others) > 3 else ""),
            )

    def fill(self, part: WeightPart) -> None:
        shard, name = self._find(part)
        dtype = shard.dtype(name)
        target, (rows, *others) = part.target, part.region
        if target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous():
            shard.read_into(target, name, part.region)
            return
        is_gpu = target.device.type == "cuda"
        row_bytes = max(1, target[0].numel() * dtype.itemsize)
        num_rows = max(1, _PORTION // row_bytes)
        for some in torch.split(target, num_rows):
            # Pinned memory comes from torch's cache, which keeps it until the copy is done.
            portion = torch.empty(some.shape, dtype=dtype, pin_memory=is_gpu)
            region = (slice(rows.start, rows.start + len(some)), *others)
            shard.read_into(portion, name, region)
            if is_gpu and dtype != target.dtype:  # to convert on the GPU
                portion = portion.to(target.device, non_blocking=True)
            some.copy_(portion, non_blocking=True)
            rows = slice(region[0].stop, rows.stop)

    def _find(self, part: WeightPart) -> tuple[Shard, str]:
        """Where the part's tensor is, and under which of its names."""
        is_elsewhere = part.twin in self._file_of and part.name not in self._file_of
        name = part.twin if part.twin and is_elsewhere else part.name
        return self._shard_of(name, part.shape), name

    def _shard_of(self, name: str, shape: tuple[int, ...]) -> Shard:
        file_name = self._file_of.get(name)
        if file_name is None:
            raise CheckpointError(
                f"{self._folder}: tensor {name} is missing; config.json asks for it with shape "
                f"{list(shape)}. Fetch the checkpoint again, or mend config.json"
            )
        shard = self._shards[file_name]
        path, entry = shard.path, shard.entries.get(name)
        if entry is None:
            raise CheckpointError(
                f"{path} does not hold tensor {name}, though {_INDEX} says so; fetch both again"
            )
        if entry.shape != shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(entry.shape)}, where config.json asks "
                f"for {list(shape)}; fetch both again, they do not belong together"
            )
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name} has dtype {entry.dtype}; supported: {', '.join(DTYPES)}. "
                "Use a checkpoint that is not quantised"
            )
        return shard

    def _read_index(self) -> dict[str, str]:
        index = self._folder / _INDEX
        if index.exists():
            file_of = read_json(index).get("weight_map")
            if (
                not isinstance(file_of, dict)
                or not file_of
                or not all(map(_is_name, file_of.values()))
            ):
                raise CheckpointError(
                    f'{index} has no "weight_map" from tensor names to shard files; fetch it again'
                )
            return file_of
        if (self._folder / _SINGLE).exists():
            return dict.fromkeys(self._open(_SINGLE).entries, _SINGLE)
        raise CheckpointError(
            f"{self._folder} has neither {_SINGLE} nor {_INDEX}; only safetensors checkpoints are read, as "
            "transformers' save_pretrained writes them. For random weights of the same shape use "
            'load_format="dummy"'
        )

    def _open(self, name: str) -> Shard:
        path = self._folder / name
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing, though {_INDEX} names it; fetch the shard again"
            )
        return Shard(path)


def _are_equal(one: Shard, one_name: str, other: Shard, other_name: str) -> bool:
    """Whether two matrices of one shape hold the same numbers."""
    height, width = one.entries[one_name].shape
    num_rows = max(1, _PORTION // (8 * width))
    for start in range(0, height, num_rows):
        region = (slice(start, min(start + num_rows, height)), slice(0, width))
        a, b = one.read(one_name, region), other.read(other_name, region)
        both = torch.promote_types(a.dtype, b.dtype)
        if not torch.equal(a.to(both), b.to(both)):
            return False
    return True


def _is_name(value: object) -> bool:
    # A shard lives beside its index: a path that leads elsewhere is a damaged or hostile index.
    return isinstance(value, str) and value == Path(value).name
