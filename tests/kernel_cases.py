"""yalis's kernels against their reference, on a GPU or in Triton's interpreter: what both test files share.

A bound is an absolute and a relative error in units of the type's precision. Integers and copies are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import kernel_reference as reference
from yalis.kernels.activation import silu_and_mul
from yalis.kernels.decode_attention import can_turn, decode_attention
from yalis.kernels.decode_splits import SPLIT, DecodeWorkspace, plan_decode
from yalis.kernels.few_rows import counter, multiply_few_rows, takes
from yalis.kernels.invariant_linear import linear, linear_silu_and_mul
from yalis.kernels.norm import add_rms_norm, rms_norm
from yalis.kernels.prefill_attention import prefill_attention
from yalis.kernels.rotary import rotate_and_store
from yalis.kernels.warp_attention import NewTokens

BLOCK_SIZE = 16
Case = Callable[[torch.device, torch.dtype], None]


def near(actual: Tensor, expected: Tensor, *, units: float, scale: float = 1.0) -> None:
    """Within `units` of the type's precision, of the value or of `scale`, whichever is larger."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    step = units * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=step, atol=step * scale)


def same(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit on a GPU. In the interpreter numpy's products and exponentials depend on shapes."""
    if actual.is_cuda:
        assert torch.equal(actual, expected)
    near(actual, expected, units=16)


def random(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def norms(device: torch.device, dtype: torch.dtype) -> None:
    for num_rows, size in [(1, 1), (3, 96), (2, 1000), (1, 4096), (5, 5120)]:
        wide = random(num_rows, size + 8, device=device, dtype=dtype)
        x = wide[:, :size]  # strided rows
        residual = random(num_rows, size, device=device, dtype=dtype, seed=1)
        weight = random(size, device=device, dtype=dtype)
        near(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), units=4)
        normed, total = add_rms_norm(x, residual, weight, 1e-5)
        expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-5)
        assert torch.equal(total, expected_total)
        near(normed, expected, units=4)
    assert rms_norm(x[:0], weight, 1e-5).shape == (0, 5120)


def activations(device: torch.device, dtype: torch.dtype) -> None:
    for num_rows, size in [(1, 1), (3, 1025), (7, 352)]:
        gate_up = 4 * random(num_rows, 2 * size, device=device, dtype=dtype)
        near(silu_and_mul(gate_up), reference.silu_and_mul(gate_up), units=4)


def rotations(device: torch.device, dtype: torch.dtype) -> None:
    for num_heads, num_kv_heads, head_dim, normalises in [
        (8, 2, 128, False), (6, 2, 80, True), (14, 2, 64, True),
        (9, 9, 96, False), (1, 1, 256, False), (2, 1, 2, True),
    ]:  # fmt: skip
        slots = torch.tensor([3, 17, -1, 40, 63, 0, 5], device=device)
        at = {"device": device, "dtype": dtype}
        qkv = random(len(slots), (num_heads + 2 * num_kv_heads) * head_dim, **at)
        heads = qkv.view(len(slots), -1, head_dim)
        q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        angle = 100 * random(len(slots), head_dim // 2, device=device, dtype=torch.float32)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        caches = [torch.zeros((4, BLOCK_SIZE, num_kv_heads, head_dim), **at) for _ in range(4)]
        options = {}
        if normalises:
            weights = random(2, head_dim, **at)
            options = {"q_weight": weights[0], "k_weight": weights[1], "eps": 1e-6}
        expected_q = q.clone()
        reference.rotate_and_store(expected_q, k, v, cos, sin, *caches[:2], slots, **options)
        rotate_and_store(q, k, v, cos, sin, *caches[2:], slots, **options)
        assert torch.equal(caches[1], caches[3])
        if normalises or dtype == torch.float32:
            near(q, expected_q, units=8)
            near(caches[2], caches[0], units=8)
        else:
            assert torch.equal(q, expected_q)
            assert torch.equal(caches[2], caches[0])


def products(device: torch.device, dtype: torch.dtype) -> None:
    for num_rows, num_out, num_in in [
        (1, 48, 512), (1, 1, 16), (3, 40, 300), (9, 128, 1024),
        (17, 70, 512), (33, 96, 256), (64, 64, 64), (130, 130, 96),
    ]:  # fmt: skip
        x = random(num_rows, num_in + 8, device=device, dtype=dtype)[:, :num_in]
        weight = random(num_out, num_in, device=device, dtype=dtype, seed=1) / num_in**0.5
        bias = random(num_out, device=device, dtype=dtype)
        # The kernel adds in float32: its error grows with the number of terms, and shows for float32 only.
        units = 2 if dtype != torch.float32 else 16
        near(linear(x, weight), reference.linear(x, weight), units=units)
        near(linear(x, weight, bias), reference.linear(x, weight, bias), units=units)
        if num_out % 2 == 0:
            same(linear_silu_and_mul(x, weight), silu_and_mul(linear(x, weight)))


def few_rows(device: torch.device, dtype: torch.dtype) -> None:
    """CUDA C++."""
    sizes = [(1, 8), (48, 512), (74, 1000), (331, 1000), (2048, 4096), (130, 14336), (1056, 128)]
    sizes.append((40000, 2048))  # with passes to ask for
    counts = (1, 2, 3, 4, 7, 8, 13, 16)
    if device.type == "cpu":  # an emulation takes its time
        sizes, counts = [*sizes[:3], (700, 512)], (1, 3, 13)
    for num_out, num_in in sizes:
        x = random(16, num_in + 8, device=device, dtype=dtype)[:, :num_in]  # strided rows
        weight = random(num_out, num_in, device=device, dtype=dtype, seed=1) / num_in**0.5
        bias = random(num_out, device=device, dtype=dtype)
        expected, biased = reference.linear(x, weight), reference.linear(x, weight, bias)
        for num_rows in counts:
            part = x[:num_rows]
            assert takes(part, weight)
            product = multiply_few_rows(part, weight)
            near(product, expected[:num_rows], units=2)
            near(multiply_few_rows(part, weight, bias), biased[:num_rows], units=2)
            assert torch.equal(product[:1], multiply_few_rows(x[:1], weight))
            if num_out % 2 == 0:
                gated = multiply_few_rows(part, weight, is_gated=True)
                near(gated, reference.silu_and_mul(product), units=4)
    assert not counter(device).any()
    assert multiply_few_rows(x[:1], weight[:0]).shape == (1, 0)
    assert not takes(torch.cat((x, x)), weight)
    assert not takes(x[:, 1:], weight[:, 1:])


def attentions(device: torch.device, dtype: torch.dtype) -> None:
    """Of contexts with splits of several lengths, of all that is before a token and of windows."""
    seq_lens = [1, 0, SPLIT, SPLIT + 1, 40, 2 * SPLIT + 190, 33, SPLIT - 1, 300, 15]
    num_new = [1, 0, 1, 1, 40, 1, 1, 1, 290, 2]
    heads = [(8, 2, 64), (7, 1, 96), (6, 2, 80), (8, 1, 128), (2, 2, 256), (1, 1, 16)]
    if device.type == "cpu" and dtype != torch.float32:
        heads = heads[:2]  # the interpreter takes its time
    for num_heads, num_kv_heads, head_dim in heads:
        q, caches, tables, starts, lens = paged(
            seq_lens, num_new, num_heads, num_kv_heads, head_dim, device=device, dtype=dtype
        )
        # One more sequence than there are; two splits where there would be three, once of double length.
        workspace = DecodeWorkspace.allocate(
            len(seq_lens) + 1, max(seq_lens), num_heads, num_kv_heads, head_dim, device,
            windows=(None, 50, SPLIT + 100) if head_dim <= 80 else (None,), most_splits=2,
            few=9 if num_heads == 7 else None,
        )  # fmt: skip
        for window in workspace.split_starts:
            expected = reference.attention(
                q, *caches, tables, starts, lens, scale=head_dim**-0.5, window=window
            )
            out = torch.zeros(q.shape, dtype=dtype, device=device)
            attend(q, caches, tables, starts, lens, workspace, out, window=window)
            if device.type == "cuda":  # elsewhere there is nothing but Triton
                in_triton = torch.zeros_like(out)
                attend(
                    q,
                    caches,
                    tables,
                    starts,
                    lens,
                    workspace,
                    in_triton,
                    window=window,
                    in_triton=True,
                )
                near(in_triton, out, units=16 if dtype == torch.float32 else 2, scale=0.5)
            # The weights are rounded to the type before they meet the values.
            near(out, expected, units=16 if dtype == torch.float32 else 2, scale=0.5)
            assert not workspace.tickets.any()


def paged(
    seq_lens: Sequence[int],
    num_new: Sequence[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
    """q of strided rows, caches with NaN in unused places, tables in random order, starts, lengths."""
    needed = [-(-length // BLOCK_SIZE) for length in seq_lens]
    order = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(0)).tolist()
    tables = torch.full((len(seq_lens), max(needed) + 1), 0, dtype=torch.int32)
    at = {"device": device, "dtype": dtype}
    shape = (len(order), BLOCK_SIZE, num_kv_heads, head_dim)
    caches = (random(*shape, **at), random(*shape, seed=1, **at))
    for seq, count in enumerate(needed):
        blocks = [order.pop() for _ in range(count)]
        tables[seq, :count] = torch.tensor(blocks, dtype=torch.int32)
        used = seq_lens[seq] - (count - 1) * BLOCK_SIZE
        for cache in caches if count else ():
            cache[blocks[-1], used:] = torch.nan
    starts = torch.tensor([0, *num_new]).cumsum(0).to(torch.int32)
    q = random(int(starts[-1]), (num_heads + 1) * head_dim, **at).unflatten(1, (-1, head_dim))
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    return q[:, :num_heads], caches, tables.to(device), starts.to(device), lens.to(device)


def attend(
    q: Tensor,
    caches: tuple[Tensor, Tensor],
    tables: Tensor,
    starts: Tensor,
    lens: Tensor,
    workspace: DecodeWorkspace,
    out: Tensor,
    *,
    window: int | None = None,
    in_triton: bool = False,
) -> None:
    scale = q.shape[-1] ** -0.5
    plan_decode(starts, lens, workspace)
    decode_attention(
        q, *caches, tables, starts, lens, workspace, out,
        scale=scale, window=window, in_triton=in_triton,
    )  # fmt: skip
    prefill_attention(q, *caches, tables, starts, lens, out, scale=scale, window=window)


def turned_attentions(device: torch.device, dtype: torch.dtype) -> None:
    """CUDA C++: attention that turns and stores on the way has the bits of both in turn."""
    seq_lens = [1, SPLIT, SPLIT + 1, 40, 3 * SPLIT + 33, 0, 32]
    at: dict[str, Any] = {"device": device, "dtype": dtype}
    shapes = [(8, 1, 128), (8, 2, 64), (8, 2, 128), (3, 3, 128)]
    for num_heads, num_kv_heads, head_dim in shapes[: 2 if device.type == "cpu" else None]:
        num_new = [min(length, 1) for length in seq_lens]
        shape = (num_heads, num_kv_heads, head_dim)
        q, caches, tables, starts, lens = paged(seq_lens, num_new, *shape, **at)
        rows = random(len(q), 2 * num_kv_heads, head_dim, seed=3, **at)
        cos, sin = random(len(q), 2, head_dim // 2, seed=4, **at).unbind(dim=1)
        new = NewTokens(*rows.split(num_kv_heads, dim=1), cos, sin)
        assert can_turn(q, *caches, new)
        last = (lens[lens > 0] - 1).long()
        blocks = tables[lens > 0].gather(1, (last // BLOCK_SIZE).unsqueeze(1)).squeeze(1)
        slots = blocks * BLOCK_SIZE + last % BLOCK_SIZE
        workspace = DecodeWorkspace.allocate(
            len(seq_lens), max(seq_lens), *shape, device, windows=(None, 50), most_splits=2
        )
        for window in workspace.split_starts:
            results = []
            for is_one in (False, True):
                mine, turned = [cache.clone() for cache in caches], q.clone()
                out = torch.zeros(q.shape, **at)
                if not is_one:
                    rotate_and_store(turned, new.k, new.v, cos, sin, *mine, slots)
                plan_decode(starts, lens // 2, workspace)  # what is read too early is wrong
                plan_decode(starts, lens, workspace)
                out.zero_()  # an ordinary launch
                decode_attention(
                    turned, *mine, tables, starts, lens, workspace, out,
                    scale=head_dim**-0.5, window=window, new=new if is_one else None,
                )  # fmt: skip
                results.append(
                    [tensor.view(torch.int16) for tensor in (out, *mine)]
                )  # NaN is equal
            assert all(map(torch.equal, *results))


def attention_alone(device: torch.device, dtype: torch.dtype) -> None:
    """A sequence's bits do not depend on what runs beside it, nor on how its prompt was cut."""
    seq_lens, num_new = [700, 3 * SPLIT, 70, 333], [1, 1, 70, 200]
    shape = (8, 2, 64)
    q, caches, tables, starts, lens = paged(seq_lens, num_new, *shape, device=device, dtype=dtype)
    workspace = DecodeWorkspace.allocate(4, max(seq_lens), *shape, device)
    together = torch.zeros(q.shape, dtype=dtype, device=device)
    attend(q, caches, tables, starts, lens, workspace, together)
    alone = torch.zeros_like(together)
    for seq, (first, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        middle = first + 2 * (end - first) // 3
        for begin, stop in [(first, middle), (middle, end)] if end - first > 1 else [(first, end)]:
            span = torch.tensor([0, stop - begin], dtype=torch.int32, device=device)
            length = lens[seq : seq + 1] - (end - stop)
            rows = slice(begin, stop)
            attend(q[rows], caches, tables[seq : seq + 1], span, length, workspace, alone[rows])
    same(together, alone)


ALL: dict[str, Case] = {
    case.__name__: case
    for case in (norms, activations, rotations, products, attentions, attention_alone)
}
GPU_ONLY: dict[str, Case] = {case.__name__: case for case in (few_rows, turned_attentions)}
