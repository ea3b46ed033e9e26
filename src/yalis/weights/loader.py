# SPDX-License-Identifier: Apache-2.0
"""Which part of which tensor goes where: the layers say, this file carries it out.

A layer that owns a parameter lists its parts; a source can check a tensor's name and shape, and fill a part.
So neither the models nor the sources know how the weights are split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor, as_completed
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
    # Another name, under which some checkpoints have the same tensor, or a copy.
    twin: str | None = None


@runtime_checkable
class HasWeights(Protocol):
    def weight_parts(self, path: str) -> Iterator[WeightPart]:
        """The parts of this layer, which is at `path` in the model: its tensors' path, but for fusion."""
        ...


class WeightSource(Protocol):
    num_threads: int  # that should fill parts at the same time

    def check(self, part: WeightPart) -> None:
        """Raise CheckpointError unless a floating-point tensor of this name and shape is there.

        Where there is a twin too, the two must be equal.
        """
        ...

    def warn_of_others(self, used: Set[str]) -> None:
        """Log a warning when there are tensors beside those of these names that somebody should use."""
        ...

    def fill(self, part: WeightPart) -> None:
        """Write the part's region into its target, in the target's dtype. Threads may do so at once.

        On a GPU it may return before that is done; later work of the default stream comes after it.
        """
        ...


def weight_parts(model: nn.Module) -> Iterator[WeightPart]:
    """Every part of every layer, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, HasWeights):
            yield from module.weight_parts(path)


def check_weights(model: nn.Module, source: WeightSource) -> None:
    """Raise CheckpointError unless `source` has all that `model` needs; warn when it has more.

    The model may be on "meta", but must be all of the model.
    """
    parts = list(weight_parts(model))
    for part in parts:
        source.check(part)
    source.warn_of_others({name for part in parts for name in (part.name, part.twin) if name})


def load_weights(
    model: nn.Module, source: WeightSource, on_progress: Progress | None = None
) -> None:
    """Fill this rank's parameters, converting to their type. Not collective. The first error ends it."""
    parts = [part for part in weight_parts(model) if part.target.numel()]

    def fill(part: WeightPart) -> None:  # mode and device are each thread's own
        device_idx = part.target.device.index if part.target.is_cuda else -1
        with torch.inference_mode(), torch.cuda.device(device_idx):
            source.fill(part)

    with ThreadPoolExecutor(source.num_threads) as pool:
        try:
            futures = [pool.submit(fill, part) for part in parts]
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                if on_progress:
                    on_progress("loading weights", done, len(parts))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if parts and parts[0].target.is_cuda:
        torch.cuda.synchronize(parts[0].target.device)
