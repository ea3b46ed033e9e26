"""What the engine decides, step by step, over a model that hashes its context."""

from __future__ import annotations

import itertools
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType

import pytest
from yalis_fakes import FLAWED_SEED, alone, make_engine, request

from yalis import RequestError, YalisError
from yalis.blocks import ROOT, BlockPool
from yalis.core import Batch, Request, StepResult
from yalis.engine import Engine
from yalis.outputs import RequestOutput


def run(engine: Engine) -> dict[int, RequestOutput]:
    outputs = {}
    while engine.has_work:
        for update in engine.step():
            if update.output is not None:
                outputs[update.request_id] = update.output
    return outputs


def run_all(engine: Engine, requests: list[Request]) -> list[RequestOutput]:
    ids = [engine.add(one) for one in requests]
    outputs = run(engine)
    return [outputs[request_id] for request_id in ids]


def long(first: int, num_tokens: int = 40) -> list[int]:
    """A prompt that shares no block with that of another `first`."""
    return [first, *([1, 2, 3, 4, 5] * num_tokens)][:num_tokens]


def shape(batch: Batch) -> tuple[int, tuple[int, ...]]:
    return batch.num_decodes, batch.num_new


def test_decodes_come_first_then_chunks_then_the_next_in_line() -> None:
    engine, executor, _ = make_engine(budget=16, depth=1, max_num_seqs=3)
    for first in range(4):
        engine.add(request(long(first), 9, ignore_eos=True, seed=first + 2))
    for _ in range(7):
        engine.step()
    # 40 = 16 + 16 + 8; from then on each step decodes first, and the rest of the budget reads prompts.
    assert [shape(batch) for batch in executor.batches] == [
        (0, (16,)),
        (0, (16,)),
        (0, (8, 8)),
        (1, (15,)),
        (1, (15,)),
        (1, (2, 13)),
        (2, (14,)),
    ]
    run(engine)
    assert max(len(batch.slots) for batch in executor.batches) == 3


def test_those_that_cannot_draw_hold_up_nobody() -> None:
    engine, executor, _ = make_engine(budget=16, depth=2, max_num_seqs=2)
    # While the first one's last token is on its way, the second has more to draw.
    engine.add(request([1, 2], 1, ignore_eos=True, seed=1))
    engine.add(request([3, 4], 9, ignore_eos=True, seed=2))
    engine.step()
    assert [shape(batch) for batch in executor.batches] == [(0, (2, 2)), (1, ())]


def test_a_step_is_submitted_before_the_one_before_it_is_collected() -> None:
    engine, executor, _ = make_engine(depth=2)
    engine.add(request([1, 2], 5, ignore_eos=True, seed=4))
    engine.step()
    assert executor.num_steps == 2
    assert executor.batches[1].num_decodes == 1
    assert executor.batches[1].token_ids == ()  # the ranks know the token, we do not yet
    run(engine)
    assert executor.num_steps == 5  # none was computed in vain


def test_a_token_drawn_after_the_end_is_dropped() -> None:
    for seed in range(200):
        wanted = request([1, 2], 9, seed=seed)
        tokens, reason = alone(wanted, seed, 100)
        if reason == "stop" and 1 < len(tokens) < 7:
            break
    engine, executor, pool = make_engine(depth=2)
    engine.add(wanted)
    [output] = run(engine).values()
    assert (output.token_ids, output.finish_reason) == (tokens, "stop")
    assert executor.num_steps == len(tokens) + 1
    assert pool.num_free == pool.num_blocks


def test_preemption_takes_the_last_and_it_goes_on_where_it_was() -> None:
    engine, executor, _ = make_engine(num_blocks=8, block_size=4, max_num_seqs=3, depth=2)
    wanted = [request(long(i, 6), 20, ignore_eos=True, seed=10 * i + 3) for i in range(3)]
    ids = [engine.add(one) for one in wanted]
    outputs, last_step = {}, {}
    for step in range(1000):
        if not engine.has_work:
            break
        for update in engine.step():
            last_step[update.request_id] = step
            outputs[update.request_id] = update.output
    for request_id, one, seed in zip(ids, wanted, (3, 13, 23), strict=True):
        output = outputs[request_id]
        assert output is not None
        assert (output.token_ids, output.finish_reason) == alone(one, seed, 100)
    admitted = [admission for batch in executor.batches for admission in batch.admissions]
    assert len(admitted) > 3
    assert last_step[ids[0]] < last_step[ids[1]] < last_step[ids[2]]
    assert sum(admission.seed == 3 for admission in admitted) == 1  # the first never lost its place


def test_equal_beginnings_are_computed_once() -> None:
    computed = {}
    for shares in (True, False):
        engine, executor, _ = make_engine(shares_prefixes=shares, budget=64)
        ids = [engine.add(request([*long(0), i], 1, seed=5)) for i in range(2)]
        first = run(engine)
        ids += [engine.add(request([*long(0), 1], 1, seed=5))]
        computed[shares] = executor.num_tokens
        outputs = first | run(engine)
        assert outputs[ids[1]].token_ids == outputs[ids[2]].token_ids
        last = executor.batches[-1]
        assert (last.num_cached, last.num_new) == (((40,), (1,)) if shares else ((0,), (41,)))
    # Together in one step, ten blocks of four are written by the one and read by the other.
    assert computed == {True: 41 + 1, False: 82}


def test_the_continuations_of_one_prompt_share_it_and_differ() -> None:
    engine, executor, _ = make_engine(budget=64)
    wanted = request(long(0), 8, n=4, seed=3, ignore_eos=True)
    engine.add(wanted)
    [output] = run(engine).values()
    assert executor.batches[0].num_new == (40, 4, 4, 4)
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    for index, completion in enumerate(output.outputs):
        assert (completion.token_ids, completion.finish_reason) == alone(wanted, 3 + index, 100)
    assert len({completion.token_ids for completion in output.outputs}) == 4
    assert output.token_ids == output.outputs[0].token_ids


def test_the_chain_of_an_evicted_block_matches_nothing() -> None:
    pool = BlockPool(4, 2)
    [a] = pool.allocate(1)
    first = pool.publish(a, ROOT, (1, 2))
    [b] = pool.allocate(1)
    second = pool.publish(b, first, (3, 4))
    assert pool.share([a, b]) == second
    pool.release([a, b])
    pool.release([a, b])
    assert pool.find([(1, 2), (3, 4), (5, 6)]) == [a, b]
    pool.allocate(3)  # two blank ones, and b, the end of the chain
    assert pool.find([(1, 2), (3, 4)]) == [a]
    assert pool.share([a]) == first
    pool.withdraw([a])
    assert pool.find([(1, 2)]) == []
    other = pool.publish(a, ROOT, (1, 2))
    assert other != first
    assert pool.find([(1, 2), (3, 4)]) == [a]


def test_what_is_used_is_evicted_later() -> None:
    pool = BlockPool(3, 1)
    blocks = pool.allocate(3)
    for block in blocks:
        pool.publish(block, ROOT, (block,))
    pool.release([0, 1, 2])  # the last of a sequence becomes the oldest
    pool.share(pool.find([(2,)]))
    pool.release([2])
    assert pool.allocate(2) == [0, 1]
    assert pool.find([(2,)]) == [2]


def test_a_decode_step_says_little() -> None:
    engine, executor, _ = make_engine(num_blocks=4096, max_num_seqs=256, budget=10_000)
    for i in range(256):
        engine.add(request(long(i), 30, ignore_eos=True, seed=7 * i))
    for _ in range(3):
        engine.step()
    batch = executor.batches[2]
    assert batch.num_decodes > 200
    assert len(pickle.dumps(batch)) < 2000
    # Nor does an admission say tokens that no penalty counts.
    assert not any(admission.token_ids for admission in executor.batches[0].admissions)


def test_a_request_that_can_never_fit_is_refused_with_numbers() -> None:
    engine, _, _ = make_engine(num_blocks=5, block_size=4)
    with pytest.raises(
        RequestError, match=r"may take 22 tokens, but the cache holds 20; .*kv_cache_memory_bytes"
    ):
        engine.add(request([1] * 10, 12))
    assert not engine.has_work
    engine.add(request([1] * 10, 11, ignore_eos=True, seed=1))  # the last token needs no place
    assert len(run(engine)) == 1


def test_cancelling_gives_what_there_is_and_nothing_follows() -> None:
    engine, _, pool = make_engine(depth=2, max_num_seqs=1)
    wanted = request([1, 2, 3], 20, ignore_eos=True, seed=8)
    running, waiting = engine.add(wanted), engine.add(wanted)
    news = [update for _ in range(3) for update in engine.step()]
    output = engine.cancel(running)
    assert output is not None
    assert (output.finish_reason, len(output.token_ids)) == ("abort", 3)
    assert [update.token_ids[0] for update in news] == list(output.token_ids)
    never_begun = engine.cancel(waiting)
    assert never_begun is not None
    assert (never_begun.finish_reason, never_begun.token_ids) == ("abort", ())
    assert engine.cancel(waiting) is None
    assert run(engine) == {}
    assert pool.num_free == pool.num_blocks


def test_what_gave_no_numbers_is_not_shared() -> None:
    engine, executor, pool = make_engine()
    for seed in range(FLAWED_SEED, FLAWED_SEED + 200):
        wanted = request(long(0), 9, seed=seed, ignore_eos=True)
        if alone(wanted, seed, 100)[1] == "error":
            break
    engine.add(wanted)
    [output] = run(engine).values()
    assert (output.token_ids, output.finish_reason) == alone(wanted, seed, 100)
    assert "NaN" in str(output.outputs[0].error)
    engine.add(wanted)
    run(engine)
    assert [batch.num_cached for batch in executor.batches if batch.admissions] == [(0,), (0,)]
    assert pool.num_free == pool.num_blocks


@pytest.mark.parametrize("error", [ConnectionError, ValueError])
def test_after_a_failed_step_the_engine_is_empty_and_works(error: type[Exception]) -> None:
    engine, executor, pool = make_engine(depth=2, max_num_seqs=2)
    for first in range(3):  # the last of them waits
        engine.add(request(long(first), 20, ignore_eos=True, seed=1))
    engine.step()

    def fail() -> StepResult:
        if error is ConnectionError:
            raise ConnectionError("gone")
        return StepResult(())  # too little, which comes out when the step is collected

    executor.result = fail  # type: ignore[method-assign]
    with pytest.raises(error):
        engine.step()
    del executor.result  # type: ignore[method-assign]
    assert not engine.has_work
    assert pool.num_free == pool.num_blocks
    assert pool.find([tuple(long(0)[:4])]) == []  # it may never have been computed
    wanted = request(long(0), 5, ignore_eos=True, seed=1)
    engine.add(wanted)
    [output] = run(engine).values()
    assert (output.token_ids, output.finish_reason) == alone(wanted, 1, 100)


def test_a_second_thread_is_told_and_harms_nothing() -> None:
    engine, executor, pool = make_engine(depth=1, max_num_seqs=2)
    wanted = request(long(0), 5, ignore_eos=True, seed=1)
    first = engine.add(wanted)
    said = []

    def meddle() -> None:
        for call in (engine.step, lambda: engine.add(wanted), lambda: engine.cancel(first)):
            with pytest.raises(YalisError, match="make all calls from one thread") as told:
                call()
            said.append(told)

    compute = executor.result

    def result() -> StepResult:
        if not said:
            thread = threading.Thread(target=meddle)
            thread.start()
            thread.join()
        return compute()

    executor.result = result  # type: ignore[method-assign]
    [output] = run(engine).values()
    assert len(said) == 3
    assert (output.token_ids, output.finish_reason) == alone(wanted, 1, 100)
    assert pool.num_free == pool.num_blocks
    with ThreadPoolExecutor(1) as other:  # one after the other is fine
        assert other.submit(engine.add, wanted).result() == first + 1
    assert len(run(engine)) == 1


@contextmanager
def at_call(place: int, act: Callable[[], None]) -> Iterator[list[int]]:
    """Act in the middle of the place-th call of a function of yalis; then the list is no longer empty."""
    calls, was_there = itertools.count(1), list[int]()

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and "yalis/" in frame.f_code.co_filename and next(calls) == place:
            was_there.append(place)
            act()

    sys.setprofile(profile)
    try:
        yield was_there
    finally:
        sys.setprofile(None)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_after_an_interrupt_at_any_place_the_engine_is_empty_and_works() -> None:
    wanted = [request(long(i, 6), 9, ignore_eos=True, seed=10 * i + 1) for i in range(3)]
    expected = [alone(one, one.params.seed or 0, 100)[0] for one in wanted]
    engine, _, pool = make_engine(num_blocks=8, max_num_seqs=3)
    for place in range(1, 2000, 3):
        is_interrupted = False
        try:
            with at_call(place, interrupt) as was_there:
                ids = [engine.add(one) for one in wanted]
                engine.step()
                engine.cancel(ids[1])
                run(engine)
        except KeyboardInterrupt:
            is_interrupted = True
        if not was_there:
            break
        assert is_interrupted
        for request_id in engine._live.copy():  # those added before an `add` that had not begun
            engine.cancel(request_id)
        outputs = run_all(engine, wanted)
        assert [output.token_ids for output in outputs] == expected
        assert pool.num_free == pool.num_blocks
        assert sorted(engine._scheduler._free_slots) == [0, 1, 2]
    assert place > 200


def test_a_second_interrupt_while_all_is_forgotten_harms_nothing_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, executor, pool = make_engine(num_blocks=8, max_num_seqs=3)
    wanted = [request(long(i, 6), 9, ignore_eos=True, seed=10 * i + 1) for i in range(3)]
    for one in wanted:
        engine.add(one)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(executor, "result", interrupt)
        patch.setattr(engine._scheduler, "drop_all", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    outputs = run_all(engine, wanted)
    for one, output in zip(wanted, outputs, strict=True):
        assert output.token_ids == alone(one, one.params.seed or 0, 100)[0]
    assert pool.num_free == pool.num_blocks


def test_what_is_abandoned_in_the_middle_of_a_step_ends_with_it() -> None:
    # As when the garbage collector closes a stream, at whatever call it comes.
    wanted = [request(long(i, 6), 9, ignore_eos=True, seed=10 * i + 1) for i in range(3)]
    for place in range(1, 2000, 5):
        engine, _, pool = make_engine(num_blocks=8, max_num_seqs=3)
        ids = [engine.add(one) for one in wanted]
        with at_call(place, lambda: engine.abandon(ids[1:2])) as was_there:  # noqa: B023
            outputs = run(engine)
        if not was_there:
            break
        assert pool.num_free == pool.num_blocks
        for request_id, output in outputs.items():
            one = wanted[request_id]
            assert output.token_ids == alone(one, one.params.seed or 0, 100)[0]
        assert outputs.keys() >= {ids[0], ids[2]}
    assert place > 200


def test_what_another_thread_abandons_just_before_a_call_is_over_ends_too() -> None:
    engine, _, pool = make_engine()
    request_id = engine.add(request([1, 2], 5, ignore_eos=True, seed=1))
    lock, others = (
        engine._calls._lock,
        [threading.Thread(target=engine.abandon, args=([request_id],))],
    )

    class Late:
        acquire = lock.acquire

        def release(self) -> None:
            if others:  # while the lock is still taken, and what was postponed has been looked at
                other = others.pop()
                other.start()
                other.join()
            lock.release()

    engine._calls._lock = Late()  # type: ignore[assignment]
    engine.step()
    assert not others
    engine.settle()
    assert pool.num_free == pool.num_blocks


def test_a_call_in_the_middle_of_another_is_refused() -> None:
    engine, executor, _ = make_engine()
    first = engine.add(request([1, 2], 5, ignore_eos=True, seed=1))

    def result() -> StepResult:  # as by a signal's handler
        engine.cancel(first)
        raise AssertionError

    executor.result = result  # type: ignore[method-assign]
    with pytest.raises(YalisError, match="make no call from a signal's handler"):
        engine.step()
    del executor.result  # type: ignore[method-assign]
    assert not engine.has_work
    engine.add(request([1, 2], 5, ignore_eos=True, seed=1))
    assert len(run(engine)) == 1


def test_times_are_in_order() -> None:
    engine, _, _ = make_engine()
    engine.add(request([1, 2], 4, ignore_eos=True, seed=4))
    [output] = run(engine).values()
    times = output.metrics
    assert times is not None
    assert times.first_token_s is not None
    assert times.last_token_s is not None
    assert times.arrival_s <= times.first_token_s < times.last_token_s
