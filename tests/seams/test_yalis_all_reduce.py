"""One model through every all-reduce, at every tensor-parallel size: the same tokens as on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from yalis import LLM, SamplingParams
from yalis.testing import make_checkpoint

pytestmark = pytest.mark.host

# (name, ranks, nodes, all-reduce, plan): every backend, and nvrar on one node and on several.
MATRIX = [
    ("torch-2", 2, 1, "torch", "auto"),
    ("nvrar-2", 2, 1, "nvrar", "auto"),
    ("nvrar-2-on-2-nodes", 2, 2, "nvrar", "nvrar"),
    ("torch-4", 4, 1, "torch", "auto"),
    ("nvrar-4-on-2-nodes", 4, 2, "nvrar", "nvrar"),
    ("nvrar-4-word", 4, 4, "nvrar", "exchange:4"),
]
# Everything that splits unevenly at once: replicated key-value heads, a vocabulary and an MLP that the
# ranks do not divide, biases that must count once, a head_dim of its own, tied embeddings.
ODD = {
    "vocab_size": 307,
    "hidden_size": 44,
    "intermediate_size": 91,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
}
PROMPTS = ["Once upon a time", "x", "The network " * 20, "0123456789", "{}"]
GREEDY = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
SAMPLED = [
    SamplingParams(max_tokens=40, temperature=0.9, seed=1),
    SamplingParams(max_tokens=30, temperature=1.3, top_k=20, seed=2),
    SamplingParams(max_tokens=20, temperature=1.0, top_p=0.8, seed=3),
    SamplingParams(max_tokens=64, temperature=0),
    SamplingParams(max_tokens=50, temperature=0.7, top_k=50, top_p=0.9),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    shapes: dict[str, dict[str, Any]] = {"plain": {"num_hidden_layers": 2}, "odd": ODD}
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(folder / name, **shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> dict[str, Any]:
    """What one rank says: greedy, then sampled, for each checkpoint."""
    said = {}
    for name, path in checkpoints.items():
        with LLM(str(path)) as llm:
            said[name] = (llm.generate(PROMPTS, GREEDY), llm.generate(PROMPTS, SAMPLED))
    return said


@pytest.fixture(scope="module", params=MATRIX, ids=lambda row: row[0])
def odd_llm(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Iterator[LLM]:
    _, num_ranks, num_nodes, all_reduce, plan = request.param
    with LLM(
        str(checkpoints["odd"]),
        tensor_parallel_size=num_ranks,
        num_nodes=num_nodes,
        all_reduce=all_reduce,
        all_reduce_plan=plan,
    ) as llm:
        yield llm


def test_same_tokens_greedy_and_sampled_as_on_one_rank(
    odd_llm: LLM, expected: dict[str, Any]
) -> None:
    greedy, sampled = expected["odd"]
    assert odd_llm.generate(PROMPTS, GREEDY) == greedy
    assert odd_llm.generate(PROMPTS, SAMPLED) == sampled


def test_the_backend_asked_for_did_the_work(odd_llm: LLM) -> None:
    before = odd_llm.describe_all_reduce()
    odd_llm.generate("x", SamplingParams(max_tokens=10, temperature=0, ignore_eos=True))
    after = odd_llm.describe_all_reduce()
    assert after["backend"] == odd_llm.options.all_reduce
    # Two a layer, one for the embedding and one for the likeliest token, each of ten steps.
    assert after["calls"] - before["calls"] == 10 * (2 * ODD["num_hidden_layers"] + 2)
    assert not after.get("fallbacks")
    if after["backend"] == "nvrar":
        assert "host executor over gloo" in after["communicator"]


@pytest.mark.parametrize("all_reduce", ["torch", "nvrar"])
def test_untied_plain_model_on_four_ranks(
    all_reduce: str, checkpoints: dict[str, Path], expected: dict[str, Any]
) -> None:
    options = {"tensor_parallel_size": 4, "num_nodes": 2, "all_reduce": all_reduce}
    with LLM(str(checkpoints["plain"]), **options) as llm:
        assert llm.generate(PROMPTS, GREEDY) == expected["plain"][0]


# Through real workers; tests/parity compares the families with transformers.
FAMILIES = [("Qwen2", 2, "torch"), ("Qwen3", 4, "nvrar"), ("Mistral", 2, "nvrar")]


@pytest.mark.parametrize(("family", "size", "all_reduce"), FAMILIES)
def test_other_families(family: str, size: int, all_reduce: str, tmp_path: Path) -> None:
    shape = {
        "architectures": [f"{family}ForCausalLM"],
        "sliding_window": None,
        "num_hidden_layers": 2,
    }
    make_checkpoint(tmp_path, **shape)
    with (
        LLM(str(tmp_path)) as one,
        LLM(str(tmp_path), tensor_parallel_size=size, all_reduce=all_reduce) as several,
    ):
        assert several.generate(PROMPTS, GREEDY) == one.generate(PROMPTS, GREEDY)


def test_dummy_weights_are_the_same_model_at_any_size(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, **ODD)
    for path in tmp_path.glob("*"):
        if path.name != "config.json":
            path.unlink()
    options = {"load_format": "dummy", "seed": 5}
    with (
        LLM(str(tmp_path), **options) as one,
        LLM(str(tmp_path), tensor_parallel_size=2, **options) as two,
    ):
        assert one.generate([[5, 6, 7]], GREEDY) == two.generate([[5, 6, 7]], GREEDY)


def test_batch_invariant_ranks_give_the_same_bits_alone_and_together(
    checkpoints: dict[str, Path],
) -> None:
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=0)
    with LLM(str(checkpoints["odd"]), tensor_parallel_size=2, batch_invariant=True) as llm:
        together = llm.generate(PROMPTS, params)
        alone = [llm.generate(prompt, params)[0] for prompt in PROMPTS[:2]]
    for one, among in zip(alone, together, strict=False):
        assert one.outputs[0].logprobs == among.outputs[0].logprobs
