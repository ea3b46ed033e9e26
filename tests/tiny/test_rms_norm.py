"""Sum, residual and RMSNorm as one operation: its arithmetic, and what it refuses."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from nvrar.arguments import refusal_of_call
from nvrar.rms_norm import add_rms_norm, refusal_of_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [1, 8, 1000, 4096, 40_000])
def test_it_is_the_norm_of_the_sum(hidden: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(hidden)
    x, residual = (torch.randn(3, hidden, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(hidden, generator=generator).to(dtype)
    normed, h = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(h, x + residual)
    wide = h.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    bound = 3 * torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
    assert ((normed.double() - exact).abs() <= bound).all()


def test_it_rounds_as_transformers_does() -> None:
    generator = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(64, 512, generator=generator).bfloat16() for _ in range(2))
    weight = torch.rand(512, generator=generator).bfloat16()
    normed, h = add_rms_norm(x, residual, weight, 1e-5)
    wide = h.float()
    theirs = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    differs = normed != weight * theirs.to(torch.bfloat16)
    assert differs.float().mean() < 0.002  # where the order of the squares moved a rounding


def test_the_order_of_the_squares_is_the_documented_one() -> None:
    """Spelled out for one row, number by number."""
    row = torch.randn(1100, generator=torch.Generator().manual_seed(2)).bfloat16()
    squares = [v * v for v in row.float()]
    words = [((a + b) + c) + d for a, b, c, d in zip(*[iter(squares)] * 4, strict=True)]
    zero = torch.tensor(0.0)

    def halves(lanes: list[torch.Tensor]) -> torch.Tensor:
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [a + b for a, b in zip(lanes[:half], lanes[half:], strict=True)]
        return lanes[0]

    chunks = []
    for start in range(0, len(words), 120):
        chunk = words[start : start + 120]
        lanes = []
        for lane in range(32):
            line, place = divmod(lane, 8)
            groups = [56 + line] if place == 7 else [7 * line + place, 28 + 7 * line + place]
            total = zero
            for group in groups:
                for word in chunk[2 * group : 2 * group + 2]:
                    total = total + word
            lanes.append(total)
        chunks.append(halves(lanes))
    total = halves([chunks[i] if i < len(chunks) else zero for i in range(32)])
    scale = 1 / torch.sqrt(total * torch.tensor(1 / 1100) + 1e-6)
    weight = torch.ones(1100, dtype=torch.bfloat16)
    normed, _ = add_rms_norm(row, torch.zeros_like(row), weight, 1e-6)
    assert torch.equal(normed, (row.float() * scale).bfloat16())


def test_every_step_is_rounded_as_ieee_has_it() -> None:
    """As the kernel rounds; numpy's square root is the nearest number, torch's on CPUs need not be."""
    x = torch.rand(4096, 1, generator=torch.Generator().manual_seed(3)) * 3
    normed, _ = add_rms_norm(x, torch.zeros_like(x), torch.ones(1), 1e-5)
    h = x.numpy()
    scale = np.float32(1) / np.sqrt(h * h + np.float32(1e-5))
    assert (normed.numpy() == h * scale).all()


X = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.ones(2, 8, dtype=torch.int32)}, "int32"),
        ({"x": torch.tensor(1.0)}, "no dimension"),
        ({"x": [1.0]}, "list"),
        ({"residual": torch.ones(2, 4)}, r"residual is .*\(2, 4\)"),
        ({"residual": X.double()}, "residual is torch.float64"),
        ({"weight": torch.ones(2)}, r"weight is .*\(2,\).* must be .*\(8,\)"),
        ({"weight": 1.0}, "weight is float"),
        ({"eps": -1e-6}, "eps is -1e-06"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"eps": "small"}, "eps is 'small'"),
        ({"out": torch.ones(3)}, "out has shape"),
        ({"residual_out": torch.ones(3)}, "residual_out has shape"),
    ],
)
def test_what_cannot_work_is_said(change: dict, says: str) -> None:
    given = {"x": X, "residual": X.clone(), "weight": torch.ones(8), "eps": 1e-6}
    given |= {"out": None, "residual_out": None} | change
    assert re.search(says, refusal_of_norm(**given))


def test_what_out_may_be() -> None:
    pairs = torch.ones(2, 8, 2)
    assert not refusal_of_call(
        pairs[..., 0], pairs[..., 1], "sum"
    )  # between each other, not shared
    single = torch.ones(16).as_strided((1, 2, 4), (0, 8, 2))
    assert not refusal_of_call(single, single, "sum")
    expanded = torch.ones(8, 1).expand(8, 2)
    assert "share memory, as those of an expanded" in refusal_of_call(expanded, expanded, "sum")


def test_results_that_share_memory_are_refused() -> None:
    memory = torch.ones(40)
    x, residual, weight = memory[:16].view(2, 8), memory[16:32].view(2, 8), memory[32:]
    another = torch.empty(2, 8)
    assert not refusal_of_norm(x, residual, weight, 1e-6, x, residual)
    assert not refusal_of_norm(x, x, weight, 1e-6, None, another)

    def refusal(out: torch.Tensor | None, residual_out: torch.Tensor | None) -> str:
        return refusal_of_norm(x, residual, weight, 1e-6, out, residual_out)

    for out, residual_out, names in (
        (another, another.view(2, 8), "out and residual_out share memory"),
        (residual, None, "out and residual share memory"),
        (memory[9:25].view(2, 8), None, "x and out share part of their memory; give out=x"),
        (
            None,
            memory[20:36].view(2, 8),
            "residual and residual_out share part .* give residual_out=residual",
        ),
        (None, x, "residual_out and x share memory"),
        (None, weight.expand(2, 8), "elements of residual_out share memory"),
    ):
        assert re.search(names, refusal(out, residual_out)), refusal(out, residual_out)
    wide = torch.ones(24)
    weight, out = wide[:8], wide[4:20].view(2, 8)
    assert "out and weight share memory" in refusal(out, None)
