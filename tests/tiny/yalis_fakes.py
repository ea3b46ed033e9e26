"""A model without weights, for tests of what is around one: a token is the hash of its whole context.

What it keeps of a token in its cache hashes all that came before, as keys and values do in effect. It reads
them through block tables, so any block that is missing, stale, or wrongly shared gives other tokens.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from yalis.blocks import BlockPool
from yalis.core import INVALID_TOKEN, Admission, Batch, Request, StepResult
from yalis.engine import Engine
from yalis.sampling_params import SamplingParams
from yalis.scheduler import Scheduler

VOCAB_SIZE = 6
END = 0
FLAWED_SEED = 1000  # from this on, some tokens come from logits that are not finite


def state_after(states: list[int], token: int) -> int:
    return hash((token, *states))


def next_token(seed: int, states: list[int]) -> int:
    value = hash((seed, *states))
    return INVALID_TOKEN if seed >= FLAWED_SEED and value % 19 == 0 else value % VOCAB_SIZE


def alone(request: Request, seed: int, max_model_len: int) -> tuple[tuple[int, ...], str]:
    """What the model says to a request with nothing beside it, and how it ends."""
    context, params = request.token_ids, request.params
    max_len = min(len(context) + params.max_tokens, max_model_len)
    num_prompt = len(context)
    states: list[int] = []
    for token in context:
        states.append(state_after(states, token))
    while True:
        token = next_token(seed, states)
        if token == INVALID_TOKEN:
            return context[num_prompt:], "error"
        context = (*context, token)
        states.append(state_after(states, token))
        if token == END and not params.ignore_eos:
            return context[num_prompt:], "stop"
        if len(context) == max_len:
            return context[num_prompt:], "length"


class HashExecutor:
    """Computes in order of submission, and checks that each batch is one that could be computed."""

    def __init__(
        self, num_blocks: int, block_size: int, max_num_seqs: int, budget: int, depth: int
    ):
        self.depth, self.num_blocks = depth, num_blocks
        self._max_num_seqs, self._budget, self._block_size = max_num_seqs, budget, block_size
        self._cache = [[-9] * block_size for _ in range(num_blocks)]
        self._tables: dict[int, list[int]] = {}
        self._how: dict[int, Admission] = {}
        self._last: dict[int, int] = {}
        self._results: deque[StepResult] = deque()
        self.num_steps = self.num_tokens = 0
        self.batches: list[Batch] = []

    def submit(self, batch: Batch) -> None:
        assert len(self._results) < self.depth
        rows = list(zip(batch.slots, batch.num_cached, self._row_tokens(batch), strict=True))
        num_tokens = sum(len(tokens) for _, _, tokens in rows)
        assert 0 < num_tokens <= self._budget
        assert len(set(batch.slots)) == len(batch.slots) <= self._max_num_seqs
        self.num_steps, self.num_tokens = self.num_steps + 1, self.num_tokens + num_tokens
        self.batches.append(batch)
        for admission in batch.admissions:
            assert 0 <= admission.slot < self._max_num_seqs
            self._how[admission.slot] = admission
            self._tables[admission.slot] = []
            self._last.pop(admission.slot, None)
        for new in batch.new_blocks:
            assert len(self._tables[new.slot]) == new.first_idx
            self._tables[new.slot] += new.blocks
        written = set()
        for slot, num_cached, tokens in rows:
            for position, token in enumerate(tokens, num_cached):
                place = self._place(slot, position)
                assert place not in written, "two sequences of one step write to one place"
                written.add(place)
                # Those who share a block of this step come after the one who writes it.
                state = state_after(self._states(slot, position), token)
                self._cache[place[0]][place[1]] = state
        drawn = []
        is_drawing = (True,) * batch.num_decodes + batch.is_drawing
        for (slot, num_cached, tokens), draws in zip(rows, is_drawing, strict=True):
            if draws:
                states = self._states(slot, num_cached + len(tokens))
                drawn.append(next_token(self._how[slot].seed, states))
                self._last[slot] = drawn[-1]
        self._results.append(StepResult(tuple(drawn)))

    def _row_tokens(self, batch: Batch) -> list[tuple[int, ...]]:
        tokens: list[tuple[int, ...]] = [
            (self._last[slot],) for slot in batch.slots[: batch.num_decodes]
        ]
        first = 0
        for num_new in batch.num_new:
            assert num_new > 0
            tokens.append(batch.token_ids[first : first + num_new])
            first += num_new
        assert first == len(batch.token_ids)
        return tokens

    def _states(self, slot: int, length: int) -> list[int]:
        places = [self._place(slot, position) for position in range(length)]
        return [self._cache[block][offset] for block, offset in places]

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        block, offset = divmod(position, self._block_size)
        return self._tables[slot][block], offset

    def result(self) -> StepResult:
        return self._results.popleft()

    def drain(self) -> None:
        self._results.clear()

    def agree(self, requests: list[Request]) -> None: ...

    def use_all_reduce(self, name: str) -> None: ...

    def describe_all_reduce(self) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...


def make_engine(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 32,
    depth: int = 2,
    max_model_len: int = 100,
    shares_prefixes: bool = True,
) -> tuple[Engine, HashExecutor, BlockPool]:
    executor = HashExecutor(num_blocks, block_size, max_num_seqs, budget, depth)
    pool = BlockPool(num_blocks, block_size)
    scheduler = Scheduler(
        pool,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        shares_prefixes=shares_prefixes,
    )
    engine = Engine(
        executor, scheduler, None, eos_token_ids=(END,), max_model_len=max_model_len, seed=0
    )
    return engine, executor, pool


def request(token_ids: list[int], max_tokens: int = 16, **params: Any) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, **params)
    return Request(None, tuple(token_ids), sampling)
