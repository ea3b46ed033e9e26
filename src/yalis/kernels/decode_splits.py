# SPDX-License-Identifier: Apache-2.0
"""Into which splits the contexts of a batch are cut for programs to share, and where their results wait.

What a token sees, its context or a window of it, is cut into splits of `split` tokens, or so many times
twice as many that a sequence has no more than `most_splits`. Where sequences are many, fewer splits do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from yalis.kernels.launch import begin, launch_options, wait

SPLIT = 256
# Splits of one sequence, those of all its key-value heads together: enough for every multiprocessor.
_MOST_PARTS = 512
EVERYTHING = 1 << 30  # a window of more tokens than any context has


@dataclass(frozen=True)
class DecodeWorkspace:
    """Device memory of the decode kernel, for batches up to a number of sequences and a length of contexts.

    One may serve any number of layers, one after the other, on one stream.
    """

    # By window [max_num_seqs + 1] int32: how many splits the sequences before have.
    split_starts: dict[int | None, Tensor]
    split: int  # tokens of one, or so many times twice as many
    # Of more sequences than these splits are twice as long; None: whatever their number.
    few: int | None
    most_splits: int  # of a sequence
    tickets: Tensor  # [max_num_seqs, num_kv_heads] int32: how many splits are done; zero between launches
    sums: Tensor  # [num_splits, num_heads, head_dim] float32
    norms: Tensor  # [num_splits, num_heads, 2] float32: greatest score and sum of exponentials

    @classmethod
    def allocate(
        cls,
        max_num_seqs: int,
        max_len: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
        *,
        windows: Sequence[int | None] = (None,),
        split: int = SPLIT,
        most_splits: int | None = None,
        few: int | None = None,
    ) -> DecodeWorkspace:
        """For layers with these windows: how many tokens one sees, itself included, or None for all."""
        most_splits = most_splits or max(_MOST_PARTS // num_kv_heads, 1)
        num_splits = max_num_seqs * min(triton.cdiv(max_len, split), most_splits)
        f32, i32 = torch.float32, torch.int32
        return cls(
            {w: torch.zeros(max_num_seqs + 1, dtype=i32, device=device) for w in set(windows)},
            split,
            few,
            most_splits,
            torch.zeros((max_num_seqs, num_kv_heads), dtype=i32, device=device),
            torch.empty((num_splits, num_heads, head_dim), dtype=f32, device=device),
            torch.empty((num_splits, num_heads, 2), dtype=f32, device=device),
        )

    def split_for(self, num_seqs: int) -> int:
        """How long splits begin with a batch of so many sequences, padding included."""
        return self.split if self.few is None or num_seqs <= self.few else 2 * self.split

    @property
    def room(self) -> int:
        """How many sequences kernels look through: a power of two, the same for all batches."""
        most: int = triton.next_power_of_2(self.tickets.shape[0])
        return most


def plan_decode(query_starts: Tensor, seq_lens: Tensor, workspace: DecodeWorkspace) -> None:
    """Count the splits of each sequence, for every window; once a step, before the layers. Capturable.

    query_starts `[num_seqs + 1]` and seq_lens `[num_seqs]`, int32, as `decode_attention` takes them.
    """
    split = workspace.split_for(len(seq_lens))
    for window, split_starts in workspace.split_starts.items():
        _plan_kernel[(1,)](
            query_starts, seq_lens, split_starts, seq_lens.shape[0], window or EVERYTHING,
            SPLIT=split, MOST_SPLITS=workspace.most_splits, BLOCK=workspace.room, num_warps=4,
            **launch_options(seq_lens.device),
        )  # fmt: skip


@triton.jit
def split_length(num_seen, SPLIT: tl.constexpr, MOST_SPLITS: tl.constexpr):
    """The length of the splits of so many tokens, which follows from their number alone."""
    length = num_seen * 0 + SPLIT
    for _ in tl.static_range(12):  # up to a million tokens a split
        length = tl.where(num_seen > length * MOST_SPLITS, 2 * length, length)
    return length


# What changes from step to step the compiler does not look at: nothing is compiled while serving.
@triton.jit(do_not_specialize=["num_seqs", "window"])
def _plan_kernel(
    query_starts, seq_lens, split_starts, num_seqs, window,
    SPLIT: tl.constexpr, MOST_SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    wait(PDL)
    seq = tl.arange(0, BLOCK)
    mask = seq < num_seqs
    first = tl.load(query_starts + seq, mask, other=0)
    is_decode = tl.load(query_starts + seq + 1, mask, other=0) - first == 1
    num_seen = tl.minimum(tl.load(seq_lens + seq, mask, other=0), window)
    num_splits = tl.cdiv(num_seen, split_length(num_seen, SPLIT, MOST_SPLITS))
    ends = tl.cumsum(tl.where(is_decode, num_splits, 0), 0)
    tl.store(split_starts + seq + 1, ends, mask)
    tl.store(split_starts, 0)
