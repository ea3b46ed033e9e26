# SPDX-License-Identifier: Apache-2.0
"""What a transformer layer does after its all-reduce: add the residual, normalise each row (RMSNorm).

The operation as one definition for all executors: :func:`add_rms_norm` is the specification in torch, and
the GPU kernel (gpu/csrc/rows.cuh) gives its bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nvrar.arguments import overlap, refusal_of_call, refusal_of_out

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WORD_BYTES = 8  # whose squares are added first
_CHUNK_WORDS = 120  # 960 bytes: what a unit of LL128 carries
_LANES = 32


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``h = x + residual`` and ``h * (1 / sqrt(mean(h * h) + eps)) * weight``, as ``(normalised, h)``.

    x, residual: ``[..., hidden]`` of one floating type; weight: ``[hidden]``. fp32 inside, rounded to the
    type after the addition, after the scale and after the weight, as transformers' LlamaRMSNorm does.
    The squares are added in one documented order, so that the result has the same bits wherever it is
    computed: in chunks of 960 bytes, each by 32 lanes (:func:`_dealt_to_lanes`), a lane's words of 8 bytes
    and their elements in turn, then the halves of the lanes, and of halves; then the chunks by 32 lanes in
    turn, then halves.
    """
    h = (x.float() + residual.float()).to(x.dtype)
    wide = h.float()
    # As the kernel has it: times the inverse of the number, which is rounded to fp32.
    mean = _sum_of_squares(wide, _WORD_BYTES // x.element_size()) * (1 / x.shape[-1])
    # Rounded once, from fp64: the fp32 square root of torch on CPUs is off by a bit at times.
    scale = torch.sqrt((mean + eps).double()).float().reciprocal()
    normed = (wide * scale.unsqueeze(-1)).to(x.dtype).float()
    return (normed * weight.float()).to(x.dtype), h


def _sum_of_squares(wide: Tensor, per_word: int) -> Tensor:
    """fp32 ``[..., hidden]`` to ``[...]``. Zeros fill up what is short; adding them changes nothing."""
    words = _add_in_turn(_cut(wide * wide, per_word))
    chunks = _cut(words, _CHUNK_WORDS)
    sums = _add_halves(_add_in_turn(_dealt_to_lanes(chunks)))
    return _add_halves(_add_in_turn(_cut(sums, _LANES).transpose(-1, -2)))


def _dealt_to_lanes(chunks: Tensor) -> Tensor:
    """``[..., 120]`` words to ``[..., 32, 4]``, as LL128 deals them out: in each of four lines seven lanes
    have two stretches of two words, and the eighth, which carries flags, has one."""
    *shape, _ = chunks.shape
    first, second, last = torch.split(chunks, [56, 56, 8], dim=-1)
    pairs = torch.cat([first.reshape(*shape, 4, 7, 2), second.reshape(*shape, 4, 7, 2)], dim=-1)
    singles = F.pad(last.reshape(*shape, 4, 1, 2), (0, 2))
    return torch.cat([pairs, singles], dim=-2).view(*shape, _LANES, 4)


def _cut(x: Tensor, length: int) -> Tensor:
    padded = F.pad(x, (0, -x.shape[-1] % length))
    return padded.view(*padded.shape[:-1], -1, length)


def _add_in_turn(x: Tensor) -> Tensor:
    total = x[..., 0]
    for i in range(1, x.shape[-1]):
        total = total + x[..., i]
    return total


def _add_halves(x: Tensor) -> Tensor:
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def refusal_of_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    residual_out: Tensor | None,
) -> str:
    """Why a call cannot work with what it was given; empty if it can."""
    refusal = refusal_of_call(x, out, "sum")
    if refusal:
        return refusal
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; all_reduce_add_rms_norm takes {', '.join(map(str, DTYPES))}"
    if x.dim() == 0:
        return "x has no dimension; it must be [..., hidden]"
    for name, other, shape in (("residual", residual, x.shape), ("weight", weight, x.shape[-1:])):
        if not isinstance(other, torch.Tensor):
            return f"{name} is {type(other).__name__}, not a torch.Tensor"
        found = (other.shape, other.dtype, other.device)
        if found != (shape, x.dtype, x.device):
            return (
                f"{name} is {found[1]} {tuple(found[0])} on {found[2]}; with x {tuple(x.shape)} it must be "
                f"{x.dtype} {tuple(shape)} on {x.device}"
            )
    if not isinstance(eps, float) or not 0 <= eps < math.inf:
        return f"eps is {eps!r}; it must be a float, 0 or more"
    if residual_out is not None:
        refusal = refusal_of_out(residual, residual_out, "residual", "residual_out")
        if refusal:
            return refusal
    # Beside out=x and residual_out=residual: nothing is written twice, or read after it was written.
    others = {"residual": residual, "weight": weight, "residual_out": residual_out}
    return _refusal_of_sharing("out", out, others) or _refusal_of_sharing(
        "residual_out", residual_out, {"x": x, "weight": weight}
    )


def _refusal_of_sharing(
    name: str, result: Tensor | None, others: Mapping[str, Tensor | None]
) -> str:
    if result is not None:
        for other_name, other in others.items():
            if other is not None and overlap(result, other):
                return f"{name} and {other_name} share memory; give each result memory of its own"
    return ""
