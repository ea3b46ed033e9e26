# SPDX-License-Identifier: Apache-2.0
"""Which part of which tensor goes where: the layers say, this file carries it out.

A layer that owns a parameter lists its parts; a source can check a tensor's name and shape, and read
a region of it. So neither the models nor the sources know how the weights are split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, total); must return at once."""


@dataclass(frozen=True)
class WeightPart:
    """The region of one checkpoint tensor that this rank keeps, and the view that it fills."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor in the checkpoint
    region: tuple[slice, ...]  # one slice per dimension, explicit bounds
    target: Tensor


@runtime_checkable
class HasWeights(Protocol):
    def weight_parts(self, path: str) -> Iterator[WeightPart]:
        """The parts of this layer, which is at `path` in the model: its tensors' path, but for fusion."""
        ...


class WeightSource(Protocol):
    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError unless a floating-point tensor of this name and shape is there."""
        ...

    def read(self, name: str, shape: tuple[int, ...], region: tuple[slice, ...]) -> Tensor:
        """That region of the tensor, on the CPU, in the type it is stored in."""
        ...


def weight_parts(model: nn.Module) -> Iterator[WeightPart]:
    """Every part of every layer, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, HasWeights):
            yield from module.weight_parts(path)


def check_weights(model: nn.Module, source: WeightSource) -> None:
    """Raise CheckpointError unless `source` has all that `model` needs. The model may be on "meta"."""
    for part in weight_parts(model):
        source.check(part.name, part.shape)


@torch.inference_mode()
def load_weights(
    model: nn.Module, source: WeightSource, on_progress: Progress | None = None
) -> None:
    """Fill this rank's parameters, converting to their type. Not collective."""
    parts = list(weight_parts(model))
    for done, part in enumerate(parts, start=1):
        if part.target.numel():
            part.target.copy_(source.read(part.name, part.shape, part.region))
        if on_progress:
            on_progress("loading weights", done, len(parts))
