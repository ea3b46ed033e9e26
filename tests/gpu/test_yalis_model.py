"""yalis's models and sampler on a GPU: what the CPU computes, as close as the types allow."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import gpus
from plain_attention import attend
from yalis.config import ModelConfig
from yalis.models.decoder import CausalLM
from yalis.parallel.group import Placement, TensorParallel
from yalis.sampler import Sampler
from yalis.sampling_params import Draw, SamplingParams
from yalis.testing import config_json
from yalis.weights.dummy import DummyWeights
from yalis.weights.loader import load_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpus.COUNT == 0, reason=gpus.NEED),
]

SHAPE = {"hidden_size": 512, "intermediate_size": 1280, "head_dim": 64, "vocab_size": 1000}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": 30},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"num_key_value_heads": 2},
}


@torch.inference_mode()
def logits_on(device: str, dtype: torch.dtype, family: str, num_tokens: int) -> Tensor:
    fields = {"architectures": [f"{family}ForCausalLM"]} | SHAPE | FAMILIES[family]
    config = ModelConfig.from_dict(config_json(**fields))
    model = CausalLM(config, Placement(TensorParallel.single(), dtype, torch.device(device)))
    load_weights(model, DummyWeights(0))
    ids = torch.arange(num_tokens, device=device) * 7 % config.vocab_size
    hidden = model(ids, torch.arange(num_tokens, device=device), attend)
    logits = model.lm_head.gather(model.lm_head(hidden))
    assert logits is not None
    return logits.float().cpu()


@pytest.mark.parametrize("num_tokens", [1, 17, 130])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_cpu(family: str, num_tokens: int) -> None:
    exact = logits_on("cpu", torch.float32, family, num_tokens)
    plain = logits_on("cuda", torch.float32, family, num_tokens)
    torch.testing.assert_close(plain, exact, atol=2e-3, rtol=0)
    for dtype in (torch.bfloat16, torch.float16):
        theirs = (logits_on("cpu", dtype, family, num_tokens) - exact).square().mean().sqrt()
        ours = (logits_on("cuda", dtype, family, num_tokens) - exact).square().mean().sqrt()
        assert ours < 1.5 * theirs


def test_dummy_weights_have_the_cpus_bits() -> None:
    def weights(device: str) -> list[Tensor]:
        config = ModelConfig.from_dict(config_json(**SHAPE))
        at = Placement(TensorParallel.single(), torch.bfloat16, torch.device(device))
        model = CausalLM(config, at)
        load_weights(model, DummyWeights(3))
        return [parameter.cpu() for parameter in model.parameters()]

    assert all(map(torch.equal, weights("cuda"), weights("cpu")))


PARAMS: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 0.8}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.05},
    {"temperature": 0, "repetition_penalty": 1.2}, {"top_k": 20, "top_p": 0.8, "logprobs": 3},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5, "temperature": 1.2},
]  # fmt: skip
VOCAB, ROWS = 128_256, 64


def draws() -> list[Draw]:
    params = itertools.cycle([SamplingParams(**fields) for fields in PARAMS])
    return [
        Draw(next(params), row, 5, row, (7, row) if row % 5 == 0 else ()) for row in range(ROWS)
    ]


def sampler(device: str) -> Sampler:
    made = Sampler(ROWS, VOCAB, torch.device(device))
    for draw in draws():
        if draw.params.has_penalties:
            made.start(draw.slot, range(draw.slot, 500), range(0, 400, 3))
    return made


def random_logits() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(ROWS, VOCAB, generator=generator).bfloat16()


def test_draws_are_those_of_the_cpu_and_wait_for_nothing() -> None:
    logits = random_logits()
    want = sampler("cpu").sample(logits, draws())
    ours, on_gpu = sampler("cuda"), logits.cuda()
    ours.sample(on_gpu, draws())
    for row in range(ROWS):  # forget what that drew
        if draws()[row].params.has_penalties:
            ours.start(row, range(row, 500), range(0, 400, 3))
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = ours.sample(on_gpu, draws())
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    # The exponentials' last bits may differ, and with them, rarely, a draw.
    assert (got.token_ids.cpu() == want.token_ids).float().mean() > 0.97
    assert got.is_finite.all()
    assert got.logprobs is not None
    assert want.logprobs is not None
    torch.testing.assert_close(got.logprobs.top.cpu(), want.logprobs.top)


def test_a_row_is_drawn_the_same_in_any_company() -> None:
    logits, every = random_logits().cuda(), draws()
    together = sampler("cuda").sample(logits, every).token_ids
    ours = sampler("cuda")
    alone = [
        ours.sample(logits[row : row + 1], every[row : row + 1]).token_ids for row in range(ROWS)
    ]
    assert torch.equal(torch.cat(alone), together)


def test_greedy_draws_can_be_captured() -> None:
    ours = Sampler(ROWS, VOCAB, torch.device("cuda"))
    greedy = [Draw(SamplingParams(temperature=0), 0, 0, row) for row in range(ROWS)]
    logits = random_logits().cuda()
    ours.sample(logits, greedy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampled = ours.sample(logits, greedy)
    logits.copy_(logits.flip(-1))
    logits[3, 5] = torch.nan
    graph.replay()
    expected = logits.argmax(dim=-1)
    assert torch.equal(sampled.token_ids, expected)
    assert sampled.is_finite.tolist() == [row != 3 for row in range(ROWS)]
