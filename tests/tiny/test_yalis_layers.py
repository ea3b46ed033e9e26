"""A decoder's arithmetic: the order of roundings, and that a GPU's kernels are asked for the same thing."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from thread_ranks import on_ranks
from yalis.layers import functional
from yalis.layers.vocabulary import VocabularyHead
from yalis.parallel.all_reduce import NoAllReduce
from yalis.parallel.group import Placement, TensorParallel
from yalis.sampler import Sampler, can_share, sample_shares
from yalis.sampling_params import Draw, SamplingParams


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_norms_have_the_bits_of_transformers(dtype: torch.dtype) -> None:
    theirs = LlamaRMSNorm(300, eps=1e-5).to(dtype)
    theirs.weight.data = 1 + 0.3 * randn(300, dtype=dtype)
    x, residual = randn(50, 300, dtype=dtype), 7 * randn(50, 300, dtype=dtype).flip(0)
    total = x + residual
    want = theirs(total)
    got = NoAllReduce().add_rms_norm(x, residual, theirs.weight, 1e-5)
    assert torch.equal(got[1], total)
    # The mean of squares may be added in another order: a last bit, now and then.
    assert (got[0] != want).float().mean() < 0.01
    torch.testing.assert_close(got[0], want, rtol=0.01, atol=0)
    assert torch.equal(functional.rms_norm(total, theirs.weight, 1e-5), got[0])


def fakes(calls: list[str]) -> dict[str, dict[str, Any]]:
    """The kernels' functions as their own documentation describes them, in torch."""
    reference = {
        "linear": lambda x, weight, bias=None: torch.nn.functional.linear(x, weight, bias),
        "linear_silu_and_mul": lambda x, weight: gated(torch.nn.functional.linear(x, weight)),
        "silu_and_mul": lambda gate_up: gated(gate_up),
        "rms_norm": lambda x, weight, eps: llama_norm(weight, eps)(x),
        "add_rms_norm": lambda x, r, weight, eps: (llama_norm(weight, eps)(x + r), x + r),
    }

    def noting(name: str) -> Any:
        def call(*args: Any, is_batch_invariant: bool = False) -> Any:
            calls.append("invariant_" * is_batch_invariant + name)
            return reference[name](*args)

        return call

    places = {
        "linear": ("linear", "linear_silu_and_mul"),
        "activation": ("silu_and_mul",),
        "norm": ("rms_norm", "add_rms_norm"),
    }
    return {module: {name: noting(name) for name in names} for module, names in places.items()}


def gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def llama_norm(weight: Tensor, eps: float) -> Any:
    norm = LlamaRMSNorm(len(weight), eps=eps)
    norm.weight.data = weight
    return norm


CALLS: list[tuple[str, tuple[Any, ...], str]] = [
    ("linear", (randn(64, 30), randn(20, 30)), "linear"),
    ("linear", (randn(1, 30), randn(20, 30), randn(20)), "linear"),
    ("linear_silu_and_mul", (randn(3, 30), randn(20, 30)), "linear_silu_and_mul"),
    ("linear_silu_and_mul", (randn(3, 30), randn(20, 30), randn(20)), "linear silu_and_mul"),
    ("rms_norm", (randn(5, 32), randn(32), 1e-5), "rms_norm"),
    ("rms_norm", (randn(5, 2, 32), randn(32), 1e-5), ""),
    ("add_rms_norm", (randn(5, 32), randn(5, 32).flip(0), randn(32), 1e-5), "add_rms_norm"),
]


@pytest.mark.parametrize("is_batch_invariant", [False, True])
@pytest.mark.parametrize(("name", "args", "kernels"), CALLS)
def test_a_gpu_asks_its_kernels_for_what_torch_computes(
    name: str,
    args: tuple[Any, ...],
    kernels: str,
    is_batch_invariant: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    how = {"is_batch_invariant": True} if is_batch_invariant and "linear" in name else {}
    want = getattr(functional, name)(*args)
    calls: list[str] = []
    for module_name, functions in fakes(calls).items():
        module = ModuleType(module_name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, f"yalis.kernels.{module_name}", module)
        monkeypatch.setattr(f"yalis.kernels.{module_name}", module, raising=False)
    monkeypatch.setattr(functional, "_has_kernels", lambda x: True)
    torch.testing.assert_close(getattr(functional, name)(*args, **how), want)
    # Products alone mix rows.
    expected = kernels.replace("linear", "invariant_linear") if how else kernels
    assert calls == expected.split()


def share_of(logits: Tensor, tp: TensorParallel) -> tuple[VocabularyHead, Tensor]:
    """A rank's head and its share of these logits."""
    head = VocabularyHead(logits.shape[1], 8, Placement(tp, logits.dtype, torch.device("cpu")))
    [part] = head.weight_parts("lm_head")
    mine = logits[:, part.region[0]]
    share = torch.zeros(
        len(logits), len(head.weight), dtype=logits.dtype
    )  # as the padding's weights make it
    share[:, : mine.shape[1]] = mine
    return head, share


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "vocab_size", [5, 64, 67]
)  # 5 leaves the last of 4 ranks nothing but padding
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_find_the_likeliest_token_together(
    size: int, vocab_size: int, dtype: torch.dtype
) -> None:
    logits = randn(60, vocab_size, dtype=torch.float32).round(decimals=1)
    logits[:20] -= 50  # the padding's zeros would win
    logits[20:30, 1] = logits[20:30, -1] = 90  # the first of equals
    logits = logits.to(dtype)
    bad = torch.zeros(60, dtype=torch.bool)
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf) * 2, start=40):
        logits[row, 0 if row < 43 else -1] = value
        bad[row] = True

    def run(tp: TensorParallel) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        head, share = share_of(logits, tp)
        return (*head.likeliest(share), head.gather(share))

    results = on_ranks(size, run)
    for token_ids, highest, is_finite, _ in results:
        assert torch.equal(is_finite, ~bad)
        assert torch.equal(token_ids[~bad], logits.float().argmax(dim=1)[~bad])
        assert torch.equal(highest[~bad], logits.float().amax(dim=1)[~bad])
        assert ((token_ids >= 0) & (token_ids < vocab_size)).all()
    gathered = results[0][3]
    assert gathered is not None
    torch.testing.assert_close(gathered, logits, equal_nan=True)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("vocab_size", [5, 67, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_draw_together_what_one_draws(size: int, vocab_size: int, dtype: torch.dtype) -> None:
    logits = (3 * randn(200, vocab_size, dtype=torch.float32)).to(dtype)
    logits[7, -1] = torch.nan
    kinds = [{}, {"temperature": 0.0}, {"temperature": 0.3}, {"min_p": 0.2}, {"temperature": 1e-30}]
    draws = [
        Draw(SamplingParams(**kinds[row % 5]), seed=row, token_idx=row % 7, slot=row)
        for row in range(200)
    ]
    alone = Sampler(200, vocab_size, torch.device("cpu")).sample(logits, draws)
    assert alone.is_finite.sum() == 199
    for together in on_ranks(size, lambda tp: sample_shares(*share_of(logits, tp), draws)):
        assert torch.equal(together.is_finite, alone.is_finite)
        fine = alone.is_finite
        assert torch.equal(together.token_ids[fine], alone.token_ids[fine])
        assert ((together.token_ids >= 0) & (together.token_ids < vocab_size)).all()


def test_what_needs_all_logits_is_not_shared() -> None:
    def shared(**params: Any) -> bool:
        banned = params.pop("banned", ())
        return can_share(Draw(SamplingParams(**params), 1, 0, 0, banned))

    assert shared()
    assert shared(temperature=0.0)
    assert shared(min_p=0.1, top_k=-1)
    for params in (
        {"top_k": 5},
        {"top_p": 0.9},
        {"logprobs": 0},
        {"presence_penalty": 0.1},
        {"repetition_penalty": 1.2},
        {"banned": (3,)},
    ):
        assert not shared(**params)
