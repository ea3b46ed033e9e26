# SPDX-License-Identifier: Apache-2.0
"""Decode steps as CUDA graphs: one for each of some numbers of rows, captured once, replayed for every step.

A batch in between is padded to the next number. All graphs share one pool of memory, because only one runs
at a time and its results are read before the next.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from yalis.core import Batch
from yalis.inputs import Uploaded
from yalis.weights.loader import Progress

_MOST_ROWS = 256
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Decoded(NamedTuple):
    """Of each row of a step of decodes: the likeliest token, and this rank's share of the logits."""

    token_ids: Tensor
    share: Tensor


def capture_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """The numbers of rows to capture, ascending: 1, 2, 4, multiples of 8 up to 256, and `max_num_seqs`."""
    most = min(max_num_seqs, _MOST_ROWS)
    return tuple(sorted({most, *(n for n in (1, 2, 4, *range(8, most, 8)) if n < most)}))


class DecodeGraphs:
    """A graph for each of `sizes`, and what `compute` returned while it was captured: every replay writes it.

    `upload(num_rows)` brings a padded batch to where later ones of that size come too, and `compute` works on
    it: once to compile and allocate what is needed, then to be captured, so without waiting for the device.
    With several ranks they are collective, and so are construction and `replay`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        upload: Callable[[int], Uploaded],
        compute: Callable[[Uploaded], Decoded],
        device: torch.device,
        on_progress: Progress | None = None,
    ) -> None:
        self._sizes = sorted(sizes)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Decoded]] = {}
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        # The largest first: the others then fit into what it has taken from the pool.
        for done, size in enumerate(reversed(self._sizes)):
            if on_progress:
                on_progress("capturing graphs", done, len(self._sizes))
            with torch.cuda.stream(stream):
                uploaded = upload(size)
                compute(uploaded)
            graph = torch.cuda.CUDAGraph()
            # Other threads, NCCL's watchdog among them, may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                result = compute(uploaded)
            self._graphs[size] = graph, Decoded(*map(borrowed, result))
            del result  # its memory may serve the next capture
        torch.cuda.current_stream(device).wait_stream(stream)
        if on_progress:
            on_progress("capturing graphs", len(self._sizes), len(self._sizes))

    def num_rows_for(self, batch: Batch) -> int | None:
        """To how many rows this batch must be padded; None where no graph serves it."""
        num_seqs = len(batch.slots)
        if batch.num_decodes < num_seqs or num_seqs > self._sizes[-1]:
            return None
        return self._sizes[bisect_left(self._sizes, num_seqs)]

    def replay(self, num_rows: int) -> Decoded:
        """Run the graph on the current stream; its results are valid until the next replay of any."""
        graph, result = self._graphs[num_rows]
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
    sizes: Sequence[int], capture: Callable[[Sequence[int]], DecodeGraphs], device: torch.device
) -> int:
    """What graphs of `sizes`, ascending, will take of the device's memory: by capturing the largest, then the
    two largest, and letting go of them. Collective where capturing is.
    """
    kept = [capture(sizes[-1:])]  # takes what is taken once: workspaces, and room for machine code
    taken = []
    for some in (sizes[-1:], sizes[-2:]):
        before, _ = torch.cuda.mem_get_info(device)
        kept.append(capture(some))
        after, _ = torch.cuda.mem_get_info(device)
        taken.append(before - after)
    # All but the largest find their activations in what it has taken.
    return taken[0] + (len(sizes) - 1) * max(taken[1] - taken[0], 0)
