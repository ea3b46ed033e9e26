"""Whatever comes and goes beside it, a request gets the tokens that it gets alone; no block is lost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from yalis_fakes import FLAWED_SEED, alone, make_engine, request

from yalis import RequestError
from yalis.core import Request
from yalis.outputs import RequestOutput

prompts = st.lists(st.integers(0, 1), min_size=1, max_size=20)  # few tokens, many equal beginnings


class AnyTraffic(RuleBasedStateMachine):
    requests = Bundle("requests")

    @initialize(
        num_blocks=st.integers(1, 24),
        block_size=st.integers(1, 5),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 30),
        depth=st.integers(1, 3),
        max_model_len=st.integers(21, 40),
        shares_prefixes=st.booleans(),
    )
    def start(self, **options: Any) -> None:
        self.max_model_len = options["max_model_len"]
        self.capacity = options["num_blocks"] * options["block_size"]
        self.engine, self.executor, self.pool = make_engine(**options)
        self.asked: dict[int, Request] = {}
        self.said: dict[int, RequestOutput] = {}
        self.pieces: dict[tuple[int, int], list[int]] = {}

    @rule(
        target=requests,
        prompt=prompts,
        max_tokens=st.integers(1, 24),
        n=st.integers(1, 3),
        ignore_eos=st.booleans(),
    )
    def add(self, prompt: list[int], max_tokens: int, n: int, ignore_eos: bool) -> int:
        wanted = request(
            prompt, max_tokens, n=n, seed=FLAWED_SEED - 10 + len(prompt), ignore_eos=ignore_eos
        )
        most = min(len(prompt) + max_tokens, self.max_model_len)
        if most - 1 > self.capacity:
            with pytest.raises(RequestError, match=f"may take {most} tokens"):
                self.engine.add(wanted)
            return -1
        request_id = self.engine.add(wanted)
        self.asked[request_id] = wanted
        return request_id

    @rule(request_id=consumes(requests))
    def cancel(self, request_id: int) -> None:
        output = self.engine.cancel(request_id)
        assert (output is None) == (request_id not in self.asked or request_id in self.said)
        if output is not None:
            self.said[request_id] = output
        assert self.engine.cancel(request_id) is None

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if self.engine.has_work:
                self.compute()

    def compute(self) -> None:
        for update in self.engine.step():
            assert update.request_id not in self.said
            self.pieces.setdefault((update.request_id, update.index), []).extend(update.token_ids)
            if update.output is not None:
                self.said[update.request_id] = update.output

    @invariant()
    def every_block_is_free_or_held_by_those_who_say_so(self) -> None:
        if not hasattr(self, "pool"):
            return
        running = self.engine._scheduler._running
        holders = Counter(block for sequence in running for block in sequence.blocks)
        free = [*self.pool._blank, *self.pool._kept]
        assert sorted([*free, *holders]) == list(range(self.pool.num_blocks))
        assert all(self.pool._num_holders[block] == holders[block] for block in holders)
        published = {b for b, content in enumerate(self.pool._contents) if content is not None}
        assert sorted(self.pool._published.values()) == sorted(published)
        assert set(self.pool._kept) == published - set(holders)
        for sequence in running:  # in order of arrival
            assert len(sequence.blocks) * self.pool.block_size >= sequence.num_computed
        order = [s.request_id for s in (*running, *self.engine._scheduler._waiting)]
        assert order == sorted(order)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for _ in range(100_000):
            if not self.engine.has_work:
                break
            self.compute()
        assert set(self.said) == set(self.asked)
        assert self.pool.num_free == self.pool.num_blocks
        for request_id, wanted in self.asked.items():
            for output in self.said[request_id].outputs:
                assert wanted.params.seed is not None
                seed = wanted.params.seed + output.index
                tokens, reason = alone(wanted, seed, self.max_model_len)
                if output.finish_reason == "abort":
                    assert tokens[: len(output.token_ids)] == output.token_ids
                else:
                    assert (output.token_ids, output.finish_reason) == (tokens, reason)
                assert tuple(self.pieces.get((request_id, output.index), ())) == output.token_ids


TestAnyTraffic = AnyTraffic.TestCase
TestAnyTraffic.settings = settings(max_examples=150, stateful_step_count=40)
