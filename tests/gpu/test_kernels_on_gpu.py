"""yalis's kernels on a GPU: against their reference, and the same bits whatever the batch."""

from __future__ import annotations

import pytest
import torch

import gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpus.COUNT == 0, reason=gpus.NEED),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "norms",
        "activations",
        "rotations",
        "products",
        "attentions",
        "attention_alone",
        "few_rows",
        "turned_attentions",
    ],
)
def test_kernels(name: str, dtype: torch.dtype) -> None:
    import kernel_cases

    {**kernel_cases.ALL, **kernel_cases.GPU_ONLY}[name](torch.device("cuda", 0), dtype)
