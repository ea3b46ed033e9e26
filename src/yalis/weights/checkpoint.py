# SPDX-License-Identifier: Apache-2.0
"""A folder of safetensors, read in place: headers first, then only the regions asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from yalis.config import read_json
from yalis.errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATING = ("F16", "BF16", "F32", "F64")


class Checkpoint:
    """Where each tensor of a checkpoint is. Opening reads the index and every shard's header.

    Raises CheckpointError when the index is damaged, or a shard is missing, truncated or unreadable.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._file_of = self._read_index()
        self._files = {name: self._open(name) for name in sorted(set(self._file_of.values()))}
        self._names_in = {name: frozenset(file.keys()) for name, file in self._files.items()}

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        file_name = self._file_of.get(name)
        if file_name is None:
            raise CheckpointError(
                f"{self._folder}: tensor {name} is missing; config.json asks for it with shape "
                f"{list(shape)}. Fetch the checkpoint again, or mend config.json"
            )
        path = self._folder / file_name
        if name not in self._names_in[file_name]:
            raise CheckpointError(
                f"{path} does not hold tensor {name}, though {_INDEX} says so; fetch both again"
            )
        header = self._files[file_name].get_slice(name)
        if tuple(header.get_shape()) != shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(header.get_shape())}, where config.json asks "
                f"for {list(shape)}; fetch both again, they do not belong together"
            )
        if header.get_dtype() not in _FLOATING:
            raise CheckpointError(
                f"{path}: tensor {name} has dtype {header.get_dtype()}; supported: "
                f"{', '.join(_FLOATING)}. Use a checkpoint that is not quantised"
            )

    def read(self, name: str, shape: tuple[int, ...], region: tuple[slice, ...]) -> Tensor:
        self.check(name, shape)
        path = self._folder / self._file_of[name]
        try:
            tensor: Tensor = self._files[self._file_of[name]].get_slice(name)[region]
            return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read ({error})") from None

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
            return dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)
        raise CheckpointError(
            f"{self._folder} has neither {_SINGLE} nor {_INDEX}; only safetensors checkpoints are read. "
            'For random weights of the same shape use load_format="dummy"'
        )

    def _open(self, name: str) -> Any:
        path = self._folder / name
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing, though {_INDEX} names it; fetch the shard again"
            )
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size
            raise CheckpointError(
                f"{path} ({size} bytes) is truncated or damaged ({error}); fetch the shard again"
            ) from None


def _is_name(value: object) -> bool:
    # A shard lives beside its index: a path that leads elsewhere is a damaged or hostile index.
    return isinstance(value, str) and value == Path(value).name
