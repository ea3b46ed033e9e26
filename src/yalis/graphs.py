# SPDX-License-Identifier: Apache-2.0
"""Steps as CUDA graphs: one for each of some shapes, captured once, replayed for every step.

A batch in between is padded to the next shape. All graphs share one pool of memory, because only one runs
at a time and its results are read before the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from yalis.core import Batch
from yalis.inputs import StepShape, Uploaded
from yalis.weights.loader import Progress

_MOST_DECODES = 256
# Steps of more take a GPU longer than the host takes to launch them.
_CHUNK_TOKENS = (16, 32, 64, 96, 128, 192, *range(256, 1025, 128))
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Computed(NamedTuple):
    """Of each sequence that draws: the likeliest token, and this rank's share of the logits."""

    token_ids: Tensor
    share: Tensor


def decode_shapes(max_num_seqs: int) -> list[StepShape]:
    """Of 1, 2, 4 and multiples of 8 decodes, and `max_num_seqs`; 256 at most."""
    most = min(max_num_seqs, _MOST_DECODES)
    sizes = {most, *(n for n in (1, 2, 4, *range(8, most, 8)) if n < most)}
    return [StepShape(n, n, False) for n in sorted(sizes)]


def chunk_shapes(max_num_seqs: int, max_num_tokens: int) -> list[StepShape]:
    """Of 16 to 1024 tokens, and of the most, in any number of sequences."""
    most = min(max_num_tokens, _CHUNK_TOKENS[-1])
    sizes = {most, *(n for n in _CHUNK_TOKENS if n < most)}
    return [StepShape(n, min(n, max_num_seqs), True) for n in sorted(sizes)]


class StepGraphs:
    """A graph for each shape, and what `compute` returned while it was captured: every replay writes it.

    `upload(shape)` brings a padded batch to where later ones of that shape come too, and `compute` works on
    it: once to compile and allocate what is needed, then to be captured, so without waiting for the device.
    With several ranks they are collective, and so are construction and `replay`.
    """

    def __init__(
        self,
        shapes: Sequence[StepShape],
        upload: Callable[[StepShape], Uploaded],
        compute: Callable[[Uploaded], Computed],
        device: torch.device,
        on_progress: Progress | None = None,
    ) -> None:
        self._shapes = sorted(shapes)
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, Computed]] = {}
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        # The largest first: the others then fit into what it has taken from the pool.
        for done, shape in enumerate(reversed(self._shapes)):
            if on_progress:
                on_progress("capturing graphs", done, len(self._shapes))
            with torch.cuda.stream(stream):
                uploaded = upload(shape)
                compute(uploaded)
            graph = torch.cuda.CUDAGraph()
            # Other threads, NCCL's watchdog among them, may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                result = compute(uploaded)
            self._graphs[shape] = graph, Computed(*map(borrowed, result))
            del result  # its memory may serve the next capture
        torch.cuda.current_stream(device).wait_stream(stream)
        if on_progress:
            on_progress("capturing graphs", len(self._shapes), len(self._shapes))

    def shape_for(self, batch: Batch) -> StepShape | None:
        """To what this batch must be padded; None where no graph serves it."""
        num_seqs = len(batch.slots)
        are_chunks = batch.num_decodes < num_seqs
        num_tokens = batch.num_decodes + sum(batch.num_new)
        for shape in self._shapes:
            fits = num_tokens <= shape.num_tokens and num_seqs <= shape.num_seqs
            if fits and (shape.are_chunks or not are_chunks):  # at equal sizes, of decodes first
                return shape
        return None

    def replay(self, shape: StepShape) -> Computed:
        """Run the graph on the current stream; its results are valid until the next replay of any."""
        graph, result = self._graphs[shape]
        graph.replay()
        return result


def borrowed(tensor: Tensor) -> Tensor:
    """The same memory, which this tensor does not keep: it is the graphs' as long as their pool lives.

    Else the logits of every graph would lie beside each other, a gigabyte for a large vocabulary.
    """
    bits = tensor.view(_INTEGERS[tensor.itemsize])
    same = torch.as_tensor(_Borrowed(bits.__cuda_array_interface__), device=tensor.device)
    return same.view(tensor.dtype)


class _Borrowed:
    """Speaks for memory by the protocol that array libraries share it by, and owns none."""

    def __init__(self, interface: dict[str, object]) -> None:
        self.__cuda_array_interface__ = interface


def num_bytes_of_graphs(
    shapes: Sequence[StepShape],
    capture: Callable[[Sequence[StepShape]], StepGraphs],
    device: torch.device,
) -> int:
    """What graphs of `shapes`, ascending, will take of the device's memory. Collective where capturing is.

    Found by capturing the largest, then the two largest, and letting go of them.
    """
    kept = [capture(shapes[-1:])]  # takes what is taken once: workspaces, and room for machine code
    taken = []
    for some in (shapes[-1:], shapes[-2:]):
        before, _ = torch.cuda.mem_get_info(device)
        kept.append(capture(some))
        after, _ = torch.cuda.mem_get_info(device)
        taken.append(before - after)
    # All but the largest find their activations in what it has taken.
    return taken[0] + (len(shapes) - 1) * max(taken[1] - taken[0], 0)
