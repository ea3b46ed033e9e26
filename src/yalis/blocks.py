# SPDX-License-Identifier: Apache-2.0
"""Which blocks of the cache are free, shared, or worth keeping. Pure Python; every operation is O(1) a block.

A block holds the keys and values of `block_size` consecutive tokens of one sequence. A full one can be
published under its content, so that a later sequence with the same beginning shares it. What nobody
holds any more is kept, least recently used first to go, until its place is needed.

Content is compared, not hashed: the key of a block is its own tokens and the identity of the content before
it. Identities are never used twice, so the key of a block whose predecessor was evicted matches nothing.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ROOT = 0  # the content before a first block: nothing


@dataclass(frozen=True)
class _Content:
    identity: int
    key: tuple[int, tuple[int, ...]]  # the identity before it, and the block's tokens


class BlockPool:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.clear()

    @property
    def num_free(self) -> int:
        """How many blocks `allocate` could hand out, kept ones included."""
        return len(self._blank) + len(self._kept)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[int]:
        """Blocks of undefined content, held once, in ascending order. No more than `num_free`."""
        assert num_blocks <= self.num_free, f"{num_blocks} blocks of {self.num_free}"
        taken = []
        for _ in range(num_blocks):
            if self._blank:
                block = self._blank.popleft()
            else:
                block, _ = self._kept.popitem(last=False)
                self._withdraw(block)
            self._num_holders[block] = 1
            taken.append(block)
        return sorted(taken)  # neighbours stay neighbours, which a backend may profit from

    def find(self, token_blocks: Iterable[tuple[int, ...]]) -> list[int]:
        """The published blocks that begin with these tokens: as many of the first as there are."""
        found, before = [], ROOT
        for tokens in token_blocks:
            block = self._published.get((before, tokens))
            if block is None:
                break
            found.append(block)
            before = self._identity(block)
        return found

    def num_kept(self, blocks: Sequence[int]) -> int:
        """How many of these count as free as long as nobody shares them."""
        return sum(not self._num_holders[block] for block in blocks)

    def share(self, blocks: Sequence[int]) -> int:
        """Hold what `find` found; the identity of the last one's content."""
        for block in blocks:
            if not self._num_holders[block]:
                del self._kept[block]
            self._num_holders[block] += 1
        return self._identity(blocks[-1]) if blocks else ROOT

    def publish(self, block: int, before: int, tokens: tuple[int, ...]) -> int:
        """Let others find a held block by its tokens after the content `before`; the content's identity.

        Two blocks may come to hold the same content: the first stays the published one.
        """
        assert len(tokens) == self.block_size
        assert self._num_holders[block]
        key = (before, tokens)
        if key in self._published:
            return self._identity(self._published[key])
        self._last_identity += 1
        self._contents[block] = _Content(self._last_identity, key)
        self._published[key] = block
        return self._last_identity

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one hold of each; later blocks of a sequence go first, so that beginnings live longest."""
        for block in reversed(list(blocks)):
            assert self._num_holders[block], f"block {block} is released, but nobody holds it"
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if self._contents[block] is not None:
                self._kept[block] = None
            else:
                self._blank.append(block)

    def withdraw(self, blocks: Iterable[int]) -> None:
        """Let nobody find these held blocks again: what is in them is not to be trusted."""
        for block in blocks:
            self._withdraw(block)

    def clear(self) -> None:
        """Forget all content and all holders."""
        self._num_holders = [0] * self.num_blocks
        self._contents: list[_Content | None] = [None] * self.num_blocks
        self._published: dict[tuple[int, tuple[int, ...]], int] = {}
        self._blank: deque[int] = deque(range(self.num_blocks))
        self._kept: OrderedDict[int, None] = (
            OrderedDict()
        )  # published, held by nobody; oldest first
        self._last_identity = ROOT

    def _withdraw(self, block: int) -> None:
        content = self._contents[block]
        if content is not None:
            del self._published[content.key]
            self._contents[block] = None

    def _identity(self, block: int) -> int:
        content = self._contents[block]
        assert content is not None
        return content.identity
