# SPDX-License-Identifier: Apache-2.0
"""What each slot's request has said so far, on the device, and the penalties for saying it again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Penalties:
    """Counts of tokens by slot and token id: `[max_num_seqs, vocab]`, 5 bytes each.

    They are allocated when the first request needs them. Rows of a batch come as a table `[m, 5]` float64:
    row, slot, repetition, presence and frequency penalty. Nothing here waits for the device.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._shape, self._device = (max_num_seqs, vocab_size), device
        self._is_in_prompt: Tensor | None = None
        self._num_in_output: Tensor | None = None

    def start(self, slot: int, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Forget the slot's former request and begin with these tokens."""
        is_in_prompt, num_in_output = self._state()
        is_in_prompt[slot].zero_().index_fill_(0, self._indices(prompt_ids), True)
        output = self._indices(output_ids)
        num_in_output[slot].zero_().scatter_add_(
            0, output, torch.ones_like(output, dtype=torch.int32)
        )

    def apply_(self, logits: Tensor, table: Tensor) -> None:
        """Change the rows of the float32 logits that the table names, as vLLM and transformers do."""
        is_in_prompt, num_in_output = self._state()
        row, slot = table[:, :2].long().unbind(dim=1)
        repetition, presence, frequency = torch.split(table[:, 2:].float(), 1, dim=1)
        counts = num_in_output.index_select(0, slot)
        is_seen = (counts > 0) | is_in_prompt.index_select(0, slot)
        before = logits.index_select(0, row)
        scaled = torch.where(before > 0, before / repetition, before * repetition)
        after = torch.where(is_seen, scaled, before) - frequency * counts - presence * (counts > 0)
        logits.index_copy_(0, row, after)

    def add(self, table: Tensor, token_ids: Tensor) -> None:
        """Count the token that each of these rows has drawn; `token_ids` `[n]` are the batch's."""
        _, num_in_output = self._state()
        row, slot = table[:, :2].long().unbind(dim=1)
        places = slot * self._shape[1] + token_ids.index_select(0, row)
        num_in_output.view(-1).scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32))

    def _state(self) -> tuple[Tensor, Tensor]:
        if self._is_in_prompt is None or self._num_in_output is None:
            self._is_in_prompt = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
            self._num_in_output = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        return self._is_in_prompt, self._num_in_output

    def _indices(self, token_ids: Sequence[int]) -> Tensor:
        is_gpu = self._device.type == "cuda"
        host = torch.tensor(token_ids, dtype=torch.int64, pin_memory=is_gpu)
        return host.to(self._device, non_blocking=True)
