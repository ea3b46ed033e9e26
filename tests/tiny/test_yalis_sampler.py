"""Draws follow the distribution that a request's parameters ask for, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from yalis import filters
from yalis.filters import kept_scores, num_to_rank
from yalis.sampler import Sampled, Sampler, draw_keys, request_seed
from yalis.sampling_params import Draw, SamplingParams


def draw(
    seed: int = 0, idx: int = 0, slot: int = 0, banned: tuple[int, ...] = (), **params: Any
) -> Draw:
    return Draw(SamplingParams(**params), seed, idx, slot, banned)


def sample(logits: Tensor, draws: list[Draw]) -> Sampled:
    sampler = Sampler(len(draws), logits.shape[-1], torch.device("cpu"))
    return sampler.sample(logits, draws)


def probabilities(logits: Tensor, cases: list[tuple[float, ...]]) -> Tensor:
    """By the engine's own filters; a case is temperature, min_p, top_k, top_p."""
    vocab_size = logits.shape[-1]
    most = max(num_to_rank(int(top_k), top_p, vocab_size) for _, _, top_k, top_p in cases)
    scores = kept_scores(logits, torch.tensor(cases, dtype=torch.float64), most)
    return scores.double().softmax(dim=-1)


def reference(
    logits: list[float], temperature: float, min_p: float, top_k: float, top_p: float
) -> list[float]:
    """The same distribution by the definition, one token at a time."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])
    order = [i for i in order if weights[i] >= min_p * weights[order[0]]]
    order = order[: int(top_k) or None]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass < top_p:
            kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


# temperature, min_p, top_k, top_p
CASES: list[tuple[float, float, float, float]] = [
    (1.0, 0, 0, 1.0), (0.5, 0, 0, 1.0), (2.0, 0, 5, 1.0), (1.0, 0, 0, 0.6), (1.3, 0, 7, 0.7),
    (1.0, 0, 1, 1.0), (1.0, 0, 0, 1e-9), (1.0, 0, 99, 1.0), (0.01, 0, 3, 0.5), (1.0, 0.2, 0, 1.0),
    (1.0, 1.0, 0, 1.0), (1.0, 0.05, 9, 0.8), (3.0, 0.3, 0, 0.5), (1.0, 0.1, 23, 0.999999),
]  # fmt: skip


def test_probabilities_are_those_of_the_definition_each_row_by_its_own_settings() -> None:
    logits = 2 * torch.randn(len(CASES), 23, generator=torch.Generator().manual_seed(0))
    got = probabilities(logits, CASES)
    for row, case in enumerate(CASES):
        want = torch.tensor(reference(logits[row].tolist(), *case), dtype=torch.float64)
        torch.testing.assert_close(got[row], want, atol=1e-6, rtol=0)
        assert ((got[row] == 0) == (want == 0)).all()


@pytest.mark.parametrize("case", [(1.0, 0, 0, 1.0), (0.8, 0, 6, 1.0), (1.5, 0.05, 0, 0.9)])
def test_many_draws_have_that_distribution(case: tuple[float, float, int, float]) -> None:
    logits = 1.5 * torch.randn(16, generator=torch.Generator().manual_seed(1))
    num_draws = 40_000
    want = torch.tensor(reference(logits.tolist(), *case), dtype=torch.float64)
    params = dict(zip(("temperature", "min_p", "top_k", "top_p"), case, strict=True))
    draws = [draw(seed=number % 200, idx=number // 200, **params) for number in range(num_draws)]
    token_ids = sample(logits.expand(num_draws, -1), draws).token_ids
    counts = torch.bincount(token_ids, minlength=16).double()
    assert (counts[want == 0] == 0).all()
    possible = want > 0
    chi2 = ((counts - num_draws * want)[possible].square() / (num_draws * want)[possible]).sum()
    # Five standard deviations above what chi-squared with this many degrees of freedom expects.
    freedom = int(possible.sum()) - 1
    assert freedom
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


def test_rare_tokens_are_drawn_as_often_as_they_should_be() -> None:
    logits = 2 * torch.randn(10_000, generator=torch.Generator().manual_seed(7))
    want = logits.double().softmax(dim=-1).sort()
    draws = [draw(seed=seed % 40, idx=seed // 40) for seed in range(2000)]
    token_ids = sample(logits.expand(len(draws), -1), draws).token_ids
    # Ten groups of equal mass; most tokens are in the first, none likelier than one in 5000.
    group = torch.empty(10_000, dtype=torch.int64)
    group[want.indices] = (want.values.cumsum(0) * 10).long().clamp(max=9)
    mass = torch.zeros(10, dtype=torch.float64).index_add_(0, group, logits.double().softmax(0))
    counts = torch.bincount(group[token_ids], minlength=10)
    chi2 = ((counts - 2000 * mass).square() / (2000 * mass)).sum()
    assert chi2 < 9 + 5 * math.sqrt(2 * 9)


def test_equal_logits_are_kept_or_dropped_together() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]])
    for top_k, top_p in ((1, 1.0), (2, 1.0), (0, 0.1), (0, 0.5)):
        got = probabilities(logits, [(1.0, 0.0, top_k, top_p)])
        assert got[0].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 0, 1 / 3])


MIXED: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 1.0}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.3},
    {"temperature": 0, "presence_penalty": 2.0}, {"temperature": 1.7, "repetition_penalty": 1.4},
    {"temperature": 4.0, "top_k": 70}, {"top_k": 3, "top_p": 0.9, "frequency_penalty": -1.0},
]  # fmt: skip


@pytest.mark.parametrize("portion", [1, 250, 1 << 24])
def test_a_row_is_drawn_the_same_alone_and_in_any_company(
    portion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yalis.sampler._PORTION", portion)
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(4 * len(MIXED), 90, generator=generator)
    draws = [draw(seed=row, slot=row, **MIXED[row % len(MIXED)]) for row in range(len(logits))]
    order = torch.randperm(len(logits), generator=generator).tolist()
    samplers = [Sampler(len(draws), 90, torch.device("cpu")) for _ in range(3)]
    for sampler in samplers:
        for row in range(len(draws)):
            sampler.start(row, [row, 5], [row, row + 1])
    together = samplers[0].sample(logits, draws).token_ids
    shuffled = samplers[1].sample(logits[order], [draws[row] for row in order]).token_ids
    assert torch.equal(shuffled, together[order])
    for row in range(len(draws)):
        alone = samplers[2].sample(logits[row : row + 1], draws[row : row + 1]).token_ids
        assert alone == together[row]
    greedy = [row for row in range(len(draws)) if row % len(MIXED) == 0]
    assert torch.equal(together[greedy], logits.argmax(dim=-1)[greedy])


def penalised(
    logits: list[float], prompt: list[int], output: list[int], p: SamplingParams
) -> list[float]:
    """By the definition, one token at a time."""
    values = list(logits)
    for token_id in {*prompt, *output}:
        value = values[token_id]
        values[token_id] = (
            value / p.repetition_penalty if value > 0 else value * p.repetition_penalty
        )
    for token_id in output:
        values[token_id] -= p.frequency_penalty
    for token_id in set(output):
        values[token_id] -= p.presence_penalty
    return values


@pytest.mark.parametrize(
    "penalties", [(1.5, 0, 0), (0.6, 0, 0), (1, 1.2, 0), (1, 0, 0.7), (1.3, -1.5, 2.0)]
)
def test_greedy_text_under_penalties_is_that_of_the_definition(
    penalties: tuple[float, float, float],
) -> None:
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    params = SamplingParams(temperature=0, **dict(zip(names, penalties, strict=True)))
    generator = torch.Generator().manual_seed(3)
    sampler = Sampler(3, 12, torch.device("cpu"))
    sampler.start(2, [9, 9, 9])  # a former request's tokens, which must be forgotten
    outputs: dict[int, list[int]] = {0: [], 2: [4, 4, 7]}  # one slot begins, one was preempted
    for slot, output in outputs.items():
        sampler.start(slot, [1, 2, 2, slot], output)
    for number in range(30):
        logits = torch.randn(2, 12, generator=generator) - 3 * (number % 2)  # above 0, then few
        draws = [Draw(params, 0, len(outputs[slot]), slot) for slot in (2, 0)]
        token_ids = sampler.sample(logits, draws).token_ids.tolist()
        for row, slot in enumerate((2, 0)):
            want = penalised(logits[row].tolist(), [1, 2, 2, slot], outputs[slot], params)
            assert token_ids[row] == max(range(12), key=want.__getitem__)
            outputs[slot].append(token_ids[row])


def test_banned_tokens_are_never_drawn() -> None:
    logits = torch.zeros(200, 4)
    logits[:, 2] = 9
    draws = [draw(seed=row, temperature=row % 2, banned=(2, 0)) for row in range(200)]
    token_ids = sample(logits, draws).token_ids
    assert set(token_ids.tolist()) == {1, 3}
    assert (logits[:, 2] == 9).all()


def test_logprobs_are_the_same_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(7, 30, generator=torch.Generator().manual_seed(6)).bfloat16()
    draws = [draw(seed=row, logprobs=row if row != 3 else None) for row in range(7)]
    whole = sample(logits, draws).logprobs
    for portion in (1, 60, 179):  # of one row, two, and five
        monkeypatch.setattr("yalis.sampler._PORTION", portion)
        parts = sample(logits, draws).logprobs
        assert parts.rows == whole.rows == (0, 1, 2, 4, 5, 6)
        for field in ("drawn", "rank", "top", "top_ids"):
            assert torch.equal(getattr(parts, field), getattr(whole, field))


def test_logprobs_are_of_the_model_whatever_the_filters() -> None:
    logits = 2 * torch.randn(4, 30, generator=torch.Generator().manual_seed(5))
    draws = [
        draw(logprobs=3, top_k=2, banned=(int(logits[0].argmax()),)),
        draw(),
        draw(temperature=0, logprobs=0),
        draw(seed=8, temperature=5.0, logprobs=5),
    ]
    sampled = sample(logits, draws)
    assert sampled.logprobs is not None
    assert sampled.logprobs.rows == (0, 2, 3)
    assert sampled.logprobs.top.shape == sampled.logprobs.top_ids.shape == (3, 5)
    for place, row in enumerate(sampled.logprobs.rows):
        want = (logits[row].double().exp() / logits[row].double().exp().sum()).log().float()
        order = want.argsort(descending=True)
        token_id = sampled.token_ids[row]
        torch.testing.assert_close(sampled.logprobs.drawn[place], want[token_id])
        assert order[sampled.logprobs.rank[place] - 1] == token_id
        assert torch.equal(sampled.logprobs.top_ids[place], order[:5])
        torch.testing.assert_close(sampled.logprobs.top[place], want[order[:5]])
    assert sample(logits, [draw()] * 4).logprobs is None
    greedy = sample(logits, [draw(temperature=0, logprobs=1)] * 4).logprobs
    assert greedy is not None
    assert greedy.rank.tolist() == [1] * 4
    assert torch.equal(greedy.drawn, greedy.top[:, 0])


def test_equally_likely_tokens_are_reported_in_their_own_order_whatever_others_ask_for() -> None:
    logits = torch.randn(3, 700, generator=torch.Generator().manual_seed(5)).mul(4).round()
    draws = [draw(seed=3, logprobs=num) for num in (7, 1, 20)]
    found = sample(logits, draws).logprobs
    assert found is not None
    for row, num in enumerate((7, 1, 20)):
        order = logits[row].argsort(descending=True, stable=True)
        alone = sample(logits[row : row + 1], draws[row : row + 1])
        assert alone.logprobs is not None
        assert alone.logprobs.top_ids[0].tolist() == order[:num].tolist()
        assert torch.equal(found.top_ids[row, :num], order[:num])
        assert order[found.rank[row] - 1] == alone.token_ids[0]
    certain = sample(torch.tensor([[0.0, 200.0, 0.0]]), [draw(logprobs=2)]).logprobs
    assert certain is not None
    assert (certain.top_ids.tolist(), certain.top.tolist()) == ([[1, 0]], [[0.0, -200.0]])


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_told_and_harms_no_other(
    bad: float, temperature: float
) -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(6))
    draws = [draw(seed=row, temperature=temperature, top_p=0.9) for row in range(4)]
    clean = sample(logits, draws)
    assert clean.is_finite.all()
    for columns in ([3], list(range(9))):
        dirty = logits.clone()
        dirty[2, columns] = bad
        sampled = sample(dirty, draws)
        assert sampled.is_finite.tolist() == [True, True, False, True]
        assert 0 <= int(sampled.token_ids[2]) < 9
        others = [0, 1, 3]
        assert torch.equal(sampled.token_ids[others], clean.token_ids[others])


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7, "top_p": 0.95}, {"top_k": 50}])
def test_last_bits_of_the_logits_hardly_ever_move_a_draw(params: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 2.5 * torch.randn(500, 4000, generator=generator)
    noisy = logits * (1 + 2**-8 * torch.randn(logits.shape, generator=generator))  # as bfloat16 is
    draws = [draw(seed=row, **params) for row in range(500)]
    is_moved = sample(noisy, draws).token_ids != sample(logits, draws).token_ids
    # As rarely as the likeliest token changes, or nearly; inverting a cumulative sum moves 20 to 50 %.
    assert is_moved.float().mean() < 0.05


def test_extreme_logits_and_temperatures_never_give_an_impossible_token() -> None:
    logits = torch.full((300, 9), -3e38)
    logits[:, 4] = 3e38
    draws = [draw(temperature=1e-3, seed=row) for row in range(300)]
    assert (sample(logits, draws).token_ids == 4).all()
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(4))
    assert sample(logits, [draw(temperature=5e-324)]).token_ids == logits.argmax()
    flat = probabilities(logits, [(1e300, 0.0, 0, 1.0)])
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / 50))


def test_noise_of_nothing_makes_no_impossible_token_win() -> None:
    zero_at_first = torch.tensor([[1, 0]])  # keys
    scores = torch.tensor([[-torch.inf, 0.0, -1.0]])
    token_ids, places = filters.draw(scores, zero_at_first)
    assert token_ids != 0
    assert -torch.inf < places < 0


def test_streams_do_not_meet() -> None:
    seeds = (-(2**63), -1, 0, 1, 2**63 - 1)
    keys = [draw_keys(seed, idx) for seed in seeds for idx in range(2000)]
    assert len(set(keys)) == len(keys)
    for numbers in zip(*keys, strict=True):
        assert -(2**31) <= min(numbers) < -(2**30) < 2**30 < max(numbers) < 2**31
    assert all(factor % 2 for factor, _ in keys)
    assert len({request_seed(seed, number) for seed in range(50) for number in range(50)}) == 2500
