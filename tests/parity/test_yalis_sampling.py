"""Penalties and filters are those of transformers' logits processors, in vLLM's order."""

from __future__ import annotations

import pytest
import torch
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from yalis.filters import kept_scores, num_to_rank
from yalis.penalties import Penalties

pytestmark = pytest.mark.parity

VOCAB = 1000
# temperature, min_p, top_k, top_p, repetition penalty
CASES = [
    (0.7, 0.0, 0, 1.0, 1.3), (1.0, 0.05, 0, 1.0, 1.3), (1.0, 0.0, 40, 1.0, 0.7),
    (1.0, 0.0, 0, 0.9, 1.1), (1.4, 0.01, 100, 0.8, 1.2), (0.3, 0.2, 5, 0.5, 2.0),
    (2.0, 0.0, 0, 0.99, 1.0), (1.0, 0.0, 1, 1.0, 1.0), (1.0, 0.0, 2000, 0.3, 1.0),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_same_tokens_are_kept_with_the_same_probabilities(
    case: tuple[float, float, int, float, float],
) -> None:
    temperature, min_p, top_k, top_p, repetition = case
    generator = torch.Generator().manual_seed(0)
    logits = 2.5 * torch.randn(32, VOCAB, generator=generator)
    prompts = torch.randint(VOCAB, (32, 60), generator=generator)

    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(repetition), TemperatureLogitsWarper(temperature)]
    )
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    want = processors(prompts, logits.clone()).double().softmax(dim=-1)

    penalties = Penalties(32, VOCAB, torch.device("cpu"))
    for slot, prompt in enumerate(prompts.tolist()):
        penalties.start(slot, prompt[:50], prompt[50:])
    rows = [(row, row, repetition, 0.0, 0.0) for row in range(32)]
    penalties.apply_(logits, torch.tensor(rows, dtype=torch.float64))
    settings = torch.tensor([(temperature, min_p, top_k, top_p)] * 32, dtype=torch.float64)
    scores = kept_scores(logits, settings, num_to_rank(top_k, top_p, VOCAB))
    got = scores.double().softmax(dim=-1)
    # No two logits are equal here: of a tie at the edge theirs keeps some, ours all.
    assert torch.equal(scores > -torch.inf, want > 0)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
