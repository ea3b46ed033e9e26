"""yalis's kernels in CUDA C++ compile without a GPU, and leave room for each other on a multiprocessor."""

from __future__ import annotations

import pytest
import torch

from yalis.kernels import compiled, few_rows, warp_attention

NUM_REGISTERS = 65536
SHARED_BYTES = 228 << 10
RESERVED_BYTES = 1 << 10  # of shared memory, for each block


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 16])
def test_a_product_fits_a_multiprocessor(num_rows: int, is_gated: bool) -> None:
    tile = few_rows.choose_tile(num_rows)
    spec = few_rows.spec_of(torch.bfloat16, num_rows, tile, is_gated=is_gated, arch="sm_90")
    built = compiled.build(spec)
    assert built.spill_bytes <= 32  # of what is between passes
    assert spec.shared_bytes + RESERVED_BYTES <= SHARED_BYTES


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("head_dim", "group"), [(64, 8), (128, 4), (128, 8), (128, 1)])
def test_attention_fits_beside_a_product(
    dtype: torch.dtype, head_dim: int, group: int, turns: bool
) -> None:
    attention = warp_attention.Spec(dtype, head_dim, group, turns, "sm_90")
    built = compiled.build(attention)
    # All keys and values of a round are in registers, and the new token beside them.
    assert built.spill_bytes <= (256 if turns else 16)
    product = few_rows.spec_of(dtype, 1, few_rows.choose_tile(1), is_gated=False, arch="sm_90")
    both = built.num_registers + compiled.build(product).num_registers
    assert compiled.NUM_THREADS * both <= NUM_REGISTERS
    # Of each warp a float for each dimension and head, and what little else there is.
    in_shared = compiled.NUM_THREADS // 32 * group * head_dim * 4 + 1024
    assert product.shared_bytes + in_shared + 2 * RESERVED_BYTES <= SHARED_BYTES
