"""yalis's Triton kernels in Triton's interpreter: their arithmetic, masks and indices, without a GPU."""

from __future__ import annotations

import pytest
import torch

import kernel_cases


# The interpreter computes in numpy, which has no bfloat16.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", kernel_cases.ALL)
def test_kernels(name: str, dtype: torch.dtype) -> None:
    kernel_cases.ALL[name](torch.device("cpu"), dtype)
