"""yalis's kernels on a GPU: against their reference, and the same bits whatever the batch."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
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
