# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a decoder, and the one place where each operation finds who computes it.

The torch code below is the specification: what the checkpoints' own code computes, with a rounding to the
tensor's type after each operation. Rows are tokens; every row is computed by itself. On a GPU 16-bit types
have kernels of their own, imported only there; float32 keeps to torch, whose products do not round to tf32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from yalis.device import has_kernels


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, is_batch_invariant: bool = False
) -> Tensor:
    """x `[num_tokens, num_in]` W^T + b: `[num_tokens, num_out]`.

    `is_batch_invariant` asks for rows whose bits do not depend on their number. Kernels have them; where
    there are none, whoever calls must bring one row at a time.
    """
    if _has_kernels(x):
        from yalis.kernels import linear as kernels

        return kernels.linear(x, weight, bias, is_batch_invariant=is_batch_invariant)
    return F.linear(x, weight, bias)


def linear_silu_and_mul(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, is_batch_invariant: bool = False
) -> Tensor:
    """silu(gate) * up of `linear` to `[num_tokens, 2 * size]`, gates first: `[num_tokens, size]`."""
    if _has_kernels(x):
        from yalis.kernels import activation
        from yalis.kernels import linear as kernels

        if bias is None:
            return kernels.linear_silu_and_mul(x, weight, is_batch_invariant=is_batch_invariant)
        product = linear(x, weight, bias, is_batch_invariant=is_batch_invariant)
        return activation.silu_and_mul(product)
    gate, up = linear(x, weight, bias).chunk(2, dim=-1)
    return F.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Each vector of `[..., size]` divided by its root mean square, then times `weight` `[size]`.

    The order of Llama's checkpoints: normalised in fp32, rounded to x's type, weighted in that type.
    """
    if _has_kernels(x) and x.dim() == 2:
        from yalis.kernels import norm

        return norm.rms_norm(x, weight, eps)
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return weight * F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(rms_norm(s, weight, eps), s)` with s = x + residual, rounded; all `[num_tokens, size]`."""
    if _has_kernels(x):
        from yalis.kernels import norm

        return norm.add_rms_norm(x, residual, weight, eps)
    total = x + residual
    return rms_norm(total, weight, eps), total


def prepare_heads(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The heads of both, each RMS-normalised where there is a weight `[head_dim]`, then turned.

    q and k are `[num_tokens, num_heads, head_dim]`, with heads of their own number. Component i turns with
    i + head_dim / 2, by its token's angles; `cos` and `sin` are `[num_tokens, head_dim / 2]`.
    """
    q = q if q_weight is None else rms_norm(q, q_weight, eps)
    k = k if k_weight is None else rms_norm(k, k_weight, eps)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _turn(q, cos, sin), _turn(k, cos, sin)


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of `[n, vocab]`: the first token (int64) of the highest logit, that logit, the lowest."""
    highest, token_ids = logits.max(dim=-1)
    return token_ids, highest.float(), logits.amin(dim=-1).float()


def are_finite(highest: Tensor, lowest: Tensor) -> Tensor:
    """Whether all numbers between are, by the two of `likeliest`: a NaN among them is both."""
    return (highest - lowest) < torch.inf


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float32 and has_kernels()
