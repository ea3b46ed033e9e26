# SPDX-License-Identifier: Apache-2.0
"""Draws follow the distribution that temperature, top-k and top-p ask for."""

from __future__ import annotations

import math

import pytest
import torch

from yalis.sampler import probabilities, request_seed, sample, uniform
from yalis.sampling_params import Draw, SamplingParams


def draw(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, idx: int = 0
) -> Draw:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    return Draw(params, seed, idx)


def reference(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The same distribution by the definition, one token at a time."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])
    if top_k:
        order = order[:top_k]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass < top_p:
            kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


CASES = [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.6), (1.3, 7, 0.7), (1.0, 1, 1.0),
         (1.0, 0, 1e-9), (1.0, 99, 1.0), (0.01, 3, 0.5)]  # fmt: skip


def test_probabilities_are_those_of_the_definition_each_row_by_its_own_settings() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(len(CASES), 23, generator=generator)
    got = probabilities(logits, [draw(*case) for case in CASES])
    for row, case in enumerate(CASES):
        want = torch.tensor(reference(logits[row].tolist(), *case), dtype=torch.float64)
        torch.testing.assert_close(got[row], want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", [(1.0, 0, 1.0), (0.8, 6, 1.0), (1.0, 0, 0.7)])
def test_many_draws_have_that_distribution(case: tuple[float, int, float]) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 1.5 * torch.randn(16, generator=generator)
    num_draws = 40_000
    want = torch.tensor(reference(logits.tolist(), *case), dtype=torch.float64)
    draws = [draw(*case, seed=seed % 200, idx=seed // 200) for seed in range(num_draws)]
    counts = torch.bincount(sample(logits.expand(num_draws, -1), draws), minlength=16).double()
    assert (counts[want == 0] == 0).all()
    possible = want > 0
    chi2 = ((counts - num_draws * want)[possible].square() / (num_draws * want)[possible]).sum()
    # Five standard deviations above what chi-squared with this many degrees of freedom expects.
    freedom = int(possible.sum()) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


def test_equal_logits_are_kept_or_dropped_together() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]])
    for top_k, top_p in ((1, 1.0), (2, 1.0), (0, 0.1), (0, 0.5)):
        got = probabilities(logits, [draw(top_k=top_k, top_p=top_p)])
        assert got[0].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 0, 1 / 3])


def test_greedy_rows_take_the_maximum_beside_sampled_ones() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    draws = [draw(temperature=0.0 if row % 2 else 1.0, seed=row) for row in range(6)]
    got = sample(logits, draws)
    assert (got[1::2] == logits.argmax(dim=-1)[1::2]).all()
    alone = [int(sample(logits[row : row + 1], [draws[row]])) for row in range(6)]
    assert got.tolist() == alone


def test_a_draw_is_not_moved_by_the_last_bits_of_the_logits() -> None:
    logits = torch.randn(500, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits[:, 10] = logits[:, 20]  # neighbours in rank, which noise may swap
    draws = [draw(seed=row) for row in range(500)]
    noise = 1e-9 * torch.randn(logits.shape, dtype=torch.float64)
    assert (sample(logits + noise, draws) == sample(logits, draws)).all()


def test_extreme_logits_never_give_an_impossible_token() -> None:
    logits = torch.full((300, 9), -torch.inf)
    logits[:, 4] = 1e4
    draws = [draw(temperature=1e-3, seed=row) for row in range(300)]
    assert (sample(logits, draws) == 4).all()
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(4))
    assert sample(logits, [draw(temperature=5e-324)]) == logits.argmax()


def test_uniforms_stay_in_range_and_streams_do_not_meet() -> None:
    values = [uniform(seed, idx) for seed in (-(2**63), -1, 0, 1, 2**63 - 1) for idx in range(2000)]
    assert all(0 <= value < 1 for value in values)
    assert len(set(values)) == len(values)
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.02)
    assert len({request_seed(seed, number) for seed in range(50) for number in range(50)}) == 2500
