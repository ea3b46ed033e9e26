# SPDX-License-Identifier: Apache-2.0
"""Which sequences the next step works on. Thinks in requests; pure Python.

The policy: every running sequence that can draw gets its next token, then prompts under way get their next
chunk, then waiting sequences are admitted in order of arrival, all within one budget of tokens. An admitted
sequence holds blocks for all its known tokens at once, so a prompt under way never waits for memory. When a
decode needs a block and none is free, the sequence admitted last gives its blocks back and waits, first in
line. It loses no token: those it has drawn are computed again, mostly from blocks that are still kept.

A step is scheduled before the one before it has brought its tokens. Blocks and slots that are given back may
be handed out at once although a step that uses them is still under way: every rank runs the steps in order,
so whoever writes there next does so afterwards.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from yalis.blocks import BlockPool
from yalis.core import Admission, Batch, NewBlocks, Sequence
from yalis.errors import RequestError


@dataclass(frozen=True)
class Step:
    """A batch, and whose the tokens are that it draws, in the batch's order."""

    batch: Batch
    drawing: tuple[Sequence, ...]


class Scheduler:
    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        shares_prefixes: bool = True,
    ) -> None:
        self._pool, self._shares_prefixes = pool, shares_prefixes
        self._max_num_seqs, self._max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self._free_slots = deque(range(max_num_seqs))
        self._waiting: OrderedDict[Sequence, None] = OrderedDict()  # in order of arrival
        self._running: OrderedDict[Sequence, None] = (
            OrderedDict()
        )  # in order of admission: the same

    def check(self, max_len: int) -> None:
        """Raise RequestError when a sequence that may grow so long would not fit the cache even alone."""
        # The last token drawn is never looked at again.
        if self._pool.num_blocks_for(max_len - 1) > self._pool.num_blocks:
            raise RequestError(
                f"prompt and output may take {max_len} tokens, but the cache holds "
                f"{self._pool.num_blocks * self._pool.block_size}; lower max_tokens, shorten the prompt, "
                "or raise kv_cache_memory_bytes or gpu_memory_utilization"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that `check` lets pass."""
        self._waiting[sequence] = None

    def retire(self, sequence: Sequence) -> None:
        """Let go of a sequence that has finished or was cancelled; tokens under way are dropped."""
        if sequence in self._running:
            del self._running[sequence]
            if sequence.finish_reason == "error":
                self._pool.withdraw(sequence.blocks)
            self._give_back(sequence)
        else:
            self._waiting.pop(sequence, None)

    def drop_all(self) -> None:
        """Begin anew, whatever state a call that was broken off has left."""
        self._free_slots = deque(range(self._max_num_seqs))
        self._waiting.clear()
        self._running.clear()
        self._pool.clear()

    def accept(self, sequence: Sequence, token_id: int) -> None:
        """Take in a token that a step has drawn."""
        sequence.num_in_flight -= 1
        sequence.output_token_ids.append(token_id)
        self._publish(sequence)

    def schedule(self) -> Step | None:
        """The next step; None when there is nothing to do before the steps under way have ended."""
        step = _StepBuilder(self._max_num_batched_tokens)
        self._add_decodes(step)
        for sequence in self._running:
            self._add_chunk(step, sequence)
        while step.budget and self._waiting:
            admitted = self._admit(step)
            if admitted is None:
                break
            self._add_chunk(step, admitted)
        return step.build()

    def _add_decodes(self, step: _StepBuilder) -> None:
        for sequence in list(self._running):
            if not step.budget:
                break
            if not (sequence.has_drawn and sequence.can_draw):
                continue  # one that was sent away meanwhile has not drawn either
            if sequence.num_computed == len(sequence.blocks) * self._pool.block_size:
                while not self._pool.num_free and sequence in self._running:
                    self._preempt_last()
                if sequence not in self._running:
                    break  # it was the last itself
                step.add_blocks(sequence, self._pool.allocate(1))
            step.add_decode(sequence)

    def _add_chunk(self, step: _StepBuilder, sequence: Sequence) -> None:
        if not sequence.has_drawn and step.budget:
            step.add_chunk(sequence)
            self._publish(sequence)

    def _admit(self, step: _StepBuilder) -> Sequence | None:
        """Move the first waiting sequence to the running, if it fits."""
        sequence = next(iter(self._waiting))
        if not self._free_slots or sequence.num_in_flight:
            return None
        pool = self._pool
        if pool.num_free <= len(self._running):
            return None  # as below, whatever it shares, without looking for that
        shared = pool.find(self._full_blocks(sequence)) if self._shares_prefixes else []
        num_new = pool.num_blocks_for(len(sequence)) - len(shared)
        # One block to spare for each running sequence, or the newcomer would soon be sent away again.
        if num_new + len(self._running) > pool.num_free - pool.num_kept(shared):
            return None
        del self._waiting[sequence]
        self._running[sequence] = None
        sequence.slot = self._free_slots.popleft()
        sequence.content = pool.share(shared)
        sequence.num_published = len(shared)
        sequence.num_computed = len(shared) * pool.block_size
        step.admit(sequence, [*shared, *pool.allocate(num_new)])
        return sequence

    def _preempt_last(self) -> None:
        sequence, _ = self._running.popitem()
        self._give_back(sequence)
        self._waiting[sequence] = None
        self._waiting.move_to_end(sequence, last=False)

    def _give_back(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        self._free_slots.append(sequence.slot)
        sequence.blocks = []
        sequence.slot, sequence.has_drawn = -1, False
        sequence.num_computed = sequence.num_published = 0

    def _full_blocks(self, sequence: Sequence) -> Iterator[tuple[int, ...]]:
        """The tokens of its blocks, without the last: that is computed in any case, to draw from."""
        size = self._pool.block_size
        for start in range(0, len(sequence) - size, size):
            yield sequence.tokens(start, start + size)

    def _publish(self, sequence: Sequence) -> None:
        """Let others find the blocks that are full of known tokens."""
        if not self._shares_prefixes:
            return
        size = self._pool.block_size
        num_full = min(sequence.num_computed, len(sequence)) // size
        for idx in range(sequence.num_published, num_full):
            tokens = sequence.tokens(idx * size, (idx + 1) * size)
            sequence.content = self._pool.publish(sequence.blocks[idx], sequence.content, tokens)
        sequence.num_published = max(num_full, sequence.num_published)


@dataclass
class _StepBuilder:
    """A batch that grows row by row, and advances the counters of its sequences."""

    budget: int
    decodes: list[tuple[int, int]] = field(default_factory=list)  # slot, num_cached
    chunks: list[tuple[int, int]] = field(default_factory=list)
    num_new: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    is_drawing: list[bool] = field(default_factory=list)
    drawing: list[Sequence] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    new_blocks: list[NewBlocks] = field(default_factory=list)

    def admit(self, sequence: Sequence, blocks: list[int]) -> None:
        tokens = sequence.tokens(0, len(sequence)) if sequence.params.has_penalties else ()
        self.admissions.append(
            Admission(
                slot=sequence.slot,
                params=sequence.params,
                seed=sequence.seed,
                num_prompt_tokens=len(sequence.prompt_token_ids),
                end_token_ids=sequence.end_token_ids,
                token_ids=tokens,
            )
        )
        self.add_blocks(sequence, blocks)

    def add_blocks(self, sequence: Sequence, blocks: list[int]) -> None:
        self.new_blocks.append(NewBlocks(sequence.slot, len(sequence.blocks), tuple(blocks)))
        sequence.blocks.extend(blocks)

    def add_decode(self, sequence: Sequence) -> None:
        self.decodes.append((sequence.slot, sequence.num_computed))
        self.budget -= 1
        sequence.num_computed += 1
        sequence.num_in_flight += 1
        self.drawing.append(sequence)

    def add_chunk(self, sequence: Sequence) -> None:
        start, end = sequence.num_computed, len(sequence)
        stop = min(end, start + self.budget)
        self.chunks.append((sequence.slot, start))
        self.num_new.append(stop - start)
        self.token_ids.extend(sequence.tokens(start, stop))
        self.budget -= stop - start
        sequence.num_computed = stop
        self.is_drawing.append(stop == end)
        if stop == end:
            sequence.has_drawn = True
            sequence.num_in_flight += 1
            self.drawing.append(sequence)

    def build(self) -> Step | None:
        rows = [*self.decodes, *self.chunks]
        if not rows:
            return None
        slots, num_cached = zip(*rows, strict=True)
        batch = Batch(
            num_decodes=len(self.decodes),
            slots=slots,
            num_cached=num_cached,
            num_new=tuple(self.num_new),
            token_ids=tuple(self.token_ids),
            is_drawing=tuple(self.is_drawing),
            admissions=tuple(self.admissions),
            new_blocks=tuple(self.new_blocks),
        )
        return Step(batch, tuple(self.drawing))
