# SPDX-License-Identifier: Apache-2.0
"""Matrix products: who computes one, by its number of rows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from yalis.kernels import few_rows, invariant_linear
from yalis.kernels.activation import silu_and_mul


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, is_batch_invariant: bool = False
) -> Tensor:
    """x `[num_rows, num_in]` and weight `[num_out, num_in]` to `[num_rows, num_out]` in x's type. Capturable.

    Up to `few_rows.MOST_ROWS` rows, a row's bits do not depend on the others; beyond, cuBLAS chooses. With
    `is_batch_invariant` they never do, at the cost of time.
    """
    if is_batch_invariant:
        return invariant_linear.linear(x, weight, bias)
    if few_rows.takes(x, weight):
        return few_rows.multiply_few_rows(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_silu_and_mul(x: Tensor, weight: Tensor, *, is_batch_invariant: bool = False) -> Tensor:
    """`silu_and_mul(linear(x, weight))`, for few rows without the matrix between. Capturable.

    weight `[2 * size, num_in]`, the gate's rows first; returns `[num_rows, size]`.
    """
    if is_batch_invariant:
        return invariant_linear.linear_silu_and_mul(x, weight)
    if few_rows.takes(x, weight):
        return few_rows.multiply_few_rows(x, weight, is_gated=True)
    return silu_and_mul(F.linear(x, weight))
