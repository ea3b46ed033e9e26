"""yalis's Triton kernels in Triton's interpreter: their arithmetic, masks and indices, without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("a GPU is here: tests/gpu runs the kernels themselves", allow_module_level=True)
# Read where a kernel is defined, those of triton's own library among them.
os.environ["TRITON_INTERPRET"] = "1"

import kernel_cases


# The interpreter computes in numpy, which has no bfloat16.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", kernel_cases.ALL)
def test_kernels(name: str, dtype: torch.dtype) -> None:
    kernel_cases.ALL[name](torch.device("cpu"), dtype)
