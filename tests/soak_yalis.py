"""Random arrivals and cancellations, for as long as one likes: `soak_yalis.py [SECONDS [RANKS]]`.

Every request must end with the tokens that it gets alone, and nothing may grow. No test: run it by hand.
"""

from __future__ import annotations

import random
import resource
import sys
import tempfile
import time

from yalis import LLM, RequestOutput, SamplingParams
from yalis.core import Request
from yalis.testing import make_checkpoint

NUM_REQUESTS = 200


def make_requests(rng: random.Random) -> list[Request]:
    """Requests of all kinds, many of which begin alike."""
    beginnings = [rng.choices(range(2, 500), k=rng.randint(1, 120)) for _ in range(10)]
    requests = []
    for _ in range(NUM_REQUESTS):
        prompt = (*rng.choice(beginnings), *rng.choices(range(2, 500), k=rng.randint(0, 20)))
        params = SamplingParams(
            n=rng.choice([1, 1, 1, 3]),
            max_tokens=rng.randint(1, 60),
            temperature=1.0,
            top_k=1,  # the last bits of logits, which the batch may change, must not decide
            repetition_penalty=rng.choice([1.0, 1.2]),
            seed=rng.randrange(1000),
            stop_token_ids=rng.sample(range(500), 5),
        )
        requests.append(Request(None, prompt, params))
    return requests


def check(output: RequestOutput, alone: RequestOutput) -> None:
    for ours, wanted in zip(output.outputs, alone.outputs, strict=True):
        if ours.finish_reason == "abort":
            assert ours.token_ids == wanted.token_ids[: len(ours.token_ids)]
        else:
            assert ours == wanted, (alone.prompt_token_ids, ours, wanted)


def main(num_seconds: float, num_ranks: int) -> None:
    rng = random.Random(time.time_ns())
    folder = str(make_checkpoint(tempfile.mkdtemp(), num_hidden_layers=2))
    requests = make_requests(rng)
    # As many ranks, because sums over other ranks have other last bits, which a draw may notice.
    size = {"tensor_parallel_size": num_ranks, "all_reduce": "torch"}
    with LLM(folder, enable_prefix_caching=False, max_num_seqs=1, **size) as llm:
        alone = []
        for one in requests:
            [output] = llm.generate([list(one.token_ids)], one.params)
            alone.append(output)
    narrow = {"max_num_seqs": 6, "max_num_batched_tokens": 50, "kv_cache_memory_bytes": 40 << 14}
    with LLM(folder, async_scheduling=True, **narrow, **size) as llm:
        engine, begin_s, live, num_done = llm.engine, time.monotonic(), dict[int, int](), 0
        report_s = begin_s
        while (now_s := time.monotonic()) - begin_s < num_seconds or engine.has_work:
            if now_s - begin_s < num_seconds and len(live) < 12 and rng.random() < 0.3:
                place = rng.randrange(NUM_REQUESTS)
                live[engine.add(requests[place])] = place
            if live and rng.random() < 0.01:
                request_id = rng.choice(list(live))
                output = engine.cancel(request_id)
                assert output is not None
                check(output, alone[live.pop(request_id)])
            for update in engine.step() if engine.has_work else ():
                if update.output is not None:
                    check(update.output, alone[live.pop(update.request_id)])
                    num_done += 1
            if now_s >= report_s:
                report_s += 30
                memory_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                print(f"{now_s - begin_s:6.0f} s: {num_done} requests, {memory_kb} kB", flush=True)
        pool = engine._scheduler._pool
        assert not live
        assert pool.num_free == pool.num_blocks
    print(f"{num_done} requests served as they are alone")


if __name__ == "__main__":
    seconds, ranks = (*sys.argv[1:], *("60", "1")[len(sys.argv) - 1 :])
    main(float(seconds), int(ranks))
